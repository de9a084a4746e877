"""A stopped phase ends with the results of an uninterrupted one: bit for bit, on another mesh up to rounding."""

import functools
import json
import shutil

import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath
from safetensors.numpy import load_file

from jax_rlhf.cli.open_workdir import open_workdir
from jax_rlhf.cli.phases import run_phase
from jax_rlhf.config import run_config
from jax_rlhf.hub import CheckpointError
from jax_rlhf.runtime.checkpoint import Checkpoints
from jax_rlhf.runtime.config import CheckpointConfig
from jax_rlhf.runtime.preemption import Stopped, StopSignals
from jax_rlhf.runtime.remote import download, upload
from jax_rlhf.runtime.workdir import status
from tests.cli import tiny

PHASES = {name: functools.partial(run_phase, name) for name in ("sft", "reward", "ppo")}
TIMES = ("time", "second", "eps")


class StopAt(StopSignals):
    """Asks the run to stop at the n-th point where it can stop."""

    def __init__(self, point):
        super().__init__()
        self.left = point

    def on_any_process(self, *others):
        self.left -= 1
        self.reason = "SIGTERM" if self.left <= 0 else None
        return (self.left <= 0, *others)


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """For eight devices: evaluations, several epochs and minibatches, adaptive KL, EMA, PPO-ptx, frozen layers."""
    folder = tmp_path_factory.mktemp("resume")
    config = tiny.config(folder)
    config.model.trainable_layers = 2
    config.mesh.data = config.mesh.fsdp = config.mesh.tensor = 2
    config.sft.steps = config.reward.steps = 6
    config.sft.eval_every = config.reward.eval_every = 2
    config.sft.optimizer.schedule, config.reward.optimizer.warmup_steps = "cosine", 3
    config.ppo.iterations, config.ppo.eval_every = 4, 2
    config.ppo.kl.target, config.ppo.kl.horizon, config.ppo.actor.ema_decay, config.ppo.loss.ptx_coef = (
        0.5,
        100.0,
        0.9,
        0.5,
    )
    config.ppo.loss.entropy_coef, config.ppo.loss.entropy_target, config.ppo.microbatch_size = 0.01, 1.0, 4
    config.ppo.actor.optimizer.first_moment_dtype = "bfloat16"
    config.checkpoint.every = 2
    return config


def lines(file):
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return [{k: v for k, v in row.items() if not any(word in k for word in TIMES)} for row in rows]


def results(folder):
    """A phase's results without times: lines of its files, tensors of its models, arrays of its checkpoint."""
    found = {name: lines(folder / f"{name}.jsonl") for name in ("metrics", "samples")}
    summary = json.loads((folder / "summary.json").read_text())
    found["summary"] = {k: value for k, value in summary.items() if not k.startswith(("seconds", "starts"))}
    for file in folder.glob("*/*.safetensors"):
        found |= {f"{file.parent.name} {name}": tensor for name, tensor in load_file(file).items()}
    checkpoints = Checkpoints(folder / "checkpoints", CheckpointConfig(keep=9))
    notes = json.loads((folder / "checkpoints" / str(checkpoints.steps[-1]) / "notes" / "metadata").read_text())
    checkpoints.close()
    return found | {"arrays": notes["arrays"]}  # with their checksums


@pytest.fixture(scope="module")
def straight(settings, tmp_path_factory):
    """The workdir of a run of all phases that was never stopped."""
    workdir = tmp_path_factory.mktemp("straight")
    config = run_config(settings)
    for run in PHASES.values():
        run(config, workdir)
    return workdir


@pytest.fixture(scope="module")
def interrupted(settings, straight, tmp_path_factory):
    """interrupted(phase, workdir): copies to `workdir` a run whose phase was stopped at step 3 or 4."""
    made = {}

    def copied(phase, workdir):
        if phase not in made:
            made[phase] = tmp_path_factory.mktemp(f"interrupted_{phase}")
            former_phases(straight, made[phase], phase)
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("JAX_RLHF_PROGRESS_FILE", str(made[phase] / "told"))
                with pytest.raises(Stopped):
                    PHASES[phase](run_config(settings), made[phase], stop=StopAt(8))
        shutil.copytree(made[phase], workdir, dirs_exist_ok=True)

    return copied


def stopped_at_every_point(run, config, workdir, points):
    """Stops the phase at these points, each counted from the restart before it, and then finishes it."""
    for point in points:
        try:
            run(config, workdir, stop=StopAt(point))
            return
        except Stopped:
            continue
    run(config, workdir)


@pytest.mark.parametrize("phase", PHASES)
def test_a_stopped_phase_continues_bit_for_bit(settings, straight, tmp_path, phase):
    former_phases(straight, tmp_path, phase)
    stopped_at_every_point(PHASES[phase], run_config(settings), tmp_path, [4, 5, 3, 6, 4])
    wanted, got = results(straight / phase), results(tmp_path / phase)
    assert wanted.keys() == got.keys()
    for name, value in wanted.items():
        if isinstance(value, np.ndarray):
            np.testing.assert_array_equal(got[name], value, err_msg=name)
        else:
            assert got[name] == value, name


@pytest.mark.parametrize(
    ("phase", "file", "starts"),
    [("reward", None, 2), ("ppo", {"starts": 5}, 6), ("reward", [1], 2), ("reward", {"starts": "x"}, 2)],
)
def test_the_cost_of_restarts_is_summed_up(
    settings, straight, interrupted, tmp_path, monkeypatch, *, phase, file, starts
):
    """costs.json also counts starts that were killed before they saved anything. An invalid costs.json is ignored."""
    told = tmp_path / "told"
    monkeypatch.setenv("JAX_RLHF_PROGRESS_FILE", str(told))
    interrupted(phase, tmp_path)
    assert told.read_text() == f"{phase} {latest(tmp_path / phase)}\n"  # launch scripts read this file
    costs = tmp_path / phase / "costs.json"
    former = json.loads(costs.read_text())
    if file is not None:
        costs.write_text(json.dumps(former | file if isinstance(file, dict) else file))
    (checkpoint,) = sorted((tmp_path / phase / "checkpoints").iterdir(), key=lambda path: int(path.name))[-1:]
    notes = json.loads((checkpoint / "notes" / "metadata").read_text())["notes"]
    at = notes["position"]["seconds"]
    with (tmp_path / phase / "metrics.jsonl").open("a") as file:  # as if it had continued, and then been killed
        file.write(json.dumps({"step": 99, "seconds": at + 7.5}) + "\n" + '{"step": 100, "sec')
    PHASES[phase](run_config(settings), tmp_path)
    once, twice = (json.loads((where / phase / "summary.json").read_text()) for where in (straight, tmp_path))
    assert (once["starts"], twice["starts"]) == (1, starts)
    assert told.read_text() == f"{phase} {latest(tmp_path / phase)}\n"
    after = json.loads(costs.read_text())
    assert after["starts"] == starts
    assert after["repeated"] == former["repeated"] + 7.5
    assert (once["seconds_repeated"], twice["seconds_repeated"]) == (0, 7.5)
    assert once["seconds_restoring"] == 0 < twice["seconds_restoring"] < 60
    assert 0 < notes["costs"]["saving"] < twice["seconds_saving"] < 60
    assert twice["seconds_compiling"] >= notes["costs"]["compiling"]


def latest(folder):
    return max(int(path.name) for path in (folder / "checkpoints").iterdir())


def former_phases(straight, workdir, phase):
    for former in ("sft", "reward"):
        if former != phase:
            shutil.copytree(straight / former, workdir / former)


def test_a_stopped_phase_continues_on_another_mesh_up_to_rounding(settings, straight, interrupted, tmp_path):
    """The sampled responses are exactly the same."""
    phase = "ppo"
    interrupted(phase, tmp_path)
    other = settings.copy_and_resolve_references()
    other.mesh.data, other.mesh.fsdp, other.mesh.tensor = 1, 4, 2
    PHASES[phase](run_config(other), tmp_path)
    wanted, got = results(straight / phase), results(tmp_path / phase)
    texts = [[row.get("response") or row.get("text") for row in found["samples"]] for found in (wanted, got)]
    assert texts[0] == texts[1]
    for name, value in wanted.items():
        if isinstance(value, np.ndarray):
            np.testing.assert_allclose(got[name], value, rtol=2e-3, atol=2e-4, err_msg=name)
    for one, two in zip(wanted["metrics"], got["metrics"], strict=True):
        assert one.keys() == two.keys()
        for name, number in one.items():
            np.testing.assert_allclose(two[name], number, rtol=5e-3, atol=1e-3, err_msg=name)


def others(folder, straight):
    del straight
    return (tiny.preferences(folder / "others.jsonl", count=90),)


def other_model(folder, straight):
    del straight
    return tiny.checkpoint(folder / "other", seed=5)


def other_reward_model(folder, straight):
    shutil.copytree(straight / "reward" / "model", folder / "other")
    config = json.loads((folder / "other" / "config.json").read_text())
    (folder / "other" / "config.json").write_text(json.dumps(config | {"reward_bias": 0.125}))
    return str(folder / "other")


@pytest.mark.parametrize(
    ("phase", "field", "value", "message"),
    [
        ("sft", "data.paths", others, "the data changed since step 3 of this phase"),
        ("sft", "model.path", other_model, "the frozen parameters of the sft phase changed since"),
        ("sft", "model.trainable_layers", lambda *_: 1, "another model, number of trainable layers, or optimizer"),
        ("sft", "sft.optimizer.first_moment_dtype", lambda *_: "bfloat16", "was .*float32.* and would be .*bfloat16"),
        ("ppo", "reference.path", other_model, "the reference changed since"),
        (
            "ppo",
            "reward_model.path",
            other_reward_model,
            "the reward model, the actor's and the critic's frozen parameters changed since",
        ),
    ],
)
def test_a_change_that_a_phase_cannot_continue_with_is_an_error(
    settings, straight, interrupted, tmp_path, *, phase, field, value, message
):
    interrupted(phase, tmp_path)
    other = settings.copy_and_resolve_references()
    *sections, name = field.split(".")
    target = functools.reduce(lambda config, section: config[section], sections, other)
    with target.unlocked():
        target[name] = value(tmp_path, straight)
    with pytest.raises(CheckpointError, match=message):
        PHASES[phase](run_config(other), tmp_path)
    assert (tmp_path / phase / "checkpoints" / "2").is_dir()
    if field == "data.paths":
        PHASES[phase](run_config(other), tmp_path, accept_changes=True)


def test_a_phase_does_not_continue_with_another_tokenizer(settings, interrupted, tmp_path):
    interrupted("sft", tmp_path)
    other = settings.copy_and_resolve_references()
    other.model.path = str(tmp_path / "renamed")
    shutil.copytree(settings.model.path, other.model.path)
    file = tmp_path / "renamed" / "tokenizer.json"
    file.write_text(file.read_text().replace('"z": ', '"Z": '))
    with pytest.raises(CheckpointError, match="the tokenizer"):
        run_phase("sft", run_config(other), tmp_path)


def test_another_machine_continues_from_a_bucket(settings, straight, tmp_path):
    """PPO stops on one machine and finishes on another, which has only the bucket. A folder serves as the bucket."""
    bucket = epath.Path(tmp_path / "bucket")
    workdir = download(bucket, tmp_path / "first")
    open_workdir(workdir, settings, ("ppo",), overwrite=False)
    former_phases(straight, workdir, "ppo")
    for former in ("sft", "reward"):
        upload(workdir, former, models=True)
    with pytest.raises(Stopped):
        run_phase("ppo", run_config(settings), workdir, stop=StopAt(8))
    shutil.rmtree(workdir)
    workdir = download(bucket, tmp_path / "second")
    assert [status(workdir, phase) for phase in PHASES] == ["finished", "finished", "interrupted"]
    assert open_workdir(workdir, settings, ("ppo",), overwrite=False) == []
    run_phase("ppo", run_config(settings), workdir)
    upload(workdir, "ppo", models=True)
    wanted, got = results(straight / "ppo"), results(tmp_path / "bucket" / "ppo")
    assert wanted.keys() == got.keys()
    for name, value in wanted.items():
        np.testing.assert_array_equal(got[name], value, err_msg=name)


def test_a_phase_continues_with_changed_settings_of_its_own(settings, interrupted, tmp_path):
    interrupted("sft", tmp_path)
    other = settings.copy_and_resolve_references()
    other.sft.optimizer.learning_rate, other.sft.steps = 5e-3, 8
    run_phase("sft", run_config(other), tmp_path)
    rows = [row for row in lines(tmp_path / "sft" / "metrics.jsonl") if "train/lr" in row]
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert rows[-1]["train/lr"] < rows[-2]["train/lr"] < 5e-3
    assert rows[0]["train/lr"] == pytest.approx(1e-2)


def test_the_best_checkpoint_is_saved_even_if_none_is_due(settings, tmp_path):
    """With mode "max" the first evaluation is the best one, so the best checkpoint is not the last."""
    config = settings.copy_and_resolve_references()
    config.checkpoint.every, config.checkpoint.keep = 0, 1
    config.checkpoint.best, config.checkpoint.best_mode = "eval/loss", "max"
    run_phase("sft", run_config(config), tmp_path)
    losses = {row["step"]: row["eval/loss"] for row in lines(tmp_path / "sft" / "metrics.jsonl") if "eval/loss" in row}
    assert max((2, 4, 6), key=losses.__getitem__) == 2
    assert sorted(file.name for file in (tmp_path / "sft" / "checkpoints").iterdir()) == ["2", "6"]


@pytest.mark.parametrize("failures", [1, 9])
def test_a_failed_write_at_a_stop_is_repeated_once_then_an_error(settings, tmp_path, monkeypatch, failures):
    left, finalize = [failures], ocp.PyTreeCheckpointHandler.finalize

    def failing(handler, folder):  # runs in the background
        if folder.parent.name.startswith("3.") and left[0]:
            left[0] -= 1
            raise OSError("no space")
        return finalize(handler, folder)

    monkeypatch.setattr(ocp.PyTreeCheckpointHandler, "finalize", failing)
    config = settings.copy_and_resolve_references()
    config.checkpoint.every = 1
    with pytest.raises(Stopped if failures == 1 else CheckpointError):  # after one failure the write is repeated
        run_phase("sft", run_config(config), tmp_path, stop=StopAt(8))
    assert max(int(f.name) for f in (tmp_path / "sft" / "checkpoints").iterdir() if f.name.isdigit()) == (
        3 if failures == 1 else 2
    )


def test_a_failing_reward_function_loses_no_finished_iteration(settings, straight, tmp_path, monkeypatch):
    """After the function is fixed, the same command repeats the iteration that failed."""
    former_phases(straight, tmp_path, "ppo")
    config = settings.copy_and_resolve_references()
    config.ppo.reward.functions, config.checkpoint.every = ("tests.cli.test_resume:half_a_point",), 0
    config.ppo.reward.retries, config.ppo.iterations = 1, 3
    wanted = tmp_path / "wanted"
    shutil.copytree(tmp_path, wanted, ignore=lambda *_: ["wanted"])
    run_phase("ppo", run_config(config), wanted)
    calls = []

    def broken(prompts, responses, **columns):
        calls.append(1)
        if len(calls) == 1 or len(calls) > 5:  # 3 calls evaluate 2 batches (the first is retried), then 1 per iteration
            raise OSError("the judge is not at home")
        return half_a_point_again(prompts, responses, **columns)

    half_a_point_again = half_a_point
    monkeypatch.setattr("tests.cli.test_resume.half_a_point", broken)
    with pytest.raises(Exception, match="not at home"):
        run_phase("ppo", run_config(config), tmp_path)
    monkeypatch.undo()
    assert [file.name for file in (tmp_path / "ppo" / "checkpoints").iterdir()] == ["2"]
    evaluated, first, *_ = lines(tmp_path / "ppo" / "metrics.jsonl")
    assert (evaluated["eval/failed_calls"], first["reward/failed_calls"]) == (1, 0)
    run_phase("ppo", run_config(config), tmp_path)
    assert results(wanted / "ppo")["arrays"] == results(tmp_path / "ppo")["arrays"]


def half_a_point(prompts, responses, **columns):
    del prompts, columns
    return [0.5 * response.split().count("a") for response in responses]
