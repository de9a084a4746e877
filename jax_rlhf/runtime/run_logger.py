"""The log of a phase: a progress bar, metrics.jsonl, samples.jsonl, summary.json, TensorBoard, Weights & Biases."""

import contextlib
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
from jax_rlhf.runtime.config import LogConfig
from jax_rlhf.runtime.json_lines import end_of_step, line_before, line_digest, seconds_of
from jax_rlhf.runtime.manifest import begin_manifest
from jax_rlhf.runtime.preemption import StopSignals
from jax_rlhf.runtime.tensorboard import TensorBoard

_FILES = "metrics", "samples"
_LINE_EVERY = 30.0  # seconds between lines of progress in a log file
_LINE = "{desc}: {n_fmt} of {total_fmt}, {elapsed} so far, {remaining} left{postfix}"
_CONTROL = re.compile(r"\r|\x1b\[[0-9;]*[A-Za-z]")


class RunLogger:
    """Logs a phase; a context manager. Only process 0 writes.

    A file is opened when its first line is written. So a phase that fails earlier leaves existing files unchanged.

    Attributes:
      folder: <workdir>/<phase>.
      phase: its name.
      stop: the signal handlers that ask the run to stop.
      heartbeats: steps and batches so far, of training and of evaluations.
    """

    def __init__(
        self,
        folder: Path,
        config: LogConfig,
        stop: StopSignals | None = None,
        *,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        """Makes the folder.

        Args:
          folder: <workdir>/<phase>.
          config: where metrics go.
          stop: the run's signal handlers; None = the logger installs its own while it is open.
          settings: all settings of the run, for Weights & Biases.

        Raises:
          ValueError: the settings ask for Weights & Biases, which is not installed.
          OSError: the folder cannot be written.
        """
        self.folder, self.phase, self.stop = folder, folder.name, stop or StopSignals()
        self._own_stop, self._settings = stop is None, settings
        self._config, self._started, self._writes = config, time.perf_counter(), jax.process_index() == 0
        self._wandb: Any = _import_wandb() if config.wandb_project else None
        self._bar: tqdm | None = None
        self._files: dict[str, BinaryIO] = {}
        self._board, self._run, self._resumed_at, self.heartbeats = None, None, {}, 0
        self._last: dict[str, str] = dict.fromkeys(_FILES, line_digest(b""))
        self._widths: set[int] = set()
        if self._writes:
            folder.mkdir(parents=True, exist_ok=True)
            begin_manifest(folder)

    def __enter__(self) -> "RunLogger":
        """Installs signal handlers, if the run has none."""
        if self._own_stop:
            self.stop.install()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes all files, also after an error."""
        if self._own_stop:
            self.stop.uninstall()
        if self._bar is not None:
            self._bar.close()
        with contextlib.ExitStack() as stack:  # closes each, even if closing another one fails
            if self._run is not None:
                stack.callback(self._run.finish, exit_code=int(error is not None))
            if self._board is not None:
                stack.callback(self._board.close)
            for name, file in self._files.items():
                stack.enter_context(file_errors(self.folder / f"{name}.jsonl"))
                stack.callback(file.close)

    def position(self) -> dict[str, Any]:
        """The current ends of the files, for `continue_from`.

        Returns:
          JSON values: bytes of each file, a digest of its last line, seconds since the phase began. Empty except on
          process 0.
        """
        if not self._writes:
            return {}
        sizes = {name: self._file(name).tell() for name in _FILES}
        run = {} if self._run is None else {"wandb": self._run.id}
        return {"seconds": self._seconds(), "bytes": sizes, "last": dict(self._last)} | run

    def continue_from(self, position: Mapping[str, Any], step: int, *, evaluated: bool = True) -> float:
        """Continues from a checkpoint: removes the lines that were written after it.

        Args:
          position: the files' ends at the checkpoint.
          step: steps done at the checkpoint.
          evaluated: whether the evaluation of that step was already logged then.

        Returns:
          Seconds of the logged steps that are removed and will be repeated.
        """
        self._resumed_at = dict(position) | {"step": step}
        self._started = time.perf_counter() - position.get("seconds", 0.0)
        lost = {}
        for name in _FILES if self._writes else ():
            with file_errors(self.folder / f"{name}.jsonl"):
                lost[name] = self._cut(name, position, step, evaluated=evaluated)
        return lost.get("metrics", 0.0)

    def _cut(self, name: str, position: Mapping[str, Any], step: int, *, evaluated: bool) -> float:
        """Removes a file's lines after a position. Returns the seconds from the position to the last of them."""
        size, file, lost = position["bytes"][name], self._file(name), 0.0
        end = file.seek(0, os.SEEK_END)
        last = line_digest(line_before(file, size))
        if size <= end and last == position.get("last", {}).get(name, last):  # older checkpoints have none
            line = line_before(file, end)
            if not line.endswith(b"\n"):  # half a line, which a killed process left
                line = line_before(file, end - len(line))
            lost = max(0.0, seconds_of(line) - position.get("seconds", 0.0))
        else:  # the file has changed since, so bytes do not tell where a step's lines end
            size = end_of_step(file, step, evaluated=evaluated)
            self.info(
                f"{self.folder / name}.jsonl has changed since step {step} was saved. Logging continues after its last "
                "complete line of an earlier step."
            )
        file.truncate(size)
        self._last[name] = line_digest(line_before(file, size))
        file.seek(size)
        return lost

    def sync(self) -> None:
        """Flushes all files to the disk."""
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
            self._files[name] = path.open("r+b" if self._resumed_at and path.is_file() else "w+b")
        return self._files[name]

    def steps(self, start: int, total: int, unit: str = "step") -> Iterator[int]:
        """start … total − 1 with a progress bar.

        Args:
          start: steps done before.
          total: steps of the phase.
          unit: name of a step on the progress bar.

        Yields:
          The step.
        """
        self._bar = self._progress(total, self.phase, unit, done=start)
        for step in range(start, total):
            yield step
            self.heartbeats += 1
            self._bar.update()
        self._bar.close()
        self._bar = None

    def progress_bar(self, batches: Sequence[Any], what: str) -> Iterator[Any]:
        """Iterates over batches with a progress bar, which disappears at the end.

        Args:
          batches: any sequence.
          what: the bar's label, e.g. "evaluating".

        Yields:
          Each batch.

        Raises:
          Stopped: any process was asked to stop.
        """
        with self._progress(len(batches), f"{self.phase}: {what}", "batch", leave=False) as bar:
            for batch in batches:
                self.stop.check()
                yield batch
                self.heartbeats += 1
                bar.update()

    def _progress(self, total: int, title: str, unit: str, *, done: int = 0, leave: bool = True) -> tqdm:
        shown = {"total": total, "initial": done, "desc": title, "unit": unit, "disable": not self._writes}
        if sys.stderr.isatty():
            return tqdm(leave=leave, dynamic_ncols=True, **shown)
        seldom = {"mininterval": _LINE_EVERY, "delay": _LINE_EVERY}
        return tqdm(leave=False, file=_Lines(sys.stderr), bar_format=_LINE, **seldom, **shown)

    def log_metrics(self, step: int, values: Mapping[str, float], **shown: float) -> None:
        """Writes metrics, and shows some of them on the progress bar.

        Args:
          step: steps (or iterations) done.
          values: name → number.
          shown: values for the progress bar.
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

    def log_samples(self, rows: Sequence[Mapping[str, Any]]) -> None:
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

    def note_width(self, step: int, batch: Any) -> None:
        """Announces that XLA compiles again, if no earlier batch had this batch's width.

        Args:
          step: steps done.
          batch: a tree of arrays, the first of them [rows, tokens, …].
        """
        self.heartbeats += 1  # reading a batch is a sign of activity
        width = jax.tree.leaves(batch)[0].shape[1]
        if self._widths and width not in self._widths:
            self.info(f"step {step}: compiling for batches that are {width} tokens wide")
        self._widths.add(width)

    def info(self, text: str) -> None:
        """Prints a line above the progress bar.

        Args:
          text: the line.
        """
        if self._writes:
            tqdm.write(f"[{time.strftime('%H:%M:%S')}] {self.phase}: {printable_lines(text)}", file=sys.stdout)
            sys.stdout.flush()

    def log_datasets(self, datasets: Datasets) -> None:
        """Prints how many rows each data set has, how many were left out and why, and an example."""
        for line in (datasets.report, *datasets.notes, datasets.example):
            self.info(line.removeprefix(f"{self.phase} "))  # which info() adds

    def write_summary(self, values: Mapping[str, Any]) -> None:
        """Writes summary.json, which marks the phase as finished.

        Args:
          values: results of the phase, JSON values.
        """
        if self._writes:
            content = {"finished": True, "seconds": round(self._seconds(), 1)}
            content |= {k: _json_number(v) if isinstance(v, float) else v for k, v in values.items()}
            self.sync()  # the files that it summarises reach the disk first
            write_text(self.folder / "summary.json", json.dumps(content, indent=2) + "\n")

    def _line(self, name: str, content: Mapping[str, Any]) -> None:
        if self._writes:
            file = self._file(name)
            line = json.dumps(content, ensure_ascii=False)
            # Control characters and lone surrogates become JSON escapes: a terminal would interpret the former.
            written = ("".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in line) + "\n").encode()
            with file_errors(self.folder / f"{name}.jsonl"):
                file.write(written)
                file.flush()
            self._last[name] = line_digest(written)

    def _open_boards(self) -> None:
        if not self._writes:
            return
        if self._config.tensorboard and self._board is None:
            first = self._resumed_at["step"] + 1 if self._resumed_at else 0
            self._board = TensorBoard(self.folder / "tensorboard", first)
        if self._wandb is not None and self._run is None:
            again = {"id": self._resumed_at["wandb"], "resume": "allow"} if "wandb" in self._resumed_at else {}
            run = self.folder.resolve().parent.name
            names = {"project": self._config.wandb_project, "name": f"{run}/{self.phase}", "group": run}
            config = dict(self._settings or {})
            where = {"job_type": self.phase, "dir": str(self.folder)}
            self._run = self._wandb.init(config=json.loads(json.dumps(config, default=str)), **names, **where, **again)


def _json_number(value: float) -> float | None:
    """Rounded to the seven digits of float32. None for NaN and infinities, which JSON does not have."""
    return float(f"{value:.7g}") if math.isfinite(value) else None


def _plain(value: Any) -> Any:
    """A JSON value: others become text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, float):
        return _json_number(value)
    return value if value is None or isinstance(value, bool | int | str) else str(value)


class _Lines:
    """A stream for progress bars in log files: writes plain lines only."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        """Drops control sequences and empty lines."""
        line = _CONTROL.sub("", text).strip()
        if line:
            self._stream.write(f"{line}\n")

    def flush(self) -> None:
        """Flushes the stream."""
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
    """A line of samples.jsonl; all phases write the same form.

    Args:
      step: steps (PPO: iterations) done.
      split: "train" or "eval".
      prompt, response: texts, without special tokens.
      length: of the response, in tokens, EOS included.
      ended: whether it has its EOS.
      score: in reward units; None = not scored.
      kl: KL to the reference, in nats per response; None = not computed.
      columns: the other columns of the data's row.

    Returns:
      JSON values.
    """
    own = {str(name): _plain(value) for name, value in (columns or {}).items()}
    content = {"step": step, "split": split, "prompt": prompt, "response": response}
    return content | {"score": score, "kl": kl, "length": length, "ended": ended, "columns": own}


def _import_wandb() -> Any:
    try:
        import wandb  # pyright: ignore[reportMissingImports]  # optional
    except ImportError as error:
        raise ValueError("config.log.wandb_project is set, and wandb is not installed: pip install wandb") from error
    return wandb
