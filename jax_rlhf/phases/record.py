"""What a phase leaves behind while it runs: a progress bar, metrics.jsonl, samples.jsonl, TensorBoard, W&B."""

import contextlib
import json
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import jax
import tensorboardX
from absl import logging
from tqdm import tqdm

from jax_rlhf.parallel import any_process
from jax_rlhf.phases.config import LogConfig


class Record:
    """Writes down a phase; a context manager. Only process 0 writes.

    While it is open, the first Ctrl-C lets the step at hand finish, ends the loop, and is raised as KeyboardInterrupt
    once all is saved; the second stops at once.

    Attributes:
      folder: <workdir>/<phase>.
      interrupted: Ctrl-C was pressed.
      cut_short: a part of the phase was left out for that.
    """

    def __init__(self, folder: Path, config: LogConfig) -> None:
        """Makes the folder.

        Args:
          folder: <workdir>/<phase>.
          config: where metrics go.

        Raises:
          ValueError: Weights & Biases is wanted, and not installed.
          OSError: the folder cannot be written.
        """
        self.folder, self.phase, self.interrupted, self.cut_short = folder, folder.name, False, False
        self._config, self._started, self._writes = config, time.perf_counter(), jax.process_index() == 0
        self._wandb = _import_wandb() if config.wandb_project else None
        self._bar: tqdm | None = None
        self._files: dict[str, Any] = {}
        self._board, self._run, self._handler = None, None, None
        if self._writes:
            folder.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> "Record":
        """Opens the files."""
        if self._writes:
            for name in ("metrics", "samples"):
                self._files[name] = (self.folder / f"{name}.jsonl").open("w", encoding="utf-8")
            if self._config.tensorboard:
                self._board = tensorboardX.SummaryWriter(str(self.folder / "tensorboard"))
            if self._wandb is not None:
                self._run = self._wandb.init(project=self._config.wandb_project, name=self.phase, dir=str(self.folder))
        with contextlib.suppress(ValueError):  # not in the main thread: Ctrl-C is somebody else's
            self._handler = signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes the files, whatever happened."""
        if self._handler is not None:
            signal.signal(signal.SIGINT, self._handler)
        if self._bar is not None:
            self._bar.close()
        for file in self._files.values():
            file.close()
        if self._board is not None:
            self._board.close()
        if self._run is not None:
            self._run.finish(exit_code=int(error is not None))
        if error is None and any_process(self.interrupted):
            stop = KeyboardInterrupt()
            stop.agreed = True
            raise stop

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True
        self.say("Ctrl-C: this step is finished and what was trained is saved; Ctrl-C once more stops at once.")

    def goes_on(self) -> bool:
        """Whether the next part of the phase should begin.

        Returns:
          False after Ctrl-C in any process, all of which must call it; the phase then counts as unfinished.
        """
        self.cut_short |= any_process(self.interrupted)
        return not self.cut_short

    def steps(self, total: int, unit: str = "step") -> Iterator[int]:
        """0 … total − 1 with a progress bar, until Ctrl-C.

        Args:
          total: how many.
          unit: what the bar calls them.

        Yields:
          The step.
        """
        self._bar = self._progress(total, self.phase, unit)
        for step in range(total):
            if not self.goes_on():
                break
            yield step
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
        """
        with self._progress(len(batches), f"{self.phase}: {what}", "batch", leave=False) as bar:
            for batch in batches:
                yield batch
                bar.update()

    def _progress(self, total: int, title: str, unit: str, *, leave: bool = True) -> tqdm:
        seldom = 0.1 if sys.stderr.isatty() else 5.0  # seconds; a log file gets few lines
        quiet = not self._writes
        return tqdm(
            total=total, desc=title, unit=unit, leave=leave, disable=quiet, mininterval=seldom, dynamic_ncols=True
        )

    def metrics(self, step: int, values: Mapping[str, float], **shown: float) -> None:
        """Writes metrics, and shows some of them beside the bar.

        Args:
          step: steps (or iterations) done.
          values: name → number.
          shown: for the progress bar.
        """
        numbers = {name: float(value) for name, value in values.items()}
        seconds = round(time.perf_counter() - self._started, 3)
        self._line("metrics", {"step": step, "seconds": seconds} | {n: _json_number(v) for n, v in numbers.items()})
        if self._board is not None:
            for name, number in numbers.items():
                self._board.add_scalar(name, number, step)
        if self._run is not None:
            self._run.log(numbers, step=step)
        if self._bar is not None and shown:
            self._bar.set_postfix({name: f"{value:.4g}" for name, value in shown.items()}, refresh=False)

    def samples(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Writes samples.

        Args:
          rows: one mapping each.
        """
        for row in rows:
            numbers = {k: _json_number(v) if isinstance(v, float) else v for k, v in row.items()}
            self._line("samples", numbers)

    def say(self, text: str) -> None:
        """Prints a line above the progress bar.

        Args:
          text: the line.
        """
        if self._writes:
            tqdm.write(f"[{time.strftime('%H:%M:%S')}] {self.phase}: {text}", file=sys.stdout)
            sys.stdout.flush()

    @contextlib.contextmanager
    def saving(self, save: Callable[[], None]) -> Iterator[None]:
        """Saves what was trained when the block ends, and where it fails too.

        Of several processes all must save, so that one that fails by itself does not.

        Args:
          save: writes the model.

        Yields:
          Nothing.
        """
        try:
            yield
        except BaseException as error:
            if jax.process_count() > 1 and not getattr(error, "agreed", False):
                raise
            try:
                save()
                self.say(f"{type(error).__name__}; what was trained until then is saved in {self.folder}.")
            except Exception as second:  # the first one is the one to be seen; its update may have eaten the parameters
                logging.error("%s: what was trained could not be saved: %s", self.folder, second)
            raise
        save()

    def summary(self, values: Mapping[str, Any]) -> None:
        """Writes summary.json, which says that the phase ended and how.

        Args:
          values: what to tell of it.
        """
        if self._writes:
            content = {"finished": not self.cut_short, "seconds": round(time.perf_counter() - self._started, 1)}
            content |= {k: _json_number(v) if isinstance(v, float) else v for k, v in values.items()}
            (self.folder / "summary.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    def _line(self, name: str, content: Mapping[str, Any]) -> None:
        if name in self._files:
            self._files[name].write(json.dumps(content, ensure_ascii=False) + "\n")
            self._files[name].flush()


def _json_number(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON knows no NaN


def _import_wandb() -> Any:
    try:
        import wandb
    except ImportError as error:
        raise ValueError("config.log.wandb_project is set, and wandb is not installed: pip install wandb") from error
    return wandb


def printable(text: str, length: int = 160) -> str:
    """A text on one line of a terminal: without control characters, cut where it is long.

    Args:
      text: any text.
      length: longest, in characters.

    Returns:
      The line.
    """
    line = "".join(character if character.isprintable() else " " for character in text)
    return line if len(line) <= length else line[: length - 1] + "…"
