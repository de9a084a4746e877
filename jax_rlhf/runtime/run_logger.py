"""What a phase leaves behind while it runs: a progress bar, metrics.jsonl, samples.jsonl, TensorBoard, W&B."""

import contextlib
import dataclasses
import json
import math
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, TextIO

import jax
from tqdm import tqdm

from jax_rlhf.data import Datasets
from jax_rlhf.io.durable import file_errors, sync, write_text
from jax_rlhf.io.printable import printable_lines
from jax_rlhf.runtime.json_lines import end_of_step, line_before, line_digest, seconds_of
from jax_rlhf.runtime.manifest import begin_manifest
from jax_rlhf.runtime.preemption import StopSignals
from jax_rlhf.runtime.tensorboard import TensorBoard

_FILES = "metrics", "samples"
_LINE_EVERY = 30.0  # seconds between lines of progress in a log file
_LINE = "{desc}: {n_fmt} of {total_fmt}, {elapsed} so far, {remaining} left{postfix}"
_CONTROL = re.compile(r"\r|\x1b\[[0-9;]*[A-Za-z]")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogConfig:
    """Where metrics go, beside metrics.jsonl."""

    tensorboard: bool = True
    """TensorBoard files under <phase>/tensorboard."""
    wandb_project: str | None = None
    """Weights & Biases, which must be installed; None = not."""
    table_rows: int = 4
    """Samples shown on the screen, before and after."""


class Record:
    """Writes down a phase; a context manager. Only process 0 writes.

    Files are opened by the first line that they get, so that a phase that fails before leaves them as they were.

    Attributes:
      folder: <workdir>/<phase>.
      phase: its name.
      stop: tells of Ctrl-C and the like.
      beats: steps and batches so far, of training and of evaluations.
    """

    def __init__(
        self, folder: Path, config: LogConfig, stop: StopSignals | None = None, *, settings: Any = None
    ) -> None:
        """Makes the folder.

        Args:
          folder: <workdir>/<phase>.
          config: where metrics go.
          stop: the run's; None = its own, while it is open.
          settings: the run's, a dataclass, for Weights & Biases.

        Raises:
          ValueError: Weights & Biases is wanted, and not installed.
          OSError: the folder cannot be written.
        """
        self.folder, self.phase, self.stop = folder, folder.name, stop or StopSignals()
        self._own_stop, self._settings = stop is None, settings
        self._config, self._started, self._writes = config, time.perf_counter(), jax.process_index() == 0
        self._wandb = _import_wandb() if config.wandb_project else None
        self._bar: tqdm | None = None
        self._files: dict[str, BinaryIO] = {}
        self._board, self._run, self._begun, self.beats = None, None, {}, 0
        self._last = dict.fromkeys(_FILES, line_digest(b""))
        self._widths: set[int] = set()
        if self._writes:
            folder.mkdir(parents=True, exist_ok=True)
            begin_manifest(folder)

    def __enter__(self) -> "Record":
        """Listens for Ctrl-C, where nobody does yet."""
        if self._own_stop:
            self.stop.listen()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes the files, whatever happened."""
        if self._own_stop:
            self.stop.leave()
        if self._bar is not None:
            self._bar.close()
        with contextlib.ExitStack() as stack:  # each is closed, whatever the others say
            if self._run is not None:
                stack.callback(self._run.finish, exit_code=int(error is not None))
            if self._board is not None:
                stack.callback(self._board.close)
            for name, file in self._files.items():
                stack.enter_context(file_errors(self.folder / f"{name}.jsonl"))
                stack.callback(file.close)

    def position(self) -> dict[str, Any]:
        """How far the files are, for `continue_from`.

        Returns:
          What JSON can hold: bytes of each file, a digest of its last line, seconds since the phase began. Only process
          0's is of use.
        """
        if not self._writes:
            return {}
        sizes = {name: self._file(name).tell() for name in _FILES}
        run = {} if self._run is None else {"wandb": self._run.id}
        return {"seconds": self._seconds(), "bytes": sizes, "last": dict(self._last)} | run

    def continue_from(self, position: Mapping[str, Any], step: int, *, evaluated: bool = True) -> float:
        """Goes on where a checkpoint was saved; what was written after it is dropped.

        Args:
          position: as it was then.
          step: steps done then.
          evaluated: the evaluation of that step was written down before.

        Returns:
          Seconds of steps that were written down after it, and are done again.
        """
        self._begun = dict(position) | {"step": step}
        self._started = time.perf_counter() - position.get("seconds", 0.0)
        lost = {}
        for name in _FILES if self._writes else ():
            with file_errors(self.folder / f"{name}.jsonl"):
                lost[name] = self._cut(name, position, step, evaluated=evaluated)
        return lost.get("metrics", 0.0)

    def _cut(self, name: str, position: Mapping[str, Any], step: int, *, evaluated: bool) -> float:
        """Drops a file's lines after a place; returns the seconds from then to the last of them."""
        size, file, lost = position["bytes"][name], self._file(name), 0.0
        end = file.seek(0, os.SEEK_END)
        last = line_digest(line_before(file, size))
        if size <= end and last == position.get("last", {}).get(name, last):  # older checkpoints say none
            line = line_before(file, end)
            if not line.endswith(b"\n"):  # half a line, of a process that was killed
                line = line_before(file, end - len(line))
            lost = max(0.0, seconds_of(line) - position.get("seconds", 0.0))
        else:  # lines were lost once: bytes say nothing of where a step's lines are
            size = end_of_step(file, step, evaluated=evaluated)
            self.say(
                f"{self.folder / name}.jsonl is not what it was when step {step} was saved; it goes on after its "
                "last whole line of the steps before."
            )
        file.truncate(size)
        self._last[name] = line_digest(line_before(file, size))
        file.seek(size)
        return lost

    def sync(self) -> None:
        """Waits until what was written is on the disk."""
        for name in _FILES if self._writes else ():
            with file_errors(self.folder / f"{name}.jsonl"):
                os.fsync(self._file(name).fileno())
        if self._writes:
            sync(self.folder)  # the files' names

    def _seconds(self) -> float:
        return round(time.perf_counter() - self._started, 3)

    def _file(self, name: str) -> BinaryIO:
        if name not in self._files:
            path = self.folder / f"{name}.jsonl"
            self._files[name] = path.open("r+b" if self._begun and path.is_file() else "w+b")
        return self._files[name]

    def steps(self, start: int, total: int, unit: str = "step") -> Iterator[int]:
        """start … total − 1 with a progress bar.

        Args:
          start: steps done before.
          total: of the phase.
          unit: what the bar calls them.

        Yields:
          The step.
        """
        self._bar = self._progress(total, self.phase, unit, done=start)
        for step in range(start, total):
            yield step
            self.beats += 1
            self._bar.update()
        self._bar.close()
        self._bar = None

    def watched(self, batches: Sequence[Any], what: str) -> Iterator[Any]:
        """The batches, with a progress bar that goes when they end.

        Args:
          batches: any.
          what: happens to them.

        Yields:
          Each batch.

        Raises:
          Stopped: any process was asked to stop.
        """
        with self._progress(len(batches), f"{self.phase}: {what}", "batch", leave=False) as bar:
            for batch in batches:
                self.stop.check()
                yield batch
                self.beats += 1
                bar.update()

    def _progress(self, total: int, title: str, unit: str, *, done: int = 0, leave: bool = True) -> tqdm:
        shown = {"total": total, "initial": done, "desc": title, "unit": unit, "disable": not self._writes}
        if sys.stderr.isatty():
            return tqdm(leave=leave, dynamic_ncols=True, **shown)
        seldom = {"mininterval": _LINE_EVERY, "delay": _LINE_EVERY}
        return tqdm(leave=False, file=_Lines(sys.stderr), bar_format=_LINE, **seldom, **shown)

    def metrics(self, step: int, values: Mapping[str, float], **shown: float) -> None:
        """Writes metrics, and shows some of them beside the bar.

        Args:
          step: steps (or iterations) done.
          values: name → number.
          shown: for the progress bar.
        """
        numbers = {name: float(value) for name, value in values.items()}
        seconds = self._seconds()
        self._line("metrics", {"step": step, "seconds": seconds} | {n: _json_number(v) for n, v in numbers.items()})
        self._open_boards()
        if self._board is not None:
            self._board.add(step, numbers)
        if self._run is not None:
            self._run.log({name: number for name, number in numbers.items() if math.isfinite(number)}, step=step)
        if self._bar is not None and shown:
            self._bar.set_postfix({name: f"{value:.4g}" for name, value in shown.items()}, refresh=False)

    def samples(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Writes samples.

        Args:
          rows: from `sample_row`.
        """
        written = [{k: _json_number(v) if isinstance(v, float) else v for k, v in row.items()} for row in rows]
        for row in written:
            self._line("samples", row)
        self._open_boards()
        if self._run is not None and written:
            names = [name for name in written[0] if name != "columns"]
            table = self._wandb.Table(columns=names, data=[[row.get(name) for name in names] for row in written])
            self._run.log({f"samples/{written[0]['split']}": table}, step=written[0]["step"])

    def compiles_for(self, step: int, batch: Any) -> None:
        """Says that a step will take longer: its batch has a width that no former one had, for which XLA compiles.

        Args:
          step: steps done.
          batch: a tree of arrays, the first of them [rows, tokens, …].
        """
        self.beats += 1  # a batch is there
        width = jax.tree.leaves(batch)[0].shape[1]
        if self._widths and width not in self._widths:
            self.say(f"step {step}: compiling for batches that are {width} tokens wide")
        self._widths.add(width)

    def say(self, text: str) -> None:
        """Prints a line above the progress bar.

        Args:
          text: the line.
        """
        if self._writes:
            tqdm.write(f"[{time.strftime('%H:%M:%S')}] {self.phase}: {printable_lines(text)}", file=sys.stdout)
            sys.stdout.flush()

    def says_of(self, datasets: Datasets) -> None:
        """Prints what became of the rows of a data set.

        Args:
          datasets: the phase's.
        """
        for line in (datasets.report, *datasets.notes, datasets.example):
            self.say(line.removeprefix(f"{self.phase} "))  # which say() puts before it

    def summary(self, values: Mapping[str, Any]) -> None:
        """Writes summary.json, which says that the phase is finished, and how.

        Args:
          values: what to tell of it.
        """
        if self._writes:
            content = {"finished": True, "seconds": round(self._seconds(), 1)}
            content |= {k: _json_number(v) if isinstance(v, float) else v for k, v in values.items()}
            self.sync()  # what it speaks of is on the disk before it is
            write_text(self.folder / "summary.json", json.dumps(content, indent=2) + "\n")

    def _line(self, name: str, content: Mapping[str, Any]) -> None:
        if self._writes:
            file = self._file(name)
            line = json.dumps(content, ensure_ascii=False)
            # What a terminal would obey, and what UTF-8 cannot hold, becomes the escape that JSON has for it.
            written = ("".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in line) + "\n").encode()
            with file_errors(self.folder / f"{name}.jsonl"):
                file.write(written)
                file.flush()
            self._last[name] = line_digest(written)

    def _open_boards(self) -> None:
        if not self._writes:
            return
        if self._config.tensorboard and self._board is None:
            first = self._begun["step"] + 1 if self._begun else 0
            self._board = TensorBoard(self.folder / "tensorboard", first)
        if self._wandb is not None and self._run is None:
            again = {"id": self._begun["wandb"], "resume": "allow"} if "wandb" in self._begun else {}
            run = self.folder.resolve().parent.name
            names = {"project": self._config.wandb_project, "name": f"{run}/{self.phase}", "group": run}
            config = {} if self._settings is None else dataclasses.asdict(self._settings)
            where = {"job_type": self.phase, "dir": str(self.folder)}
            self._run = self._wandb.init(config=json.loads(json.dumps(config, default=str)), **names, **where, **again)


def _json_number(value: float) -> float | None:
    """Seven digits, as many as float32 has; JSON knows no NaN."""
    return float(f"{value:.7g}") if math.isfinite(value) else None


def _plain(value: Any) -> Any:
    """What JSON can hold of a value."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, float):
        return _json_number(value)
    return value if value is None or isinstance(value, bool | int | str) else str(value)


class _Lines:
    """What a progress bar writes to where nobody looks at it live: plain lines."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        """Leaves out what moves the cursor or only wipes a line."""
        line = _CONTROL.sub("", text).strip()
        if line:
            self._stream.write(f"{line}\n")

    def flush(self) -> None:
        """As a stream."""
        self._stream.flush()


def sample_row(
    step: int,
    split: str,
    prompt: str,
    response: str,
    *,
    length: int,
    ended: bool,
    score: float | None = None,
    kl: float | None = None,
    columns: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """A line of samples.jsonl, of the same form in all phases.

    Args:
      step: steps (PPO: iterations) done.
      split: "train" or "eval".
      prompt, response: texts, without special tokens.
      length: of the response, in tokens, EOS included.
      ended: whether it has its EOS.
      score: in reward units; None = there is none.
      kl: to the reference, in nats per response; None = it is not known.
      columns: the row's own.

    Returns:
      What JSON can hold.
    """
    own = {str(name): _plain(value) for name, value in (columns or {}).items()}
    content = {"step": step, "split": split, "prompt": prompt, "response": response}
    return content | {"score": score, "kl": kl, "length": length, "ended": ended, "columns": own}


def _import_wandb() -> Any:
    try:
        import wandb
    except ImportError as error:
        raise ValueError("config.log.wandb_project is set, and wandb is not installed: pip install wandb") from error
    return wandb
