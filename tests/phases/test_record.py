"""What a phase says while it runs."""

import dataclasses
import io
import json
import sys
import types

import numpy as np
import pytest

from jax_rlhf.phases import record as records
from jax_rlhf.phases.config import LogConfig
from jax_rlhf.phases.record import Record, sample_row
from jax_rlhf.rl import Prompts


def prompts(width):
    return Prompts(np.zeros((2, width), np.int32), np.ones((2, width), bool), np.arange(2, dtype=np.int32))


def test_a_width_that_comes_in_mid_run_is_said_once(tmp_path, capsys):
    with Record(tmp_path / "ppo", LogConfig(tensorboard=False)) as record:
        for step, width in enumerate([16, 16, 32, 16, 32, 64]):
            record.compiles_for(step, prompts(width))
    lines = [line for line in capsys.readouterr().out.splitlines() if "compiling" in line]
    assert [line.partition("ppo: ")[2] for line in lines] == [
        "step 2: compiling for batches that are 32 tokens wide",
        "step 5: compiling for batches that are 64 tokens wide",
    ]


def test_in_a_log_file_progress_is_plain_lines(tmp_path, monkeypatch):
    """One bar within another too, and nothing that moves a cursor."""
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    monkeypatch.setattr(records, "_LINE_EVERY", 0.0)
    with Record(tmp_path / "sft", LogConfig(tensorboard=False)) as record:
        for step in record.steps(2, 5):
            record.metrics(step + 1, {"train/loss": 0.5}, loss=0.5)
            if step == 3:
                list(record.watched([1, 2], "evaluating"))
    lines = log.getvalue().splitlines()
    assert any(line.startswith("sft: 4 of 5, 00:0") and line.endswith("left, loss=0.5") for line in lines)
    assert any(line.startswith("sft: evaluating: 1 of 2, ") for line in lines)
    assert all(line.isprintable() and line.startswith("sft: ") for line in lines)


class FakeWandb(types.ModuleType):
    """What of Weights & Biases is used."""

    def __init__(self):
        super().__init__("wandb")
        self.begun, self.logged, self.id = None, [], "run-1"

    def init(self, **how):
        self.begun = how
        return self

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self, exit_code):
        self.ended = exit_code

    @staticmethod
    def Table(columns, data):
        return columns, data


@dataclasses.dataclass
class Settings:
    seed: int = 7
    paths: tuple = ("a.jsonl",)


def test_weights_and_biases_has_the_config_the_run_s_name_and_tables(tmp_path, monkeypatch):
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    log = LogConfig(tensorboard=False, wandb_project="mine")
    with Record(tmp_path / "my-run" / "ppo", log, settings=Settings()) as record:
        record.metrics(1, {"loss": 0.1 + 0.2, "gone": float("nan")})
        row = {"score": 1 / 3, "length": 2, "ended": True, "columns": {"answer": 7}}
        record.samples([sample_row(1, "eval", "a", "b", **row)])
    assert wandb.begun["config"] == {"seed": 7, "paths": ["a.jsonl"]}
    assert (wandb.begun["project"], wandb.begun["name"]) == ("mine", "my-run/ppo")
    (_, metrics), (step, samples) = wandb.logged
    assert metrics == {"loss": 0.1 + 0.2}
    columns, data = samples["samples/eval"]
    assert step == 1
    told = {"step": 1, "split": "eval", "prompt": "a", "response": "b", "score": 0.3333333, "kl": None}
    assert dict(zip(columns, data[0], strict=True)) == told | {"length": 2, "ended": True}
    assert json.loads((tmp_path / "my-run" / "ppo" / "samples.jsonl").read_text())["columns"] == {"answer": 7}
    assert json.loads((tmp_path / "my-run" / "ppo" / "metrics.jsonl").read_text())["loss"] == 0.3


LINES = [b'{"a": 1}\n', b'{"a": 2}\n', b'{"a": 3}\n']


@pytest.mark.parametrize(
    ("left", "kept", "missing"),
    [
        (LINES, 2, 0),  # what came after the checkpoint is dropped
        (LINES[:2], 2, 0),
        ([*LINES[:1], LINES[1][:4]], 1, 9),  # a power cut took the end of it
        ([*LINES[:1], LINES[1][:-1]], 1, 9),  # and the line's break alone
        ([LINES[0][:3]], 0, 18),
        ([b"x" * 200_000], 0, 18),  # not one line
        ([b""], 0, 18),
        (None, 0, 18),
    ],
)
def test_a_file_that_was_cut_goes_on_after_its_last_whole_line(tmp_path, capsys, left, kept, missing):
    folder = tmp_path / "sft"
    folder.mkdir()
    if left is not None:
        (folder / "metrics.jsonl").write_bytes(b"".join(left))
    (folder / "samples.jsonl").write_bytes(b"")
    position = {"seconds": 1.0, "bytes": {"metrics": len(LINES[0]) * 2, "samples": 0}}
    with Record(folder, LogConfig(tensorboard=False)) as record:
        record.continue_from(position, 2)
        record.metrics(3, {"loss": 0.5})
    *before, last = (folder / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    assert before == LINES[:kept]
    assert json.loads(last)["loss"] == 0.5
    said = f"metrics.jsonl is shorter than when step 2 was saved, by {missing} bytes"
    assert (said in capsys.readouterr().out.replace("\n", " ")) == bool(missing)


def test_the_last_whole_line_may_be_far_from_the_end(tmp_path):
    file = tmp_path / "x"
    file.write_bytes(b"a\n" + b"b" * 300_000)
    with file.open("rb") as stream:
        for most in (300_002, 100_000, 3, 2):
            assert records._end_of_lines(stream, most) == 2
        assert records._end_of_lines(stream, 1) == 0
