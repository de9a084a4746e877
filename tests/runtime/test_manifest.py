"""The manifest lists what the program wrote: nothing else is deleted, and changed files are detected."""

import json
import os
import re
import shutil
from types import SimpleNamespace

import pytest
from absl import logging

from jax_rlhf import verify
from jax_rlhf.cli.model_paths import check_inputs
from jax_rlhf.cli.open_workdir import open_workdir
from jax_rlhf.cli.preflight import check_run
from jax_rlhf.config import run_config
from jax_rlhf.io.durable import write_json
from jax_rlhf.runtime.manifest import ManifestError, check_model, export_model
from jax_rlhf.runtime.remote import delete
from jax_rlhf.runtime.workdir import WorkdirError, check_overwrite, lock_workdir, status


@pytest.fixture
def workdir(whole, tmp_path):
    """A copy of a finished run of three phases, which the tests damage."""
    return shutil.copytree(whole[0], tmp_path / "run")


@pytest.fixture(autouse=True)
def same_verbosity():
    """Restores the log level, which `verify` changes."""
    before = logging.get_verbosity()
    yield
    logging.set_verbosity(before)


def config_of(workdir):
    return json.loads((workdir / "config.json").read_text())


# ---- what --overwrite deletes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "notes.txt",
        "model/notes.txt",
        "model/tokenizer_of_mine.txt",
        "checkpoints/thesis.tex",
        "checkpoints/2024-03-thesis.tex",
        "checkpoints/3/my_notes.txt",
        "model/added_tokens.json",
        ".thesis.old-2024",
        ".model.old-2024-mine",
        "bad_batch/thesis.npz",
        "tensorboard/thesis",
        "mine/thesis.tex",
        ".git/config",
    ],
)
def test_overwrite_refuses_to_delete_files_of_the_user(workdir, name):
    (workdir / "sft" / name).parent.mkdir(exist_ok=True)
    (workdir / "sft" / name).write_text("mine")
    before = sorted(workdir.rglob("*"))
    shown = "mine|.git" if name.startswith(("mine", ".git")) else re.escape(name)
    with pytest.raises(WorkdirError, match=f"deletes only what this program wrote: .*sft contains .*: ({shown}).*away"):
        check_overwrite(workdir, ("reward", "sft"))
    assert sorted(workdir.rglob("*")) == before
    check_overwrite(workdir, ("reward", "ppo"))


def test_a_folder_without_a_valid_manifest_and_a_link_are_not_deleted(workdir, tmp_path):
    (tmp_path / "other" / "sft").mkdir(parents=True)
    check_overwrite(tmp_path / "other", ("sft", "reward"))  # one folder is empty, and the other is missing
    (tmp_path / "other" / "sft" / "metrics.jsonl").write_text("")
    with pytest.raises(WorkdirError, match=r"has no manifest.json"):
        check_overwrite(tmp_path / "other", ("sft",))
    (workdir / "sft").rename(tmp_path / "elsewhere")
    (workdir / "sft").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(WorkdirError, match="sft is a link"):
        check_overwrite(workdir, ("sft",))
    (workdir / "reward" / "model").rename(tmp_path / "model")
    (workdir / "reward" / "model").symlink_to(tmp_path / "model")
    with pytest.raises(WorkdirError, match="did not write: model"):
        check_overwrite(workdir, ("reward",))
    for content in (
        "null",
        "[]",
        "{}",
        '{"program": "x", "models": {}}',
        '{"program": "jax_rlhf", "models": {"a": 7}}',
        "x",
    ):
        (workdir / "ppo" / "manifest.json").write_text(content)
        with pytest.raises(WorkdirError, match=r"manifest.json (cannot be read|was not written)"):
            check_overwrite(workdir, ("ppo",))


def test_a_model_that_was_changed_is_not_deleted(workdir):
    flip(workdir / "sft" / "model" / "model.safetensors")
    with pytest.raises(WorkdirError, match=r"did not write: model/model.safetensors \(changed\)"):
        check_overwrite(workdir, ("sft",))


def test_a_file_added_after_the_first_check_is_not_deleted(workdir):
    """All data is tokenized between the first check and the deletion, which can take long."""
    check_overwrite(workdir, ("sft",))
    (workdir / "sft" / "notes.txt").write_text("mine")
    with pytest.raises(WorkdirError, match=r"did not write: notes.txt"):
        open_workdir(workdir, config_of(workdir), ("sft",), overwrite=True)
    assert (workdir / "sft" / "notes.txt").read_text() == "mine"
    assert (workdir / "sft" / "model").is_dir()


def test_no_phase_starts_in_a_folder_with_unknown_files(workdir):
    config = run_config(for_eight_devices(config_of(workdir)))
    shutil.rmtree(workdir / "ppo")
    (workdir / "ppo").mkdir()
    (workdir / "ppo" / "manifest.json.partial").write_text("")  # this program leaves it if it is killed at that moment
    check_run(config, workdir, overwrite=False)
    (workdir / "ppo" / "metrics.jsonl").write_text("mine\n")
    with pytest.raises(
        WorkdirError, match=r"ppo contains files that this program did not write: metrics.jsonl. Move it away"
    ):
        check_run(config, workdir, overwrite=False)


def test_an_interrupted_export_is_detected(workdir, monkeypatch):
    """The manifest must not keep the digests of the former model."""

    def cut_short(folder, pretrained, dtype):
        assert dtype == "bfloat16"  # the dtype that the model computes in
        flip(folder / "model.safetensors")
        raise KeyboardInterrupt

    monkeypatch.setattr("jax_rlhf.runtime.manifest.save_pretrained", cut_short)
    config = SimpleNamespace(dtype="bfloat16")
    with pytest.raises(KeyboardInterrupt):
        export_model(workdir / "ppo" / "model", SimpleNamespace(model=SimpleNamespace(config=config)))
    with pytest.raises(ManifestError, match="its export was interrupted"):
        check_model(workdir / "ppo" / "model")
    assert looked_at(workdir)["ppo/model"] == "its export was interrupted"
    check_overwrite(workdir, ("ppo",))


def test_files_of_interrupted_writes_are_deleted(workdir):
    for name in (
        ".model.partial-7/config.json",
        ".critic.old-7/x",
        "checkpoints/9.orbax-checkpoint-tmp/state.orbax-checkpoint-tmp/x",
        "checkpoints/8.orbax-checkpoint-tmp-3/state/x",
    ):
        (workdir / "sft" / name).parent.mkdir(parents=True)
        (workdir / "sft" / name).write_text("")
    (workdir / "sft" / "summary.json.partial").write_text("")
    check_overwrite(workdir, ("sft",))
    delete(workdir, "sft")
    assert not (workdir / "sft").exists()


def test_an_interrupted_deletion_can_be_repeated(workdir, monkeypatch):
    from etils import epath

    left, remove = [3], type(epath.Path(workdir)).unlink
    monkeypatch.setattr(type(epath.Path(workdir)), "unlink", lambda path: killed(left, lambda: remove(path)))
    with pytest.raises(KeyboardInterrupt):
        delete(workdir, "ppo")
    monkeypatch.undo()
    assert (workdir / "ppo" / "manifest.json").exists()
    check_overwrite(workdir, ("ppo",))
    delete(workdir, "ppo")
    assert not (workdir / "ppo").exists()


def killed(left, do):
    left[0] -= 1
    if left[0] < 0:
        raise KeyboardInterrupt
    do()


# ---- models --------------------------------------------------------------------------------------------------------


def flip(file, place=-5):
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


def test_a_model_that_changed_since_its_export_is_refused(workdir):
    config = run_config(config_of(workdir))
    for phase in ("reward", "ppo"):
        assert check_inputs(config, workdir, phase, accept_changes=False) == []
    flip(workdir / "reward" / "model" / "model.safetensors")
    assert check_inputs(config, workdir, "reward", accept_changes=False) == []
    with pytest.raises(WorkdirError, match=r"reward/model.* has changed since the export.*--accept_ch"):
        check_inputs(config, workdir, "ppo", accept_changes=False)
    (said,) = check_inputs(config, workdir, "ppo", accept_changes=True)
    assert "has changed since the export" in said
    (workdir / "sft" / "model" / "tokenizer.json").unlink()
    with pytest.raises(WorkdirError, match=r"tokenizer.json is missing"):
        check_inputs(config, workdir, "reward", accept_changes=False)
    (workdir / "sft" / "manifest.json").unlink()
    with pytest.raises(WorkdirError, match=r"sft/manifest.json does not list this model"):
        check_inputs(config, workdir, "reward", accept_changes=False)


@pytest.mark.parametrize(
    ("field", "spell"),
    [
        ("sft_model_path", lambda folder, here: f"{folder}/"),
        ("reward_model", lambda folder, here: folder.relative_to(here)),
        ("reference", lambda folder, here: folder / ".." / "model"),
        ("critic", lambda folder, here: linked(here / "link", folder)),
        ("reward_model", lambda folder, here: linked(here / "link", folder.parent) / "model"),
    ],
)
def test_a_model_of_a_run_is_checked_whatever_path_leads_to_it(workdir, tmp_path, monkeypatch, spell, field):
    """The phase that starts from the model belongs to another run."""
    monkeypatch.chdir(tmp_path)
    phase = "sft" if field in ("sft_model_path", "reference") else "reward"
    config, name = config_of(workdir), str(spell(workdir / phase / "model", tmp_path))
    if field == "sft_model_path":
        config[field] = name
    else:
        config[field]["path"] = name
    other = tmp_path / "other"
    other.mkdir()
    if field != "sft_model_path":
        config["sft_model_path"] = config["model"]["path"]
    if field != "reward_model":
        config["reward_model"]["path"] = str(shutil.copytree(workdir / "reward" / "model", tmp_path / "plain"))
    assert check_inputs(run_config(config), other, "ppo", accept_changes=False) == []
    (workdir / phase / "model" / "added_tokens.json").write_text("{}")
    with pytest.raises(WorkdirError, match=r"added_tokens.json was added after the export"):
        check_inputs(run_config(config), other, "ppo", accept_changes=False)
    with pytest.raises(WorkdirError, match=r"added_tokens.json was added after the export"):
        check_run(run_config(for_eight_devices(config)), other, overwrite=False)


def for_eight_devices(config):
    """The config of the PPO phase for the eight devices of these tests; the run itself had one device."""
    return config | {"phases": ["ppo"], "data": config["data"] | {"ppo_batch_size": 16}}


def linked(link, target):
    link.symlink_to(target)
    return link


def test_a_model_that_the_phase_does_not_read_is_not_checked(workdir, tmp_path):
    config = config_of(workdir)
    flip(workdir / "sft" / "model" / "model.safetensors")
    config["sft_model_path"] = config["model"]["path"]
    assert check_inputs(run_config(config), workdir, "reward", accept_changes=False) == []


# ---- settings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [None, "", "{}", "null", "[]", "{", '{"model": {}}', b"\xff", "[" * 5000])
def test_settings_are_compared_with_a_checkpoint_if_the_config_is_lost(workdir, content):
    config, file = config_of(workdir), workdir / "config.json"

    def lose():
        file.unlink(missing_ok=True)
        if content is not None:
            file.write_bytes(content if isinstance(content, bytes) else content.encode())

    lose()
    (said,) = open_workdir(workdir, config, ("ppo",), overwrite=False)
    assert "config.json was lost" in said
    assert "compared with those in ppo's checkpoint of step 3" in said
    assert config_of(workdir) == config  # written again
    lose()
    other = config | {"seed": 77}
    with pytest.raises(WorkdirError, match=r"config.seed was 4 and is 77.*config.json was lost"):
        open_workdir(workdir, other, ("ppo",), overwrite=False)
    for phase in ("sft", "reward", "ppo"):
        shutil.rmtree(workdir / phase / "checkpoints")
    with pytest.raises(WorkdirError, match="no checkpoint has the settings of this run") as error:
        open_workdir(workdir, config, ("ppo",), overwrite=False)
    assert "overwrite" not in str(error.value)
    (said,) = open_workdir(workdir, other, ("ppo",), overwrite=False, accept_changes=True)
    assert "the given settings are used" in said


@pytest.mark.parametrize("content", [None, "null", "[]", "{}", '{"finished": "no"}', "{", b"\xff", "folder"])
def test_an_invalid_summary_does_not_mark_a_phase_as_finished(workdir, content):
    file = workdir / "sft" / "summary.json"
    file.unlink()
    if content == "folder":
        file.mkdir()
    elif content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert status(workdir, "sft") == "interrupted"


# ---- verify --------------------------------------------------------------------------------------------------------


def looked_at(workdir):
    return dict(verify.verify(workdir))


def test_verify_checks_everything_that_a_run_wrote(workdir, capsys):
    found = looked_at(workdir)
    expected = {"config.json", "ppo/critic", "ppo/model_ema", "ppo/checkpoints/3"}
    for phase in ("sft", "reward", "ppo"):
        expected |= {f"{phase}/{name}" for name in ("manifest.json", "summary.json", "metrics.jsonl", "model")}
    assert expected <= found.keys()
    assert set(found.values()) == {""}
    assert verify.main(["verify", str(workdir)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("whole  ") == len(found)
    assert f"{len(found)} of {len(found)} are whole." in printed


@pytest.mark.parametrize(
    ("name", "harm", "said"),
    [
        ("ppo/critic", lambda folder: flip(folder / "model.safetensors"), "has changed"),
        ("sft/model", lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
        ("reward/metrics.jsonl", lambda file: file.write_bytes(file.read_bytes()[:-4]), "is not a whole JSON object"),
        ("sft/metrics.jsonl", lambda file: file.write_bytes(file.read_bytes()[:-1]), "is not a whole JSON object"),
        ("ppo/samples.jsonl", lambda file: file.write_bytes(b"[1]\n"), "line 1 is not"),
        ("sft/summary.json", lambda file: file.write_text("null"), "it must be a JSON object"),
        ("config.json", lambda file: file.unlink(), "No such file"),
        ("ppo/manifest.json", lambda file: file.write_text("{"), "not JSON"),
        ("ppo/manifest.json", lambda file: file.write_text("{}"), "was not written by this program"),
        ("ppo/manifest.json", lambda file: file.unlink(), "it is missing"),
        ("sft/model", lambda folder: shutil.rmtree(folder), "is missing"),
        ("sft/model", lambda folder: unlisted(folder), "does not list this model"),
        ("ppo/critic", lambda folder: unlisted(folder), "does not list this model"),
        ("sft/model", lambda folder: (unlisted(folder), shutil.rmtree(folder)), "does not list this model"),
    ],
)
def test_verify_names_the_damaged_file(workdir, capsys, name, harm, said):
    harm(workdir / name)
    assert verify.main(["verify", str(workdir)]) == 1
    damaged = [line for line in capsys.readouterr().out.splitlines() if line.startswith("DAMAGED")]
    assert len(damaged) == 1
    assert name in damaged[0]
    assert said in damaged[0]


def unlisted(folder):
    manifest = folder.parent / "manifest.json"
    content = json.loads(manifest.read_text())
    del content["models"][folder.name]
    manifest.write_text(json.dumps(content))


def test_verify_accepts_that_an_active_run_deletes_checkpoints(workdir, monkeypatch, capsys):
    """The run deletes old checkpoints while `verify` reads them."""
    (checkpoint,) = sorted((workdir / "sft" / "checkpoints").iterdir())[-1:]

    def checkpoint_damage(folder):
        if str(folder) == str(checkpoint):
            shutil.rmtree(checkpoint)
        return verify_one(folder)

    verify_one = verify.checkpoint_damage
    monkeypatch.setattr(verify, "checkpoint_damage", checkpoint_damage)
    with lock_workdir(workdir):
        assert verify.main(["verify", str(workdir)]) == 0
    assert "a run is active in this workdir" in capsys.readouterr().out
    assert verify.main(["verify", str(workdir)]) == 0
    assert "a run is active in this workdir" not in capsys.readouterr().out


def test_verify_detects_damaged_files_of_a_checkpoint(workdir):
    """The files are changed one by one. Some of them matter to no array, so only the important ones are asserted."""
    checkpoint = workdir / "reward" / "checkpoints"
    (checkpoint,) = sorted(checkpoint.iterdir())[-1:]
    seen = {}
    for file in sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.stat().st_size):
        before = file.read_bytes()
        flip(file, len(before) // 2)
        seen[str(file.relative_to(checkpoint))] = verify.checkpoint_damage(checkpoint)
        file.write_bytes(before)
    assert seen["notes/metadata"]
    assert seen["state/manifest.ocdbt"]
    data = {name: wrong for name, wrong in seen.items() if "/d/" in name}
    largest = max(data, key=lambda name: (checkpoint / name).stat().st_size)
    assert data[largest]
    assert verify.checkpoint_damage(checkpoint) == ""


def test_verify_refuses_a_folder_that_is_not_a_workdir(tmp_path, capsys):
    assert verify.main(["verify", str(tmp_path)]) == 2
    assert "is not the workdir of a run" in capsys.readouterr().err
    assert verify.main(["verify"]) == 2


def test_a_summary_has_the_time_that_was_not_spent_on_training(workdir):
    for phase in ("sft", "reward", "ppo"):
        summary = json.loads((workdir / phase / "summary.json").read_text())
        assert summary["starts"] == 1
        assert summary["seconds_compiling"] > 0 < summary["seconds_saving"]
        assert summary["seconds_restoring"] == summary["seconds_repeated"] == 0


def test_a_json_file_is_synced_and_renamed_and_its_folder_synced(tmp_path, monkeypatch):
    """The order is: sync the content, rename the file, sync the folder."""
    happened, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: happened.append(read_link(handle)) or fsync(handle))
    monkeypatch.setattr(os, "replace", lambda *names: happened.append("replaced") or replace(*names))
    write_json(tmp_path / "x.json", {"a": 1})
    assert happened == [str(tmp_path / "x.json.partial"), "replaced", str(tmp_path)]
    assert (tmp_path / "x.json").read_text() == '{\n  "a": 1\n}\n'


def read_link(handle):
    return os.readlink(f"/proc/self/fd/{handle}")


def test_an_exported_model_matches_its_digests(workdir):
    check_model(workdir / "ppo" / "model")
