"""Simulated runs of three phases: the code that manages a run's files is real, but models and steps are numbers.

`Phase`, `RunLogger`, the functions of the workdir and the manifest are the program's own. The simulator kills a run at
any file operation, cuts the power (data that was not synced is lost or torn), damages files, lets clocks jump, and
sends SIGTERM. After each fault it starts the same command again. The run must end with the right numbers, or stop with
an error message.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import random
import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

from jax_rlhf.cli.model_paths import check_inputs, sft_model
from jax_rlhf.cli.open_workdir import forget_failed_start, forget_overwritten, open_workdir
from jax_rlhf.config import run_config
from jax_rlhf.hub import CheckpointError
from jax_rlhf.hub.folder import replaced_folder
from jax_rlhf.runtime import manifest, phase as phases
from jax_rlhf.runtime.checkpoint import RestoreError
from jax_rlhf.runtime.completeness import mark_synced, was_synced
from jax_rlhf.runtime.manifest import export_model
from jax_rlhf.runtime.notes import with_digest
from jax_rlhf.runtime.preemption import Stopped, StopSignals
from jax_rlhf.runtime.run_logger import sample_row
from jax_rlhf.runtime.workdir import WorkdirError, status

PHASES = ("sft", "reward", "ppo")
STEPS = 4
WORDS = (WorkdirError, CheckpointError, manifest.ManifestError, OSError)
"""Errors that may end a run: `python -m jax_rlhf` prints them and exits with code 1."""


class Killed(BaseException):
    """The process was killed. Whatever its exception handlers do afterwards is undone."""


class Disk:
    """A folder, a copy of what would survive a power cut, and the moment at which the process is killed.

    A file survives with the content of its last fsync, and the names in a folder as of the folder's last fsync.
    """

    def __init__(self, folder: Path, random_numbers: random.Random) -> None:
        self.live, self.safe = folder / "live", folder / "safe"
        self.live.mkdir(parents=True)
        self.safe.mkdir()
        self._random, self._left, self._cut, self._frozen = random_numbers, None, False, folder / "frozen"
        self._contents: dict[int, bytes] = {}  # inode → content of a synced file
        self._folders: dict[Path, int] = {}  # safe folder → inode of the live folder that it copies

    def plan(self, left: int | None, *, power_cut: bool = False) -> None:
        self._left, self._cut = left, power_cut

    def operation(self) -> None:
        """Called before each operation on a file."""
        if self._left is None:
            return
        self._left -= 1
        if self._left == 0:
            shutil.rmtree(self._frozen, ignore_errors=True)
            shutil.copytree(self.live, self._frozen)
        if self._left <= 0:
            raise Killed

    def synced(self, path: Path) -> None:
        """Records an fsync. It makes a file's content safe, also after a rename, or the names in a folder."""
        if not path.is_relative_to(self.live):
            return
        target = self.safe / path.relative_to(self.live)
        if path.is_file():
            self._contents[path.stat().st_ino] = path.read_bytes()
            if target.is_file():
                target.write_bytes(path.read_bytes())
        elif path.is_dir():
            self._take_names(path, target)

    def _take_names(self, folder: Path, target: Path) -> None:
        target.mkdir(parents=True, exist_ok=True)
        entries = {entry.name: entry for entry in folder.iterdir()}
        for entry in list(target.iterdir()):
            if entry.name not in entries or entry.is_dir() != entries[entry.name].is_dir():
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        for name, entry in entries.items():
            if entry.is_file():
                (target / name).write_bytes(self._contents.get(entry.stat().st_ino, b""))
            elif self._folders.get(target / name) != entry.stat().st_ino or not (target / name).exists():
                # The folder is new, or was replaced.
                shutil.rmtree(target / name, ignore_errors=True)
                self._folders[target / name] = entry.stat().st_ino
                self._take_names(entry, target / name)

    def restart(self) -> None:
        """Sets the files to what the next process finds."""
        self.plan(None, power_cut=self._cut)
        if self._frozen.exists():
            shutil.rmtree(self.live)
            self._frozen.rename(self.live)
            if self._cut:
                self._lose(Path())
        self.plan(None)
        self.settle()

    def settle(self) -> None:
        """Makes all current files and folders safe from a power cut."""
        shutil.rmtree(self.safe)
        shutil.copytree(self.live, self.safe)
        files = (path for path in self.live.rglob("*") if path.is_file())
        self._contents = {path.stat().st_ino: path.read_bytes() for path in files}
        folders = (path for path in self.live.rglob("*") if path.is_dir())
        self._folders = {self.safe / path.relative_to(self.live): path.stat().st_ino for path in folders}

    def _lose(self, inside: Path) -> None:
        live, safe = self.live / inside, self.safe / inside
        names = {entry.name for entry in live.iterdir()} | {e.name for e in safe.iterdir()} if safe.is_dir() else set()
        for name in sorted(names):
            one, other = live / name, safe / name
            if one.is_dir() and other.is_dir():
                self._lose(inside / name)
            elif not other.exists():  # a new name that was not synced
                if self._random.random() < 0.5:
                    shutil.rmtree(one) if one.is_dir() else one.unlink()
                elif one.is_file():
                    self._tear(one, 0)
            elif not one.exists():  # a deletion that was not synced
                if self._random.random() < 0.5:
                    shutil.copytree(other, one) if other.is_dir() else shutil.copyfile(other, one)
            elif one.is_file() and other.is_file() and one.read_bytes() != other.read_bytes():
                if one.read_bytes().startswith(other.read_bytes()):
                    self._tear(one, other.stat().st_size)  # lines were appended
                elif self._random.random() < 0.5:
                    shutil.copyfile(other, one)

    def _tear(self, file: Path, least: int) -> None:
        size = file.stat().st_size
        os.truncate(file, self._random.randint(min(least, size), size))


def digest(*parts: object) -> str:
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).hexdigest()


class Leaf(str):
    """Stands for an array, whose memory can be freed, and for a model, which has a dtype."""

    deleted = False
    model = SimpleNamespace(config=SimpleNamespace(dtype="float32"))

    def delete(self) -> None:
        self.deleted = True


class FakeCheckpoints:
    """Checkpoints of one number, written like orbax's: to a temporary folder, renamed, synced, old ones deleted."""

    disk: Disk
    word = "none of the checkpoints can be read"

    def __init__(self, folder, config, *, asynchronous=True, print_line=print):
        del asynchronous
        self.folder, self._config, self._print_line, self._waiting = Path(folder), config, print_line, None
        self.folder.mkdir(parents=True, exist_ok=True)
        for half_done in self.folder.glob("*.orbax-checkpoint-tmp"):
            shutil.rmtree(half_done)

    @property
    def steps(self):
        return sorted(int(path.name) for path in self.folder.iterdir() if path.name.isdigit())

    saving = False

    def improves(self, metric):
        del metric
        return False

    def save(self, step, state, notes, metric=None):
        self.wait()
        self._waiting = step, json.loads(json.dumps({"state": state, "notes": notes, "metric": metric, "arrays": {}}))

    def check(self):
        self.wait()

    def wait(self):
        if self._waiting is None:
            return
        (step, content), self._waiting = self._waiting, None
        partial = self.folder / f"{step}.orbax-checkpoint-tmp"
        shutil.rmtree(partial, ignore_errors=True)
        (partial / "notes").mkdir(parents=True)
        self.disk.operation()
        (partial / "notes" / "metadata").write_text(json.dumps(with_digest(content)))
        self.disk.operation()
        shutil.rmtree(self.folder / str(step), ignore_errors=True)
        partial.rename(self.folder / str(step))
        self.disk.operation()
        mark_synced(self.folder / str(step))
        for old in self.steps[: -self._config.keep]:
            self.disk.operation()
            shutil.rmtree(self.folder / str(old))

    def close(self):
        self.wait()

    def restore(self, like):
        del like
        found = self.steps
        for step in reversed(found):
            content = self._content(step)
            if content is None:
                self._print_line(f"{step} is damaged")
                continue
            for other in [other for other in found if other > step]:
                shutil.rmtree(self.folder / str(other))
            return FakeRestored(step, {"number": Leaf(content["state"]["number"])}, content["notes"])
        if found:
            raise RestoreError(f"{self.folder}: {self.word}")
        return None

    def _content(self, step):
        """The content of a checkpoint, or None if it is damaged."""
        try:
            content = json.loads((self.folder / str(step) / "notes" / "metadata").read_text())
            whole = with_digest({k: v for k, v in content.items() if k != "digest"})["digest"] == content["digest"]
        except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
            return None
        return content if whole else None

    def drop_unfinished(self):
        for step in self.steps if len(self.steps) == 1 else ():
            if not was_synced(self.folder / str(step)) and self._content(step) is None:
                shutil.rmtree(self.folder / str(step))


@dataclasses.dataclass
class FakeRestored:
    step: int
    state: dict
    notes: dict


class StopAt(StopSignals):
    """Asks the run to stop at the n-th point where it can stop; None = never."""

    def __init__(self, point):
        super().__init__()
        self.left = point

    def on_any_process(self, *others):
        if self.left is not None:
            self.left -= 1
            self.reason = "SIGTERM" if self.left <= 0 else None
        return (self.reason is not None, *others)


def model_of(folder: Path) -> str:
    return json.loads((folder / "config.json").read_text())["number"]


def run_phase(phase: str, config, workdir: Path, stop: StopSignals) -> None:
    """Runs a phase whose parameters are a hash, updated once per step, starting from the previous phase's model."""
    former = {"sft": None, "reward": "sft", "ppo": "reward"}[phase]
    began = "base" if former is None else model_of(workdir / former / "model")
    with phases.Phase(workdir / phase, config.phase, stop) as running:
        logger = running.logger
        running.restore({"number": Leaf(began)}, {"the data": "d"})

        def evaluate(step):
            for _ in logger.progress_bar([1, 2], "evaluating"):
                pass
            logger.log_metrics(step, {"eval/number": int(running.state["number"], 36) % 1e6 if step else 0.0})
            logger.log_samples([sample_row(step, "eval", "p", running.state["number"], length=1, ended=True)])
            return {}

        with running.saving(lambda: export_model(workdir / phase / "model", running.state["number"])):
            for step in running.steps(STEPS, "step", evaluate, 2):
                assert not running.state["number"].deleted
                number = digest(running.state["number"], phase, step)
                logger.log_metrics(step + 1, {"train/loss": float(step)})
                running.done({"number": Leaf(number)})
        running.finish({"steps": running.step})


def expected() -> str:
    number = "base"
    for phase in PHASES:
        for step in range(STEPS):
            number = digest(number, phase, step)
    return number


def fake_save(folder: Path, number: str, *, dtype: str) -> None:
    del dtype
    with replaced_folder(Path(folder)) as fresh:
        (fresh / "config.json").write_text(json.dumps({"number": str(number)}))


def run(config, workdir: Path, stop: StopSignals) -> None:
    """Does what `python -m jax_rlhf` does with the workdir."""
    settings = run_config(config)
    try:
        open_workdir(workdir, config, settings.phases, overwrite=False)
        for phase in settings.phases:
            stop.check()
            if status(workdir, phase) == "finished":
                continue
            if status(workdir, phase) == "partial":
                raise WorkdirError("partial")
            if phase != "sft":
                sft_model(settings, workdir)
            check_inputs(settings, workdir, phase, accept_changes=False)
            run_phase(phase, settings, workdir, stop)
    except BaseException as error:
        if not isinstance(error, Stopped | Killed):
            forget_failed_start(workdir)
        raise
    forget_overwritten(workdir)


@contextlib.contextmanager
def simulated(disk: Disk, clock: random.Random):
    """Replaces the program's file operations by those of this disk, and its clocks by clocks that jump."""
    fsync, replace, opened, rename = os.fsync, os.replace, Path.open, Path.rename

    def on_fsync(handle):
        disk.operation()
        fsync(handle)
        disk.synced(Path(os.readlink(f"/proc/self/fd/{handle}")))

    def before(call):
        def called(*args, **options):
            disk.operation()
            return call(*args, **options)

        return called

    seconds = [1e6]

    def monotonic():
        seconds[0] += 0.001  # not a real clock, so that a seed gives the same files byte for byte
        return seconds[0]

    def jumping():
        if clock.random() < 0.05:
            seconds[0] += clock.uniform(0, 3600)
        return monotonic() + (clock.uniform(-7200, 7200) if clock.random() < 0.05 else 0)

    with contextlib.ExitStack() as patches:
        for target, name, value in (
            (os, "fsync", on_fsync),
            (os, "replace", before(replace)),
            (Path, "open", before(opened)),
            (Path, "rename", before(rename)),
            (time, "time", jumping),
            (time, "perf_counter", jumping),
            (time, "monotonic", monotonic),
            (phases, "Checkpoints", FakeCheckpoints),
            (phases, "abstract", lambda state: state),
            (manifest, "save_pretrained", fake_save),
            (FakeCheckpoints, "disk", disk),
        ):
            patches.enter_context(mock.patch.object(target, name, value, create=True))
        yield


def scenario(folder: Path, seed: int, config) -> dict[str, int]:
    """Starts a run again and again, with faults in between, until all phases are finished.

    Args:
      folder: an empty folder.
      seed: the seed of all faults.
      config: the run's config.

    Returns:
      name → count, of the starts and of each kind of fault.

    Raises:
      AssertionError: the run's results are wrong, or it stopped although no file was damaged.
    """
    numbers = random.Random(seed)
    disk, counts = Disk(folder, numbers), dict.fromkeys(("runs", "kills", "power cuts", "terms", "damage", "words"), 0)
    workdir, lost_lines, copies = disk.live / "run", False, {}
    with simulated(disk, random.Random(seed + 1)):
        for attempt in range(200):
            fault = numbers.choice(["kill", "power cut", "term"]) if attempt < 12 else "none"
            stop = StopAt(numbers.randint(1, 20) if fault == "term" else None)
            if fault in ("kill", "power cut"):
                disk.plan(numbers.randint(1, 150), power_cut=fault == "power cut")
            counts["runs"] += 1
            try:
                run(config, workdir, stop)
                ended = "finished"
            except Killed:
                ended = fault
                counts["kills" if fault == "kill" else "power cuts"] += 1
            except Stopped:
                ended = "term"
                counts["terms"] += 1
            except WORDS as error:
                if not (copies and str(error)):
                    raise AssertionError("it stopped, and nothing was damaged") from error
                counts["words"] += 1
                ended, word = "word", str(error)
            disk.restart()
            if ended == "finished":
                break
            if ended == "word":
                put_back(disk.live, copies, word)
            if ended != "word" and numbers.random() < 0.4:
                lost_lines |= damage(disk.live, numbers, copies)
                counts["damage"] += 1
            disk.settle()
        else:
            raise AssertionError("it never finished")
    check(workdir, lost_lines)
    return counts


def put_back(folder: Path, copies: dict, word: str) -> None:
    """Restores, from copies, the damaged files that an error names, or all of them if it names none."""
    named = [name for name in copies if name in word or f"{name.partition('/checkpoints/')[0]}/checkpoints:" in word]
    for name in named or list(copies):
        content, harmed = copies.pop(name)
        # A checkpoint that the run has discarded since is not restored, because its lines of metrics are gone.
        if bytes_of(folder / name) == harmed and (folder / name).parent.is_dir():
            (folder / name).write_bytes(content)


def bytes_of(file: Path) -> bytes | None:
    return file.read_bytes() if file.is_file() else None


def damage(folder: Path, numbers: random.Random, copies: dict) -> bool:
    """Damages one file. Returns whether lines of metrics or samples may be lost."""
    # The lines of a finished phase are left alone: only `python -m jax_rlhf.verify` reads them again.
    done = [path.parent for path in folder.rglob("summary.json")]
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    files = sorted(path for path in files if path.suffix != ".jsonl" or path.parent not in done)
    if not files or len(done) == len(PHASES):
        return False
    file = numbers.choice(files)
    content = file.read_bytes()
    name = str(file.relative_to(folder))
    lines = file.suffix == ".jsonl"
    match numbers.choice(["cut", "empty", "delete"] if lines else ["cut", "empty", "delete", "flip", "null", "list"]):
        case "cut":
            file.write_bytes(content[: numbers.randint(0, len(content))])
        case "empty":
            file.write_bytes(b"")
        case "delete":
            file.unlink()
        case "flip":
            place = numbers.randrange(len(content)) if content else 0
            file.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :] if content else b"x")
        case "null":
            file.write_bytes(b"null")
        case "list":
            file.write_bytes(b"[1]")
    former = copies.get(name)
    whole = former[0] if former is not None and former[1] == content else content  # a file may be damaged twice
    copies[name] = (whole, bytes_of(file))
    return lines


def check(workdir: Path, lost_lines: bool) -> None:
    """Checks that the run's results are those of a run without faults."""
    assert model_of(workdir / "ppo" / "model") == expected()
    for phase in PHASES:
        assert status(workdir, phase) == "finished"
        manifest.check_model(workdir / phase / "model")
        rows = [json.loads(line) for line in (workdir / phase / "metrics.jsonl").read_text().splitlines()]
        steps = [row["step"] for row in rows if "train/loss" in row]
        assert steps == sorted(set(steps)), f"{phase}: a step is there twice: {steps}"
        evaluations = [row["step"] for row in rows if "eval/number" in row]
        assert evaluations == sorted(set(evaluations)), f"{phase}: an evaluation is there twice: {evaluations}"
        samples = [json.loads(line)["step"] for line in (workdir / phase / "samples.jsonl").read_text().splitlines()]
        assert samples == sorted(set(samples)), f"{phase}: a sample is there twice: {samples}"
        if not lost_lines:
            assert steps == list(range(1, STEPS + 1)), f"{phase}: {steps}"
            assert evaluations == samples == [2, 4], f"{phase}: {evaluations}, {samples}"
