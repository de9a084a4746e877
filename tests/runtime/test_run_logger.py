"""What a phase logs while it runs: progress, metrics, samples and notes on compilation."""

import dataclasses
import io
import json
import os
import sys
import types

import numpy as np
import pytest

from jax_rlhf.rl import Prompts
from jax_rlhf.runtime import json_lines as lines, run_logger as records
from jax_rlhf.runtime.config import LogConfig
from jax_rlhf.runtime.run_logger import RunLogger, sample_row


def prompts(width):
    return Prompts(np.zeros((2, width), np.int32), np.ones((2, width), bool), np.arange(2, dtype=np.int32))


def test_each_new_batch_width_after_the_first_is_logged_once(tmp_path, capsys):
    with RunLogger(tmp_path / "ppo", LogConfig(tensorboard=False)) as logger:
        for step, width in enumerate([16, 16, 32, 16, 32, 64]):
            logger.note_width(step, prompts(width))
    lines = [line for line in capsys.readouterr().out.splitlines() if "compiling" in line]
    assert [line.partition("ppo: ")[2] for line in lines] == [
        "step 2: compiling for batches that are 32 tokens wide",
        "step 5: compiling for batches that are 64 tokens wide",
    ]


def test_progress_in_a_log_file_is_plain_lines(tmp_path, monkeypatch):
    """This includes nested progress bars. No line has characters that move the cursor."""
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    monkeypatch.setattr(records, "_LINE_EVERY", 0.0)
    with RunLogger(tmp_path / "sft", LogConfig(tensorboard=False)) as logger:
        for step in logger.steps(2, 5):
            logger.log_metrics(step + 1, {"train/loss": 0.5}, loss=0.5)
            if step == 3:
                list(logger.progress_bar([1, 2], "evaluating"))
    lines = log.getvalue().splitlines()
    assert any(line.startswith("sft: 4 of 5, 00:0") and line.endswith("left, loss=0.5") for line in lines)
    assert any(line.startswith("sft: evaluating: 1 of 2, ") for line in lines)
    assert all(line.isprintable() and line.startswith("sft: ") for line in lines)


def test_log_files_are_synced_and_then_their_folder(tmp_path, monkeypatch):
    """If the folder was not synced, a new file is lost after a power cut, whatever its content."""
    happened = []
    monkeypatch.setattr(os, "fsync", lambda handle: happened.append(os.readlink(f"/proc/self/fd/{handle}")))
    with RunLogger(tmp_path / "sft", LogConfig(tensorboard=False)) as logger:
        logger.log_metrics(1, {"train/loss": 0.5})
        logger.sync()
        assert {str(tmp_path / "sft" / "metrics.jsonl"), str(tmp_path / "sft" / "samples.jsonl")} < set(happened)
        assert happened[-1] == str(tmp_path / "sft")


class FakeWandb(types.ModuleType):
    """The part of the API of Weights & Biases that the logger uses."""

    def __init__(self):
        super().__init__("wandb")
        self.begun, self.logged, self.id = None, [], "run-1"

    def init(self, **options):
        self.begun = options
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


def test_weights_and_biases_gets_config_run_name_metrics_and_tables(tmp_path, monkeypatch):
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    log = LogConfig(tensorboard=False, wandb_project="mine")
    with RunLogger(tmp_path / "my-run" / "ppo", log, settings=dataclasses.asdict(Settings())) as logger:
        logger.log_metrics(1, {"loss": 0.1 + 0.2, "gone": float("nan")})
        row = {"score": 1 / 3, "length": 2, "ended": True, "columns": {"answer": 7}}
        logger.log_samples([sample_row(1, "eval", "a", "b", **row)])
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


LINES = [b'{"step": 1, "seconds": 3.5}\n', b'{"step": 2, "seconds": 4.5}\n', b'{"step": 3, "seconds": 8.0}\n']


@pytest.mark.parametrize(
    ("left", "kept", "lost"),
    [
        (LINES, 2, 3.5),  # lines after the checkpoint are dropped
        ([*LINES, b'{"step": 4, "sec'], 2, 3.5),  # an incomplete line is dropped too
        (LINES[:2], 2, 0.0),
        ([*LINES[:1], LINES[1][:4]], 1, None),  # a power cut removed the end of the last line
        ([*LINES[:1], LINES[1][:-1]], 1, None),  # only the line break is lost
        ([LINES[0][:3]], 0, None),
        ([b"x" * 200_000], 0, None),  # there is no complete line
        ([b""], 0, None),
        (None, 0, None),
        ([LINES[0], b"null\n"], 1, None),
        ([LINES[1], LINES[2]], 1, None),  # an earlier line is lost, so the position in bytes is wrong
        ([LINES[0], b'{"step": 2, "eval/loss": 1.0}\n'], 2, None),
    ],
)
def test_a_truncated_file_continues_after_its_last_complete_line(tmp_path, capsys, left, kept, lost):
    folder = tmp_path / "sft"
    folder.mkdir()
    with RunLogger(folder, LogConfig(tensorboard=False)) as logger:
        logger.log_samples([{"step": 2, "x": "y"}])
        logger._file("metrics")
        position = logger.position()
    position["bytes"]["metrics"] = len(LINES[0]) * 2
    position["last"]["metrics"] = lines.line_digest(LINES[1])
    position["seconds"] = 4.5
    (folder / "metrics.jsonl").unlink()
    if left is not None:
        (folder / "metrics.jsonl").write_bytes(b"".join(left))
    with RunLogger(folder, LogConfig(tensorboard=False)) as logger:
        found = logger.continue_from(position, 2)
        logger.log_metrics(3, {"loss": 0.5})
    *before, last = (folder / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    assert before == [line for line in left or () if line.endswith(b"\n")][:kept]
    assert json.loads(last)["loss"] == 0.5
    assert found == (lost or 0.0)
    assert ("metrics.jsonl has changed since step 2 was saved" in capsys.readouterr().out) == (lost is None)
    assert len((folder / "samples.jsonl").read_bytes().splitlines()) == 1


def test_lines_of_an_evaluation_that_is_repeated_are_dropped(tmp_path):
    folder = tmp_path / "sft"
    folder.mkdir()
    rows = [{"step": 1}, {"step": 2, "train/loss": 1.0}, {"step": 2, "eval/loss": 1.0}, {"step": 3}]
    content = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    for evaluated, kept in ((True, 3), (False, 2)):
        (folder / "x").write_bytes(content)
        with (folder / "x").open("rb") as file:
            end = lines.end_of_step(file, 2, evaluated=evaluated)
        assert len(content[:end].splitlines()) == kept


def test_line_before_finds_lines_of_any_length(tmp_path):
    file = tmp_path / "x"
    file.write_bytes(b"a\n" + b"b" * 300_000 + b"\nc")
    with file.open("rb") as stream:
        assert lines.line_before(stream, 0) == b""
        assert lines.line_before(stream, 2) == b"a\n"
        assert lines.line_before(stream, 300_003) == b"b" * 300_000 + b"\n"
        assert lines.line_before(stream, 300_004) == b"c"


@pytest.mark.parametrize("seconds", ["9" * 400, "1e999", "-1e999", "NaN", '"x"', "null", "[1]", "{}"])
def test_a_line_without_a_valid_time_counts_as_0_seconds(seconds):
    assert lines.seconds_of(b'{"step": 1, "seconds": ' + seconds.encode() + b"}\n") == 0.0
    assert lines.seconds_of(b'{"step": 1, "seconds": 1.5}\n') == 1.5
