"""Two processes give the results of one in all three phases, and both end if one fails or is asked to stop."""

import os
import signal
import subprocess
import time

import numpy as np
import pytest
from safetensors.numpy import load_file

from jax_rlhf import load_pretrained
from tests.cli import test_end_to_end as alone, tiny
from tests.processes import flags_for, free_port

CONFIG = """
from pathlib import Path
from tests.cli import tiny
def get_config():
    config = tiny.config(Path({folder!r}))
    config.data.paths = ("preferences.jsonl",)  # of the folder that a process runs in
    config.data.ppo_batch_size, config.ppo.microbatch_size = 16, 8
    config.sft.steps = config.reward.steps = config.ppo.iterations = 2
    config.ppo.reward.functions = ("tests.cli.test_processes:half_a_point_an_a",)
    config.ppo.time_phases = False
    return config
"""

# Adam divides a gradient by its magnitude, which amplifies rounding errors of gradients near zero. With ε = 1,000 an
# update is almost linear in the gradient.
LINEAR = [
    f"--config.{phase}optimizer.{setting}"
    for phase, rate in {"sft.": 100, "reward.": 100, "ppo.actor.": 30, "ppo.critic.": 30}.items()
    for setting in ("eps=1e3", f"learning_rate={rate}")
]
MODELS = ("sft/model", "reward/model", "ppo/model", "ppo/critic")


def half_a_point_an_a(prompts, responses, tag, **columns):
    """Scores half a point per "a". Logs the number of rows of each call, and checks the column of the rows."""
    del columns
    assert tag == ["t"] * len(prompts)
    with open(os.environ["ASKED"], "a") as file:
        file.write(f"{len(prompts)}\n")
    return [0.5 * response.split().count("a") for response in responses]


def start(folder, workdir, *flags, devices, asked, cwd=None):
    environment = alone.environment() | {
        "XLA_FLAGS": flags_for(devices),
        "ASKED": str(asked),
    }
    command = [*alone.command(folder, config=folder / "config.py")[:-1], f"--workdir={workdir}", *flags]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=cwd or folder, env=environment, **pipes)


def start_two(folder, workdir, *flags, cwds=(None, None), each=((), ())):
    who = [f"--coordinator=127.0.0.1:{free_port()}", "--num_processes=2", "--process_timeout=10"]
    return [
        start(
            folder,
            workdir,
            *flags,
            *who,
            *each[i],
            f"--process_id={i}",
            devices=2,
            asked=folder / f"asked{i}",
            cwd=cwds[i],
        )
        for i in range(2)
    ]


def finish(processes, timeout=400):
    return [(process.communicate(timeout=timeout)[0], process.returncode) for process in processes]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    tiny.config(folder)
    (folder / "config.py").write_text(CONFIG.format(folder=str(folder)))
    return folder


def metrics(workdir, phase):
    timing = ("time", "second", "eps")
    rows = alone.lines(workdir / phase / "metrics.jsonl")
    return [{name: value for name, value in row.items() if not any(word in name for word in timing)} for row in rows]


def parameters(run):
    """The parameters of all models that a run exports, by folder and name."""
    files = {model: load_file(run / model / "model.safetensors") for model in MODELS}
    return {(model, name): leaf for model, leaves in files.items() for name, leaf in leaves.items()}


def assert_same_up_to_rounding(wanted, got, started):
    """Compares to 1e-6 of each array's largest value. Training has changed most arrays by 1,000 times that."""
    assert wanted.keys() == got.keys()
    for name, leaf in wanted.items():
        np.testing.assert_allclose(got[name], leaf, rtol=0, atol=1e-6 * np.abs(leaf).max(), err_msg=str(name))
    moved = [np.abs(wanted["ppo/model", name] - leaf).max() / np.abs(leaf).max() for name, leaf in started.items()]
    assert np.median(moved) > 1e-3


def test_two_processes_give_the_results_of_one_in_all_phases(folder):
    # Each of two processes has 2 devices. With tensor=2, rows are sharded over fsdp=2.
    form = ("--config.mesh.tensor=2", *LINEAR)
    printed = finish(start_two(folder, folder / "two", *form))
    assert [code for _, code in printed] == [0, 0], printed[0][0][-3000:] + printed[1][0][-3000:]
    ((output, code),) = finish([start(folder, folder / "one", *form, devices=4, asked=folder / "asked")])
    assert code == 0, output[-9000:]
    for phase in ("sft", "reward", "ppo"):
        wanted, got = metrics(folder / "one", phase), metrics(folder / "two", phase)
        assert len(wanted) == len(got) > 2
        for one, two in zip(wanted, got, strict=True):
            assert one.keys() == two.keys()
            for name, value in one.items():
                np.testing.assert_allclose(two[name], value, rtol=2e-3, atol=1e-5, err_msg=f"{phase} {name}")
        samples = [alone.lines(folder / run / phase / "samples.jsonl") for run in ("one", "two")]
        if phase == "ppo":  # training samples are only those of process 0
            samples = [[row for row in rows if row["split"] == "eval"] for rows in samples]
        texts = [[row.get("response") or row.get("text") for row in rows] for rows in samples]
        assert texts[0] == texts[1]
        load_pretrained(folder / "two" / phase / "model", head="scalar" if phase == "reward" else "lm")
    started = load_file(folder / "base" / "model.safetensors")
    assert_same_up_to_rounding(parameters(folder / "one"), parameters(folder / "two"), started)
    assert "ppo: iterations 2" in printed[0][0]
    assert "ppo: iterations 2" not in printed[1][0]  # only process 0 prints
    asked = [(folder / name).read_text().split() for name in ("asked", "asked0", "asked1")]
    assert set(asked[0]) == {"16"}  # each row is scored once, in evaluations and in iterations
    assert set(asked[1]) == set(asked[2]) == {"8"}
    assert len(asked[0]) == len(asked[1]) == len(asked[2])


@pytest.mark.slow
def test_two_processes_with_a_device_each_equal_one_bit_for_bit(folder):
    """Adam has its default ε. The rounding of a sum of two terms does not depend on their order."""
    who = (f"--coordinator=127.0.0.1:{free_port()}", "--num_processes=2", "--process_timeout=10")
    asked = folder / "asked_of_pair"
    two = [start(folder, folder / "pair", *who, f"--process_id={index}", devices=1, asked=asked) for index in range(2)]
    one = start(folder, folder / "both", devices=2, asked=asked)
    for output, code in finish([*two, one]):
        assert code == 0, output[-3000:]
    wanted, got = parameters(folder / "both"), parameters(folder / "pair")
    for name, leaf in wanted.items():
        np.testing.assert_array_equal(got[name], leaf, err_msg=str(name))


def test_all_processes_name_the_process_with_other_data(folder, tmp_path):
    lines = (folder / "preferences.jsonl").read_text().splitlines()
    (tmp_path / "preferences.jsonl").write_text("\n".join(lines[:60]) + "\n")
    flags = ("--config.phases=sft", "--config.data.eval_rows=2")
    for output, code in finish(start_two(folder, tmp_path / "run", *flags, cwds=(None, tmp_path)), timeout=120):
        assert code == 1
        assert "error: the data: process 1 has" in output
        assert "All processes need the same files" in output


def test_all_processes_name_a_setting_that_differs(folder, tmp_path):
    processes = start_two(folder, tmp_path / "run", each=((), ("--config.ppo.reward.whiten=true",)))
    for output, code in finish(processes, timeout=120):
        assert code == 1
        assert """the settings: process 1 has '"whiten": true', process 0 has '"whiten": false'""" in output


def test_a_file_missing_in_one_process_ends_both_with_its_name(folder, tmp_path):
    for output, code in finish(start_two(folder, tmp_path / "run", cwds=(None, tmp_path)), timeout=120):
        assert code == 1
        assert "preferences.jsonl" in output
    assert not (tmp_path / "run").exists()  # nothing was written


def complete(folder):
    """The steps of a phase's complete checkpoints."""
    return [int(file.name) for file in (folder / "checkpoints").glob("*") if file.name.isdigit()]


ENDLESS = ("--config.phases=sft", "--config.sft.steps=100000")
"""The flags of a run that continues until it is stopped."""


def wait_for(what, processes):
    deadline = time.time() + 120
    while time.time() < deadline and not what():
        assert processes[0].poll() is None, processes[0].communicate()[0][-3000:]
        time.sleep(0.2)


def test_a_dead_process_ends_the_other_and_a_signal_to_one_stops_both(folder, tmp_path):
    """The same command continues after the last checkpoint, so that metrics have each step once."""
    # Every step is saved, so that the second process is killed during a save, or close to one.
    flags = (*ENDLESS, "--config.checkpoint.every=1")
    first, second = start_two(folder, tmp_path / "run", *flags)
    wait_for(lambda: complete(tmp_path / "run" / "sft"), [first])
    second.send_signal(signal.SIGKILL)
    killed = time.time()
    (output, code), _ = finish([first, second], timeout=60)
    assert code == 70 or code < 0, output[-3000:]  # launch scripts restart a run after these
    assert time.time() - killed < 50  # the time-out is 10 seconds
    assert "disk full" not in output
    last = max(complete(tmp_path / "run" / "sft"))
    file = tmp_path / "run" / "sft" / "metrics.jsonl"
    written = file.read_text().count('"train/loss"')
    again = start_two(folder, tmp_path / "run", *flags)
    wait_for(lambda: max(complete(tmp_path / "run" / "sft")) > max(last, written), again)
    again[1].send_signal(signal.SIGTERM)  # all processes must get this notice, even during a save
    printed = finish(again, timeout=120)
    for output, code in printed:
        assert code == 75, output[-3000:]
    assert f"continuing from the checkpoint of step {last}" in printed[0][0]
    steps = [row["step"] for row in alone.lines(file) if "train/loss" in row]
    assert steps == list(range(1, max(complete(tmp_path / "run" / "sft")) + 1))


@pytest.mark.slow
def test_ctrl_c_in_one_process_ends_all_at_the_same_step(folder, tmp_path):
    processes = start_two(folder, tmp_path / "run", *ENDLESS, "--config.checkpoint.every=0")
    file = tmp_path / "run" / "sft" / "metrics.jsonl"
    wait_for(lambda: file.is_file() and len(alone.lines(file)) > 2, processes)
    processes[1].send_signal(signal.SIGINT)
    for output, code in finish(processes, timeout=120):
        assert code == 75, output[-3000:]
    assert max(complete(tmp_path / "run" / "sft")) == alone.lines(file)[-1]["step"]
    load_pretrained(tmp_path / "run" / "sft" / "model")
