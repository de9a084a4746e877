"""Runs `python -m jax_rlhf` with a tiny random model: all three phases, and the files that they write."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import transformers

from jax_rlhf import load_pretrained
from tests.cli import tiny
from tests.data import tiny as data
from tests.processes import COMPILED, PYTHONPATH, ROOT, flags_for, free_port

CONFIG = """
from pathlib import Path
from tests.cli import tiny
def get_config():
    config = tiny.config(Path({folder!r}))
    # Away from the defaults, so that it shows where a phase takes another phase's setting, or none.
    config.ppo.sampling.update(temperature=1.5, top_k=3, top_p=0.9, min_new_tokens=2)
    config.ppo.actor.ema_decay, config.reward.normalize_rows, config.sft.sample_rows = 0.75, 64, 3
    config.seed = 4
    return config
"""
SEED = 4


def command(folder, *flags, config=None):
    file = config or folder / "config.py"
    if config is None:
        file.write_text(CONFIG.format(folder=str(folder)))
    return [sys.executable, "-m", "jax_rlhf", f"--config={file}", f"--workdir={folder / 'run'}", *flags]


def environment():
    ours = {"PYTHONPATH": PYTHONPATH, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags_for(1)}
    # All processes of all tests share compiled programs, because compilation takes most of their time.
    ours["JAX_COMPILATION_CACHE_DIR"] = str(COMPILED)
    ours["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    return {name: value for name, value in os.environ.items() if name != "PJRT_NPROC"} | ours


def run(folder, *flags, config=None):
    """Runs the command. Returns its exit code, stdout and stderr."""
    options = {"cwd": folder, "env": environment(), "capture_output": True, "text": True, "timeout": 900}
    done = subprocess.run(command(folder, *flags, config=config), **options, check=False)
    return done.returncode, done.stdout, done.stderr


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_every_phase_leaves_model_metrics_samples_and_summary(whole):
    workdir, printed = whole
    for phase in ("sft", "reward", "ppo"):
        folder = workdir / phase
        assert json.loads((folder / "summary.json").read_text())["finished"]
        assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
            file.name for file in (folder / "model").iterdir()
        }
        assert lines(folder / "metrics.jsonl")
        assert lines(folder / "samples.jsonl")
        assert list((folder / "tensorboard").glob("events*"))
        assert f"model in {folder / 'model'}" in printed
    assert (workdir / "ppo" / "critic" / "model.safetensors").is_file()
    config = json.loads((workdir / "config.json").read_text())
    assert config["ppo"]["eval_functions"] == ["tests.cli.tiny:count_a"]
    assert config["ppo"]["seed"] == config["seed"] == SEED


def test_samples_have_the_same_fields_in_all_phases(whole):
    """Other columns of the input row, such as `tag`, are copied to the sample."""
    workdir, _ = whole
    form = {"step", "split", "prompt", "response", "score", "kl", "length", "ended", "columns"}
    for phase in ("sft", "reward", "ppo"):
        for row in lines(workdir / phase / "samples.jsonl"):
            assert row.keys() - {"count_a"} == form
            assert row["columns"] == {"tag": "t"}
            assert (row["score"] is None) == (phase == "sft")
            assert (row["kl"] is None) == (phase != "ppo")
            assert not {"<eos>", "<bos>", "<pad>"} & {*row["prompt"].split(), *row["response"].split()}


def test_every_written_metric_is_documented_and_has_seven_digits(whole):
    workdir, _ = whole
    page = (ROOT / "docs" / "metrics.md").read_text()
    judged = {"eval/count_a"}
    for phase in ("sft", "reward", "ppo"):
        for line in lines(workdir / phase / "metrics.jsonl"):
            assert {f"`{name}`" for name in line.keys() - judged if f"`{name}`" not in page} == set()
            assert all(
                value is None or value == float(f"{value:.7g}") for name, value in line.items() if name != "seconds"
            )
    assert "loss/ptx_avg" not in line  # metrics of features that are off are not written
    assert "policy/penalty_kl" not in line


def test_a_run_ends_by_printing_a_table_and_the_next_commands(whole):
    workdir, printed = whole
    closing = printed.splitlines()[-30:]
    rows = {tuple(line.split()[:2]): line.split()[2:] for line in closing if line.split()[:1] in (["sft"], ["ppo"])}
    summary = json.loads((workdir / "ppo" / "summary.json").read_text())
    assert rows["ppo", "score"] == [f"{summary['eval/score_before']:.4g}", f"{summary['eval/score']:.4g}"]
    assert len(rows["sft", "loss"]) == 2
    assert f"curves:      tensorboard --logdir {workdir}" in closing
    talk = next(line for line in closing if line.startswith("chat:"))
    options = {"env": environment(), "input": "a b c\nd\n", "capture_output": True, "text": True}
    done = subprocess.run([sys.executable, *talk.split()[2:], "--max_new_tokens=3"], **options, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    answers = done.stdout.splitlines()
    assert len(answers) == 2
    assert all(word in data.WORDS for answer in answers for word in answer.split())


COUNTED = """
import collections, sys
from absl import app
from jax import monitoring
from jax_rlhf.cli import run as command

events = collections.Counter()
monitoring.register_event_listener(lambda name, **_: events.update([name]))
try:
    app.run(command.main, flags_parser=command.parse_flags)
finally:
    found = [events[f"/jax/compilation_cache/cache_{what}"] for what in ("hits", "misses")]
    print("hits and misses:", *found)
"""


def test_a_second_run_with_the_same_compile_cache_compiles_nothing(tmp_path):
    """An empty --compile_cache= turns off the cache of compiled programs."""
    counts = []
    tiny.config(tmp_path)  # saves the checkpoint here, since the first process would compile programs to make it
    for run, place in enumerate(("kept", "kept", "")):
        own = f"--workdir={tmp_path / str(run)}", f"--compile_cache={place and tmp_path / place}"
        flags = command(tmp_path, "--config.phases=sft", "--config.sft.sample_rows=0", *own)
        env = {name: value for name, value in environment().items() if not name.startswith("JAX_COMP")}
        options = {"cwd": tmp_path, "env": env, "capture_output": True, "text": True}
        done = subprocess.run([sys.executable, "-c", COUNTED, *flags[3:]], **options, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        counts.append([int(number) for number in done.stdout.splitlines()[-1].split()[-2:]])
    (_, compiled), (found, again), off = counts
    assert compiled > 10
    assert (found, again) == (compiled, 0)
    assert off == [0, 0]


def test_check_trains_nothing_and_prints_an_example_row_per_phase(tmp_path):
    code, printed, errors = run(tmp_path, "--check")
    assert code == 0, errors[-3000:]
    assert not (tmp_path / "run").exists()
    for phase, parts in (("sft", "completion"), ("reward", "chosen"), ("ppo", "prompt")):
        line = next(
            line for line in printed.splitlines() if line.startswith(f"{phase} data, an example: prompt (3 tokens)")
        )
        assert parts in line
    assert "<eos>'" in printed  # special tokens are visible
    assert printed.splitlines()[-1] == (
        "checked: settings, data and checkpoints of sft, reward, ppo; nothing was trained"
    )
    code, _, errors = run(tmp_path, "--check", "--config.data.paths=nowhere.jsonl")
    assert code == 1
    assert "'nowhere.jsonl' is neither an existing file or folder" in errors


def test_sft_and_reward_model_learn(whole):
    workdir, _ = whole
    sft = json.loads((workdir / "sft" / "summary.json").read_text())
    assert sft["eval/loss_before"] > 3.0  # random weights give about log 31 = 3.43, for 31 tokens
    assert sft["eval/loss"] < 2.0
    for line in lines(workdir / "sft" / "metrics.jsonl") + lines(workdir / "reward" / "metrics.jsonl"):
        assert line.get("train/tokens_per_second", 1) > 0
        assert line.get("train/tokens", 8) >= 8  # a batch has 8 rows
    reward = json.loads((workdir / "reward" / "summary.json").read_text())
    assert reward["eval/accuracy"] > 0.95
    assert reward["eval/auc"] > 0.95
    assert [line["train/loss"] for line in lines(workdir / "sft" / "metrics.jsonl") if "train/loss" in line][-1] < 2.5


def test_ppo_reports_metrics_evaluations_and_samples(whole):
    workdir, printed = whole
    metrics = lines(workdir / "ppo" / "metrics.jsonl")
    steps = [line for line in metrics if "objective/kl" in line]
    assert [line["step"] for line in steps] == [1, 2, 3]
    assert steps[0]["objective/kl"] == 0
    assert steps[-1]["val/first_ratio_gap"] < 1e-5
    shares = [steps[-1][f"time/{name}_share"] for name in ("generate", "score", "train")]
    assert sum(shares) == pytest.approx(1)
    assert steps[-1]["tokens_per_second/generate"] > steps[-1]["tokens_per_second"] > 0
    first, last = (line for line in metrics if "eval/count_a" in line)
    assert (first["step"], first["eval/kl"], last["step"]) == (0, 0, 3)
    samples = lines(workdir / "ppo" / "samples.jsonl")
    assert {row["split"] for row in samples} == {"train", "eval"}
    assert sum(row["split"] == "train" for row in samples) == 12
    before, after = ([r["prompt"] for r in samples if r["split"] == "eval" and r["step"] == n] for n in (0, 3))
    assert before == after
    assert len(before) == 10
    assert "  before" in printed
    assert "  after" in printed


def test_reward_model_is_normalised_on_samples_of_the_sft_policy(whole):
    workdir, _ = whole
    scores = np.array([row["score"] for row in lines(workdir / "reward" / "samples.jsonl")])
    summary = json.loads((workdir / "reward" / "summary.json").read_text())
    cut = ~np.array([row["ended"] for row in lines(workdir / "reward" / "samples.jsonl")])
    for row in lines(workdir / "reward" / "samples.jsonl"):
        assert len(row["response"].split()) == row["length"] - row["ended"]
    assert len(scores) == 64
    normalised = summary["gain"] * scores + summary["bias"] - summary["missing_eos_bias"] * cut
    assert np.mean(normalised) == pytest.approx(0, abs=1e-5)
    assert np.std(normalised) == pytest.approx(1, abs=1e-5)
    # The saved model gives the normalised scores: the gain is in its head, and the bias is stored in its config.
    pretrained = load_pretrained(workdir / "reward" / "model", head="scalar")
    first = lines(workdir / "reward" / "samples.jsonl")[0]
    tokens = np.array([data.ids(f"{first['prompt']} {first['response']}{' <eos>' * first['ended']}")])
    value = pretrained.model.apply({"params": pretrained.params}, tokens)[0, -1] + pretrained.reward_bias
    assert float(value) - pretrained.missing_eos_bias * cut[0] == pytest.approx(normalised[0], abs=1e-4)


def test_torch_gives_the_same_scores_as_jax(whole):
    """transformers scores the last token that is not the pad token, so the exported pad token is not EOS."""
    pytest.importorskip("torch")
    import torch

    workdir, _ = whole
    folder = workdir / "reward" / "model"
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert theirs.config.pad_token_id != data.EOS
    batch = tokenizer(["a b c a <eos>", "d b <eos>"], return_tensors="pt", padding=True, padding_side="right")
    with torch.no_grad():
        scores = theirs(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, 0]
    ours = load_pretrained(folder, head="scalar")
    mask = batch.attention_mask.numpy().astype(bool)
    values = np.asarray(ours.model.apply({"params": ours.params}, batch.input_ids.numpy(), mask=mask))
    last = values[[0, 1], mask.sum(axis=1) - 1] + ours.reward_bias
    np.testing.assert_allclose(scores.numpy() + theirs.config.reward_bias, last, atol=1e-4)


def test_a_repeated_command_skips_finished_phases(whole):
    workdir, _ = whole
    code, printed, errors = run(workdir.parent)
    assert code == 0, errors
    assert printed.count("already finished") == 3


WRONG = [
    (["--config.ppo.kl.coef=0.5"], "belongs to a run with other settings: config.ppo.kl.coef was 0.05 and is 0.5"),
    (["--config.ppo.kl_cof=0.5"], "config.ppo.kl_cof does not exist; did you mean config.ppo.kl.coef"),
    (["--config.pppo.kl_coef=0.5"], "did you mean config.ppo.kl.coef"),
    (["--config.sft.steps=many"], "config.sft.steps='many': expected int or None"),
    (["--config.ppo.iterations=many"], "--config.ppo.iterations=many: invalid literal for int()"),
    (["--config.reward.num_layers=None"], "config.reward.num_layers was 2 and is None"),
    (["--config.phases=sft", "--overwrite"], "was trained from a model that --overwrite deletes"),
    (["--config.phases=ppo,sft"], "in this order"),
    (["--config.phases=ppo,rm"], "'rm' is not a phase"),
]
UNWRITABLE = [["--config.phases=sft", f"--workdir={workdir}"] for workdir in ("/sys/jax_rlhf", "base/config.json/run")]

# Imports take most of such a command's time. They are done once, before a process is forked for each command.
FORKED = """
import json, os, sys
from jax_rlhf.cli import run as command

commands, said = json.load(sys.stdin), sys.argv[1]
for index, arguments in enumerate(commands):
    if (child := os.fork()) == 0:
        for stream in (1, 2):
            os.dup2(os.open(f"{said}/{index}.{stream}", os.O_WRONLY | os.O_CREAT), stream)
        sys.argv = ["jax_rlhf", *arguments]
        command.run()
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.fixture(scope="module")
def refused(whole, tmp_path_factory):
    """refused(flags): exit code, stdout and stderr of the command that made the run `whole`, with these flags added."""
    folder, said = whole[0].parent, tmp_path_factory.mktemp("refused")
    wrong = [*(flags for flags, _ in WRONG), *UNWRITABLE]
    commands = [command(folder, *flags, config=folder / "config.py")[3:] for flags in wrong]
    options = {"cwd": folder, "env": environment(), "input": json.dumps(commands), "capture_output": True, "text": True}
    done = subprocess.run([sys.executable, "-c", FORKED, str(said)], **options, timeout=200, check=True)
    codes = [int(code) for code in done.stdout.split()]
    return lambda flags: (
        codes[wrong.index(flags)],
        *((said / f"{wrong.index(flags)}.{stream}").read_text() for stream in (1, 2)),
    )


@pytest.mark.parametrize(("flags", "message"), WRONG)
def test_wrong_settings_end_the_command_with_an_error_line(refused, flags, message):
    code, _, errors = refused(flags)
    assert code in (1, 2)
    assert errors.splitlines()[-1].startswith("error: ")
    assert message in errors.splitlines()[-1]


@pytest.mark.parametrize("flags", UNWRITABLE)
def test_an_unwritable_workdir_is_an_error_before_models_are_loaded(refused, flags):
    workdir = flags[-1].removeprefix("--workdir=")
    code, printed, errors = refused(flags)
    assert code == 1, errors[-3000:]
    assert errors.splitlines()[-1].startswith(f"error: {workdir} cannot be written")
    assert "loading" not in printed


JUDGED = ("--config.phases=ppo", "--config.ppo.iterations=2", "--config.ppo.reward.retries=0")


@pytest.mark.parametrize(
    ("judge", "flags", "code", "said"),
    [
        ("lengths", ["--config.ppo.reward.isolation=process"], 0, ""),
        ("exits", ["--config.ppo.reward.timeout=None"], 1, "it ended with SystemExit"),
    ],
)
def test_a_reward_function_may_be_isolated_and_its_exit_is_an_error(tmp_path, judge, flags, code, said):
    tiny.config(tmp_path)
    names = (
        f"--config.sft_model_path={tmp_path / 'base'}",
        f"--config.ppo.reward.functions=tests.rewards.judges:{judge}",
    )
    found, _, errors = run(tmp_path, *JUDGED, *names, *flags)
    assert found == code, errors[-3000:]
    assert said in errors
    if code == 0:
        rows = lines(tmp_path / "run" / "ppo" / "samples.jsonl")
        assert all(row["score"] == len(row["response"]) for row in rows)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_the_state_and_gives_exit_code_75(tmp_path, number):
    flags = ("--config.phases=sft", "--config.sft.steps=100000", "--overwrite")
    tiny.config(tmp_path)
    # With SIGTERM the process is the only one of its cluster, as on a TPU VM with one host. There JAX's preemption
    # service must not handle SIGTERM, because nothing would query it.
    cluster = (f"--coordinator=127.0.0.1:{free_port()}", "--num_processes=1", "--process_id=0")
    process = subprocess.Popen(
        command(tmp_path, *flags, *(cluster if number == signal.SIGTERM else ())),
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = tmp_path / "run" / "sft" / "metrics.jsonl"
    until = time.time() + 200
    while (
        time.time() < until
        and process.poll() is None
        and (not metrics.exists() or '"step": 3,' not in metrics.read_text())
    ):
        time.sleep(0.2)
    assert process.poll() is None, process.communicate()[1][-3000:]
    if number == signal.SIGTERM:
        code, _, errors = run(tmp_path, *flags)
        assert code == 1
        assert "error:" in errors
        assert "another run writes to it" in errors
    process.send_signal(number)
    printed, errors = process.communicate(timeout=100)
    assert process.returncode == 75, errors[-3000:]
    steps = [line["step"] for line in lines(metrics)]
    assert f"step {steps[-1]} is saved in" in printed
    assert "run the same command again to continue" in errors
    assert [file.name for file in (tmp_path / "run" / "sft" / "checkpoints").iterdir()] == [str(steps[-1])]
    # Preemption leaves no time to export the model.
    assert (tmp_path / "run" / "sft" / "model").exists() == (number == signal.SIGINT)
    assert not (tmp_path / "run" / "sft" / "summary.json").exists()
    if number == signal.SIGTERM:  # a launch script repeats the same command, with --overwrite
        again = subprocess.Popen(
            command(tmp_path, *flags), cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, text=True
        )
        seen, limit = "", threading.Timer(100, again.kill)  # ends the loop if the message never comes
        limit.start()
        while "continuing from" not in seen:
            line = again.stdout.readline()
            assert line, seen
            seen += line
        limit.cancel()
        again.kill()
        again.communicate()
        assert "--overwrite was already applied when this run started" in seen
        assert f"continuing from the checkpoint of step {steps[-1]}" in seen


def test_a_full_disk_is_an_error_and_the_same_command_works_later(tmp_path):
    """ulimit keeps files below 40 KiB, so that writing a checkpoint fails as on a full disk."""
    flags = ("--config.phases=sft", "--config.checkpoint.every=2")
    limit = ["bash", "-c", 'ulimit -f 40; exec "$@"', "bash"]
    full = {"cwd": tmp_path, "env": environment(), "capture_output": True, "text": True, "timeout": 200}
    data.write(tmp_path / "none.jsonl", [])
    command(tmp_path, *flags)
    subprocess.run([sys.executable, "-c", (tmp_path / "config.py").read_text() + "get_config()"], **full, check=True)
    done = subprocess.run(limit + command(tmp_path, *flags), **full, check=False)
    assert done.returncode == 1, done.stderr[-3000:]
    assert "error: " in done.stderr.splitlines()[-1]
    assert "the checkpoint of step 2 could not be written: " in done.stderr
    assert "there is no complete one" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "run" / "sft" / "checkpoints").glob("[0-9]"))
    code, printed, errors = run(tmp_path, *flags)
    assert code == 0, errors[-3000:]
    assert "sft: steps 12" in printed


def test_a_second_ctrl_c_ends_the_process_at_once(tmp_path):
    """The first Ctrl-C waits for the reward function, which never returns. The second one ends the process."""
    flags = ("--config.phases=ppo", f"--config.sft_model_path={tmp_path / 'base'}")
    process = subprocess.Popen(
        command(tmp_path, *flags, "--config.ppo.reward.functions=tests.cli.test_end_to_end:never"),
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    until = time.time() + 100
    while time.time() < until and process.poll() is None and not (tmp_path / "asked").exists():
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=5)
    assert process.returncode == -signal.SIGINT
    assert "Ctrl-C: the run stops after this step is finished and saved; a second signal stops it at once." in errors


def never(prompts, responses, **columns):
    del prompts, responses, columns
    pathlib.Path("asked").touch()
    while True:
        time.sleep(1000)
