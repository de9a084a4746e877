"""Preflight raises errors that would occur later in a run, and says what to change."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from jax_rlhf import CheckpointError, Pretrained, load_pretrained, save_pretrained
from jax_rlhf.cli import phases
from jax_rlhf.cli.open_workdir import forget_failed_start, forget_overwritten, open_workdir, overwritten
from jax_rlhf.cli.phases import run_phase
from jax_rlhf.cli.preflight import check_run
from jax_rlhf.config import run_config
from jax_rlhf.hub import config_from_hub, locate as place
from jax_rlhf.io.printable import printable, printable_lines
from jax_rlhf.models import Decoder, init_params
from jax_rlhf.runtime.checkpoint import Checkpoints
from jax_rlhf.runtime.config import CheckpointConfig, LogConfig
from jax_rlhf.runtime.manifest import begin_manifest
from jax_rlhf.runtime.run_logger import RunLogger
from jax_rlhf.runtime.workdir import lock_workdir, status
from tests.cli import tiny
from tests.data import tiny as data
from tests.processes import ROOT


@pytest.fixture
def config(tmp_path):
    config = tiny.config(tmp_path)
    config.data.sft_batch_size = config.data.reward_batch_size = config.data.ppo_batch_size = 16
    config.data.max_tokens = 20
    return config


def check(config, tmp_path):
    check_run(run_config(config), tmp_path / "run", overwrite=False)


def test_a_good_config_passes(config, tmp_path):
    check(config, tmp_path)


def set_field(config, path, value):
    *sections, name = path.split(".")
    for section in sections:
        config = config[section]
    config[name] = value


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.path": "/nowhere"}, "/nowhere: no such file or folder"),
        ({"model.trainable_layers": 9}, "config.model.trainable_layers=9 must lie between 1 and the model's 3 layers"),
        ({"reward.num_layers": 5}, "config.reward.num_layers=5 must lie"),
        ({"reward.trainable_layers": 3}, "must lie between 1 and the model's 2 layers"),
        (
            {"critic.trainable_layers": 3},
            "config.critic.trainable_layers=3 must lie between 1 and the model's 2 layers",
        ),
        ({"ppo.microbatch_size": 5}, r"config.ppo.microbatch_size=5 does not divide a minibatch of 8 rows"),
        ({"reward.loss": "token", "reward.compare": "all"}, 'compare="all" is for loss="bradley'),
        ({"ppo.actor.optimizer.schedule": "linear", "ppo.actor.optimizer.warmup_steps": 12}, "config.ppo.actor.optim"),
        ({"phases": ("ppo",)}, r"sft/model is missing: run the sft phase first \(--config.phases=sft,ppo does both\)"),
        ({"phases": ("sft", "ppo")}, "reward/model is missing: run the reward phase first"),
        ({"sft.microbatch_size": 5}, r"config.sft.microbatch_size=5 does not divide a batch of 16 rows.*8, 16"),
        (
            {"data.ppo_batch_size": 12},
            r"config.data.ppo_batch_size=12 cannot be cut evenly .* 2 minibatches × 8 row shards = 16 rows",
        ),
        ({"data.ppo_batch_size": 160}, "the ppo phase has 90 rows, fewer than a batch of 160"),
        ({"data.paths": ("gone.jsonl",)}, "'gone.jsonl' is neither an existing file or folder"),
        (
            {"ppo.reward.functions": ("tests.cli.tiny:nobody",)},
            r"^config.ppo.reward.functions='tests.cli.tiny:nobody' cannot be imported: .* on PYTHONPATH\? ",
        ),
        (
            {"ppo.eval_functions": ("/nowhere/judges.py:good",)},
            r"^config.ppo.eval_functions='/nowhere/judges.py:good' cannot be imported: there is no file [^?]*$",
        ),
        ({"sft.microbatch_size": 0}, "config.sft.microbatch_size=0 must be 1 or more"),
        (
            {"data.sft_batch_size": 12},
            "config.data.sft_batch_size=12 cannot be cut evenly into the mesh's 8 row shards",
        ),
        ({"data.reward_batch_size": 12}, "config.data.reward_batch_size=12 cannot be cut evenly"),
        ({"data.weights": (1.0, 2.0)}, "^config.data: there are 2 weights for 1 paths"),
        ({"ppo.sampling.temperature": 0.0}, "^config.ppo.sampling.temperature=0.0 must be above 0"),
        (
            {"reward.compare": "all", "reward.microbatch_size": 8},
            r'config.reward.compare="all" .* leave config.reward.microbatch_size unset',
        ),
        ({"mesh.data": 3}, "data=3 × fsdp=-1 × tensor=1 is not the 8 devices that are available"),
        ({"ppo.loss.clip_range": -1.0}, "clip_range=-1.0 must be 0 or more"),
        ({"ppo.critic.warmup_iterations": 3}, "critic.warmup_iterations=3 leaves the actor none of .*iterations=3"),
        (
            {"critic.revision": "main"},
            r"config.critic.revision='main' has no effect without a hub id; set config.critic.path too",
        ),
    ],
)
def test_wrong_settings_are_errors_at_the_start(config, tmp_path, changes, message):
    for path, value in changes.items():
        set_field(config, path, value)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        check(config, tmp_path)


def test_the_ptx_batch_size_must_be_a_multiple_of_the_microbatch_count(config, tmp_path):
    config.phases, config.sft_model_path, config.reward_model.path = ("ppo",), config.model.path, None
    config.reward_model.path = tiny.checkpoint(tmp_path / "reward", head="scalar")
    config.ppo.loss.ptx_coef, config.data.sft_batch_size = 1.0, 15
    with pytest.raises(ValueError, match=r"sft_batch_size=15 texts .* cannot be spread over the 2 microbatches"):
        check(config, tmp_path)


def test_overwrite_cannot_delete_a_model_that_is_still_needed(config, tmp_path):
    workdir = tmp_path / "run"
    config.sft_model_path, config.phases = str(workdir / "sft" / "model"), ("sft",)
    with pytest.raises(ValueError, match=r"config.sft_model_path=.* is in .*run/sft, which --overwrite deletes"):
        check_run(run_config(config), workdir, overwrite=True)
    config.sft_model_path = None
    check_run(run_config(config), workdir, overwrite=True)
    (workdir / "reward" / "model").mkdir(parents=True)
    with pytest.raises(
        ValueError, match=r"run/reward was trained from a model .* --config.phases=sft,reward repeats it too"
    ):
        check_run(run_config(config), workdir, overwrite=True)


def test_a_reward_model_with_another_vocabulary_is_refused(config, tmp_path):
    config.reward_model.path = tiny.checkpoint(tmp_path / "small", vocabulary=20, head="scalar")
    with pytest.raises(ValueError, match=r"config.reward_model.path=.* has another vocabulary than config.model.path"):
        check(config, tmp_path)


@pytest.mark.parametrize(
    ("field", "phases", "message"),
    [
        ("reward_model.path", ("ppo",), "config.reward_model.path=.* is a language model: it has no scalar head"),
        ("reward_model.path", ("sft", "reward", "ppo"), "config.reward_model.path=.* is a language model"),
        ("sft_model_path", ("ppo",), "is a reward model or a critic"),
        ("reference.path", ("sft", "reward", "ppo"), "is a reward model or a critic"),
        ("model.path", ("sft",), "is a reward model or a critic"),
    ],
)
def test_a_checkpoint_with_the_wrong_head_is_an_error_at_the_start(config, tmp_path, field, phases, message):
    head = "lm" if field == "reward_model.path" else "scalar"
    config.phases, config.sft_model_path = phases, config.model.path
    config.ppo.reward.functions = ("tests.cli.tiny:count_a",)
    set_field(config, field, tiny.checkpoint(tmp_path / "other", head=head, tied=False))
    with pytest.raises((ValueError, CheckpointError), match=message):
        check(config, tmp_path)


def test_an_sft_model_without_a_tokenizer_is_an_error_at_the_start(config, tmp_path):
    config.phases, config.sft_model_path = ("ppo",), tiny.checkpoint(tmp_path / "sft")
    config.ppo.reward.functions = ("tests.cli.tiny:count_a",)
    check(config, tmp_path)
    for file in Path(config.sft_model_path).glob("*token*"):
        file.unlink()
    with pytest.raises(ValueError, match=r"config.sft_model_path=.*/sft has no tokenizer; add its files"):
        check(config, tmp_path)


def test_the_reward_phase_loads_the_sft_model_at_its_own_revision(config, tmp_path):
    config.model.revision, config.sft_model_path = "v1", "org/sft"
    loaded = phases._reward(run_config(config), tmp_path).keywords["model"]
    assert (loaded.path, loaded.revision) == ("org/sft", "v1")
    config.reward.start_from, config.reward.start_revision = "org/other", "v2"
    loaded = phases._reward(run_config(config), tmp_path).keywords["model"]
    assert (loaded.path, loaded.revision) == ("org/other", "v2")
    config.reward.start_from = None
    with pytest.raises(ValueError, match=r"config.reward.start_revision=v2 is set without config.reward.start_from"):
        run_config(config)


@pytest.mark.parametrize("tied", [True, False])
def test_a_reward_model_is_trained_further_with_its_own_head(config, tmp_path, capsys, tied):
    """Its bias is kept if the scores are not normalised again."""
    config.reward.start_from = tiny.checkpoint(tmp_path / "reward", head="scalar", tied=tied, reward_bias=0.5)
    config.reward.num_layers, config.reward.normalize_rows = None, 0
    config.reward.optimizer.learning_rate, config.phases = 0.0, ("reward",)
    check(config, tmp_path)
    run_phase("reward", run_config(config), tmp_path / "run")
    assert "it is a reward model already: training continues with its own scalar head" in capsys.readouterr().out
    before = load_pretrained(config.reward.start_from, head="scalar")
    after = load_pretrained(tmp_path / "run" / "reward" / "model", head="scalar")
    assert after.reward_bias == 0.5
    np.testing.assert_array_equal(after.params["scalar_head"]["kernel"], before.params["scalar_head"]["kernel"])


def test_sft_samples_fit_the_position_embeddings(config, tmp_path):
    """Prompts of 5 tokens leave room for one sampled token in a model with 6 position embeddings."""
    config.model.path, config.phases = learned_positions(tmp_path / "gpt2", 6), ("sft",)
    config.data.max_tokens, config.data.max_prompt_tokens, config.data.too_long = 6, 5, "truncate"
    config.data.length_buckets, config.sft.sample_tokens, config.sft.sample_rows, config.sft.steps = (), 64, 4, 1
    rows = [{"prompt": f"a b {text}", "completion": "c"} for text in data.letters(40)]
    config.data.paths = (data.write(tmp_path / "long.jsonl", rows),)
    check(config, tmp_path)
    run_phase("sft", run_config(config), tmp_path / "run")
    samples = [json.loads(line) for line in (tmp_path / "run" / "sft" / "samples.jsonl").read_text().splitlines()]
    assert [row["length"] for row in samples] == [1] * 4
    assert status(tmp_path / "run", "sft") == "finished"


def test_a_reward_model_may_know_extra_tokens_but_must_know_the_policys(config, tmp_path):
    longer = data.tokenizer()
    longer.add_tokens(["<new>"])
    config.phases, config.sft_model_path = ("ppo",), config.model.path
    config.reward_model.path = tiny.checkpoint(tmp_path / "reward", head="scalar", tokenizer=longer)
    check(config, tmp_path)
    config.model.path = config.sft_model_path = tiny.checkpoint(tmp_path / "policy", tokenizer=longer)
    config.reward_model.path = tiny.checkpoint(tmp_path / "other", head="scalar", vocabulary=len(longer))
    with pytest.raises(ValueError, match=r"another vocabulary .*1 of 32 tokens differ, first '<new>': 31 here, not in"):
        check(config, tmp_path)


def test_an_eos_id_beyond_the_embedding_is_an_error(config, tmp_path):
    config.ppo.sampling.eos_ids = (data.EOS, 77)
    with pytest.raises(ValueError, match=r"the id 77 ends a response .* has 31 rows"):
        check(config, tmp_path)


def learned_positions(folder, positions, head="lm"):
    """Saves a GPT-2 with this number of position embeddings. Returns its folder."""
    shape = {"model_type": "gpt2", "vocab_size": len(data.WORDS), "n_embd": 16, "n_layer": 3, "n_head": 2}
    model = Decoder(config_from_hub(shape | {"n_positions": positions, "eos_token_id": data.EOS}), head=head)
    save_pretrained(folder, Pretrained(model, init_params(model, jax.random.key(0)), data.tokenizer()))
    return str(folder)


@pytest.mark.parametrize(
    ("phase", "changes", "message"),
    [
        ("sft", {"data.max_tokens": 13}, "config.data.max_tokens=13 tokens is more than the 12 positions .* the sft"),
        ("reward", {"data.max_tokens": 13}, "config.data.max_tokens=13 tokens .* the reward phase needs shorter rows"),
        (
            "ppo",
            {"ppo.sampling.max_new_tokens": 9},
            r"max_prompt_tokens \+ config.ppo.sampling.max_new_tokens=13 tokens .* the ppo",
        ),
        (
            "reward",
            {"ppo.sampling.max_new_tokens": 9},
            r"config.ppo.sampling.max_new_tokens=13 tokens .* config.model.path; the ppo",
        ),
        ("ppo", {"ppo.sampling.max_new_tokens": 8}, None),
    ],
)
def test_rows_longer_than_the_position_embeddings_are_an_error(config, tmp_path, phase, changes, message):
    config.model.path = config.sft_model_path = learned_positions(tmp_path / "gpt2", 12)
    config.reward_model.path, config.data.max_tokens, config.phases = config.model.path, 12, (phase,)
    if phase == "ppo":
        config.reward_model.path = learned_positions(tmp_path / "reward", 12, "scalar")
    for path, value in changes.items():
        set_field(config, path, value)
    if message is None:
        check(config, tmp_path)
        return
    with pytest.raises(ValueError, match=message):
        check(config, tmp_path)


def test_a_reward_model_with_too_few_position_embeddings_is_refused(config, tmp_path):
    config.reward_model.path, config.data.max_tokens = learned_positions(tmp_path / "gpt2", 9, "scalar"), 9
    with pytest.raises(ValueError, match=r"10 tokens is more than the 9 positions of config.reward_model.path"):
        check(config, tmp_path)


@pytest.mark.parametrize("phase", ["sft", "reward", "ppo"])
def test_a_token_id_beyond_the_embedding_is_an_error_at_the_start(config, tmp_path, phase):
    """The message names the file and the line. No weights are read before this check."""
    known = len(data.WORDS) - 1  # "z" has no embedding
    config.model.path = config.sft_model_path = tiny.checkpoint(tmp_path / "small", vocabulary=known)
    config.phases, config.ppo.reward.functions = (phase,), ("tests.cli.tiny:count_a",)
    config.reward.normalize_rows = 0
    rows = [json.loads(line) for line in Path(config.data.paths[0]).read_text().splitlines()]
    rows = [row for row in rows if "z" not in row["prompt"]]
    config.data.paths = (data.write(tmp_path / "good.jsonl", rows),)
    check(config, tmp_path)
    rows[41]["prompt"] = "a z b"
    config.data.paths = (data.write(tmp_path / "bad.jsonl", rows),)
    (tmp_path / "small" / "model.safetensors").unlink()
    with pytest.raises(
        ValueError, match=rf"bad.jsonl, line 42: token 'z' has the id {known}, .* has only {known} rows"
    ):
        check(config, tmp_path)


def test_a_pad_token_id_beyond_the_embedding_is_an_error(config, tmp_path):
    config.model.path = tiny.checkpoint(tmp_path / "small", vocabulary=len(data.WORDS) - 1)
    config.data.pad_token = "z"
    with pytest.raises(ValueError, match=r"the pad token 'z' has the id 30, .*--config.data.pad_token='<eos>'"):
        check(config, tmp_path)


@pytest.mark.parametrize("phase", ["sft", "reward", "ppo"])
def test_missing_columns_are_an_error_at_the_start(config, tmp_path, phase):
    config.phases, config.sft_model_path = (phase,), config.model.path
    config.reward_model.path = tiny.checkpoint(tmp_path / "reward", head="scalar")
    config.data.paths = (data.write(tmp_path / "x.jsonl", [{"question": "a", "answer": "b"}] * 40),)
    with pytest.raises(ValueError, match=rf"x.jsonl, line 1: the {phase} phase needs .* has answer, question"):
        check(config, tmp_path)


def test_hub_weights_are_downloaded_after_all_other_checks(config, tmp_path, monkeypatch):
    asked = []

    def download(name, revision, allow_patterns):
        asked.append(any(pattern.endswith("safetensors") for pattern in allow_patterns))
        return tmp_path / "base"

    monkeypatch.setattr(place, "snapshot_download", download)
    config.model.path, config.phases = "org/base", ("sft",)
    check(config, tmp_path)
    assert asked == [False] * (len(asked) - 1) + [True]
    asked.clear()
    config.data.paths = (data.write(tmp_path / "x.jsonl", [{"question": "a"}] * 40),)
    with pytest.raises(ValueError, match="the sft phase needs"):
        check(config, tmp_path)
    assert asked
    assert not any(asked)


def test_ptx_paths_need_a_ptx_coefficient_and_the_columns_of_sft(config, tmp_path):
    config.phases, config.sft_model_path = ("ppo",), config.model.path
    config.ppo.reward.functions = ("tests.cli.tiny:count_a",)
    config.data.ptx_paths = (data.write(tmp_path / "texts.jsonl", [{"text": text} for text in data.letters(40)]),)
    with pytest.raises(ValueError, match=r"ptx_paths is set, but unused with config.ppo.loss.ptx_coef=0"):
        check(config, tmp_path)
    config.ppo.loss.ptx_coef = 1.0
    check(config, tmp_path)
    data.write(tmp_path / "texts.jsonl", [{"words": text} for text in data.letters(40)])
    with pytest.raises(ValueError, match=r"texts.jsonl, line 1: the sft phase needs .* has words"):
        check(config, tmp_path)


def test_a_failed_start_leaves_no_config_unless_there_is_a_checkpoint(config, tmp_path):
    workdir = tmp_path / "run"
    open_workdir(workdir, config, ("sft",), overwrite=False)
    forget_failed_start(workdir)
    assert not (workdir / "config.json").exists()
    open_workdir(workdir, config, ("sft",), overwrite=False)
    (workdir / "sft" / "checkpoints" / "3").mkdir(parents=True)
    forget_failed_start(workdir)
    assert (workdir / "config.json").exists()


FORKS = """
import os, sys, time
from pathlib import Path
from jax_rlhf.runtime.workdir import lock_workdir
lock = lock_workdir(Path(sys.argv[1]))
if os.fork() == 0:
    os.close(1)
    os.close(2)
    time.sleep(30)
"""


def test_a_forked_child_does_not_keep_the_lock_of_the_workdir(tmp_path):
    """A reward function may fork a worker that outlives the run."""
    subprocess.run([sys.executable, "-c", FORKS, str(tmp_path)], cwd=ROOT, check=True, timeout=25, capture_output=True)
    assert lock_workdir(tmp_path).is_locked


def test_a_wrong_row_of_a_later_phase_is_an_error_at_the_start(config, tmp_path):
    rows = [json.loads(line) for line in Path(config.data.paths[0]).read_text().splitlines()]
    rows[41]["rejected"] = rows[41]["chosen"]  # an error in the reward phase, but not in SFT
    config.data.paths = (data.write(tmp_path / "broken.jsonl", rows),)
    with pytest.raises(ValueError, match=r"broken.jsonl, line 42: chosen and rejected are the same"):
        check(config, tmp_path)


def finished(workdir, phase):
    (workdir / phase).mkdir(parents=True, exist_ok=True)
    begin_manifest(workdir / phase)
    (workdir / phase / "summary.json").write_text('{"finished": true}')


def test_a_workdir_belongs_to_one_config(config, tmp_path):
    workdir = tmp_path / "run"
    config.data.max_tokens = 19
    assert open_workdir(workdir, config, ("sft",), overwrite=False) == []
    config.data.max_tokens = 20  # no phase has written anything yet
    assert open_workdir(workdir, config, ("sft",), overwrite=False) == []
    finished(workdir, "sft")
    config.phases, config.log.table_rows, config.checkpoint.every = ("ppo",), 1, 5  # these fields may differ
    assert open_workdir(workdir, config, ("sft",), overwrite=False) == []
    config.data.max_tokens = 21
    with pytest.raises(ValueError, match=r"config.data.max_tokens was 20 and is 21.*--accept_changes"):
        open_workdir(workdir, config, ("sft",), overwrite=False)
    said = open_workdir(workdir, config, ("sft",), overwrite=False, accept_changes=True)
    assert said == ["config.data.max_tokens was 20 and is 21"]
    config.data.max_tokens = 22
    open_workdir(workdir, config, ("sft",), overwrite=True)
    assert json.loads((workdir / "config.json").read_text())["data"]["max_tokens"] == 22


@pytest.mark.parametrize(
    ("field", "value", "refused"),
    [
        ("ppo.kl.coef", 0.3, False),  # a phase that is not finished may continue with other settings
        ("ppo.actor.optimizer.learning_rate", 1e-6, False),
        ("mesh.fsdp", 2, False),
        ("model.remat", "full", False),
        ("data.prefetch", 7, False),
        ("sft.optimizer.learning_rate", 1.0, True),  # a finished phase was trained with the former setting
        ("model.path", "/elsewhere", True),
        ("model.trainable_layers", 1, True),
        ("data.paths", ("others.jsonl",), True),
        ("seed", 5, True),
        ("ppo.seed", 5, True),
        ("reward_model.path", "/elsewhere", True),
    ],
)
def test_only_settings_of_unfinished_phases_and_hardware_may_change(config, tmp_path, field, value, refused):
    workdir = tmp_path / "run"
    open_workdir(workdir, config, ("sft", "ppo"), overwrite=False)
    finished(workdir, "sft")
    (workdir / "ppo" / "checkpoints" / "3").mkdir(parents=True)
    assert [status(workdir, phase) for phase in ("sft", "reward", "ppo")] == ["finished", "new", "interrupted"]
    before = (workdir / "config.json").read_text()
    set_field(config, field, value)
    if refused:
        with pytest.raises(ValueError, match=rf"other settings: .*config.{field} was .* and is .*--accept_changes"):
            open_workdir(workdir, config, ("sft", "ppo"), overwrite=False)
        assert (workdir / "config.json").read_text() == before
    else:
        (line,) = open_workdir(workdir, config, ("sft", "ppo"), overwrite=False)
        assert line.startswith(f"config.{field} was ")


def test_a_workdir_with_fields_of_an_earlier_version_is_refused(config, tmp_path):
    workdir = tmp_path / "run"
    open_workdir(workdir, config, ("sft",), overwrite=False)
    finished(workdir, "sft")
    now = json.loads((workdir / "config.json").read_text())
    assert open_workdir(workdir, config, ("sft",), overwrite=False) == []
    now["ppo"]["kl_coef"] = now["ppo"].pop("kl")["coef"]
    (workdir / "config.json").write_text(json.dumps(now))
    with pytest.raises(ValueError, match=r"an earlier version .* config\.ppo\.kl\.coef was config\.ppo\.kl_coef"):
        open_workdir(workdir, config, ("sft",), overwrite=False)
    assert json.loads((workdir / "config.json").read_text()) == now
    (line,) = open_workdir(workdir, config, ("sft",), overwrite=False, accept_changes=True)
    assert "the given settings are used" in line


def test_a_checkpoint_with_fields_of_an_earlier_version_is_refused_if_config_json_is_lost(config, tmp_path):
    workdir = tmp_path / "run"
    open_workdir(workdir, config, ("sft",), overwrite=False)
    settings = json.loads((workdir / "config.json").read_text())
    settings["ppo"]["kl_coef"] = settings["ppo"].pop("kl")["coef"]
    checkpoints = Checkpoints(workdir / "sft" / "checkpoints", CheckpointConfig())
    checkpoints.save(1, {"weights": jax.numpy.ones(2)}, {"config": settings})
    checkpoints.close()
    (workdir / "config.json").unlink()
    with pytest.raises(
        ValueError, match=r"checkpoints/1 is of an earlier version .*config\.ppo\.kl\.coef was config\.ppo"
    ):
        open_workdir(workdir, config, ("sft",), overwrite=False)


def test_a_run_that_is_stopped_and_restarted_does_not_overwrite_again(config, tmp_path):
    """--overwrite takes effect again if the config differs, or if the run has ended."""
    workdir = tmp_path / "run"
    open_workdir(workdir, config, ("sft",), overwrite=False)
    assert not overwritten(workdir, config)
    open_workdir(workdir, config, ("sft",), overwrite=True)
    assert overwritten(workdir, config)
    other = config.copy_and_resolve_references()
    other.sft.steps = 77
    assert not overwritten(workdir, other)
    forget_overwritten(workdir)
    assert not overwritten(workdir, config)
    forget_overwritten(workdir)


def test_a_model_without_a_checkpoint_is_not_overwritten_silently(config, tmp_path):
    (tmp_path / "run" / "sft" / "model").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"did not finish, without a checkpoint. --overwrite --config.phases=sft,"):
        check(config, tmp_path)


def test_weights_and_biases_must_be_installed(tmp_path):
    with pytest.raises(ValueError, match="pip install wandb"):
        RunLogger(tmp_path, LogConfig(wandb_project="x"))


def test_control_characters_do_not_reach_the_terminal():
    assert printable("a\x1b[31mb\nc" + "d" * 300, 12) == "a [31mb cdd…"
    assert printable_lines("a\x1b[31m\n\tb\u202e" + "c" * 300) == "a [31m\n    b " + "c" * 300
