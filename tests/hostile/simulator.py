"""Runs of three phases without models: what decides about a run's files is real, its steps and arrays are numbers.

`Progress`, `Record`, the workdir's functions and the manifest are the program's own. In between, a run is killed at any
file operation, the power is cut (what was not synced is lost, or torn), files are damaged, clocks jump, and SIGTERM
comes. After each the same command is given again. It ends with the right numbers, or stops with a word.
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
"""Errors by which a run may end: `python -m jax_rlhf` shows them, exit code 1."""


class Killed(BaseException):
    """The process is no more; what handlers do afterwards is undone."""


class Disk:
    """A folder, what of it is safe from a power cut, and the moment at which the process is killed.

    Files are safe as they were when they were synced, names as they were when their folder was.
    """

    def __init__(self, folder: Path, random_numbers: random.Random) -> None:
        self.live, self.safe = folder / "live", folder / "safe"
        self.live.mkdir(parents=True)
        self.safe.mkdir()
        self._random, self._left, self._cut, self._frozen = random_numbers, None, False, folder / "frozen"
        self._contents: dict[int, bytes] = {}  # of synced files, by inode
        self._folders: dict[Path, int] = {}  # whose inode a safe folder is of

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
        """What an fsync makes safe: a file's content, wherever it is renamed to, or a folder's names."""
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
                # It is new there, or was exchanged.
                shutil.rmtree(target / name, ignore_errors=True)
                self._folders[target / name] = entry.stat().st_ino
                self._take_names(entry, target / name)

    def restart(self) -> None:
        """The files as the next process finds them."""
        self.plan(None, power_cut=self._cut)
        if self._frozen.exists():
            shutil.rmtree(self.live)
            self._frozen.rename(self.live)
            if self._cut:
                self._lose(Path())
        self.plan(None)
        self.settle()

    def settle(self) -> None:
        """All that there is now is safe."""
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
            elif not other.exists():  # a new name that nobody synced
                if self._random.random() < 0.5:
                    shutil.rmtree(one) if one.is_dir() else one.unlink()
                elif one.is_file():
                    self._tear(one, 0)
            elif not one.exists():  # a deletion that nobody synced
                if self._random.random() < 0.5:
                    shutil.copytree(other, one) if other.is_dir() else shutil.copyfile(other, one)
            elif one.is_file() and other.is_file() and one.read_bytes() != other.read_bytes():
                if one.read_bytes().startswith(other.read_bytes()):
                    self._tear(one, other.stat().st_size)  # lines at its end
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
    """Checkpoints of one number, written as orbax does: beside, renamed, synced, and then older ones deleted."""

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
        """None where it is damaged."""
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
    """Is asked to stop at the n-th point where the run could; None = never."""

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
    """A phase's recipe, with a number for the parameters: a chain of hashes from the former phase's model."""
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
    """What `python -m jax_rlhf` does with the workdir."""
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
    """The program's modules, with this disk beneath them, and clocks that jump."""
    fsync, replace, opened, rename = os.fsync, os.replace, Path.open, Path.rename

    def on_fsync(handle):
        disk.operation()
        fsync(handle)
        disk.synced(Path(os.readlink(f"/proc/self/fd/{handle}")))

    def before(call):
        def called(*args, **how):
            disk.operation()
            return call(*args, **how)

        return called

    seconds = [1e6]

    def monotonic():
        seconds[0] += 0.001  # no real clock: a seed gives the same files, byte for byte
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
    """Runs until all phases are finished, with faults in between; AssertionError where something is lost or mixed.

    Args:
      folder: empty.
      seed: of all that happens.
      config: of the run.

    Returns:
      What happened: name → count.
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
    """Mends from a copy what is still damaged of the files that an error names, or of all where it names none."""
    named = [name for name in copies if name in word or f"{name.partition('/checkpoints/')[0]}/checkpoints:" in word]
    for name in named or list(copies):
        content, harmed = copies.pop(name)
        # Not into a checkpoint that the run has given up since: its lines of metrics are gone.
        if bytes_of(folder / name) == harmed and (folder / name).parent.is_dir():
            (folder / name).write_bytes(content)


def bytes_of(file: Path) -> bytes | None:
    return file.read_bytes() if file.is_file() else None


def damage(folder: Path, numbers: random.Random, copies: dict) -> bool:
    """Harms one file; whether that may have cost lines of metrics or samples."""
    # Nobody reads the lines of a finished phase again, but for `python -m jax_rlhf.verify`.
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
    whole = former[0] if former is not None and former[1] == content else content  # it may be harmed twice
    copies[name] = (whole, bytes_of(file))
    return lines


def check(workdir: Path, lost_lines: bool) -> None:
    """What a run left is what it would be without faults."""
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
