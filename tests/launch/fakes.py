"""Fakes of gcloud, a TPU VM, a GPU machine and Slurm: programs on PATH that log their calls and give fixed answers.

`World` writes them to a folder. The file `state` controls what they do, and each call adds a line to the file `calls`.
The fake ssh executes the command line with a local bash, in a home folder per worker, so that quoting is really tested.
"""

import ast
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.processes import ROOT

# Few imports, and Python literals instead of JSON, because a test starts dozens of these programs.
COMMON = f"""#!{sys.executable} -IS
import fcntl, os, sys, time
world, name, arguments = os.environ["WORLD"] + "/", os.path.basename(sys.argv[0]), sys.argv[1:]

def record(**more):
    with open(world + "calls", "a") as file:
        file.write(repr(dict(program=name, arguments=arguments, **more)) + "\\n")

def change(function):
    with open(world + "state", "r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        state = eval(file.read())
        result = function(state)
        file.seek(0)
        file.write(repr(state))
        file.truncate()
    return result
"""

GCLOUD = """
record()
if "ONLY_RECORD" in os.environ:
    sys.exit()
noun, verb = arguments[2:4]

def failure(state):  # [part of a call, the VM's state from then on, exit code], each once
    for entry in state["failures"]:
        part, vm, code = entry
        if part in " ".join(arguments):
            state["failures"].remove(entry)
            if vm:
                state["tpu-vm"] = [vm]
            return code

def play(state):
    if verb == "create":
        state[noun] = list(state["after create"][noun])
        if noun == "queued-resources":
            state["tpu-vm"] = list(state["after create"]["tpu-vm"])
    elif verb == "delete":
        import shutil
        state[noun] = state["tpu-vm"] = []
        for worker in range(state["workers"]):  # the disks go with the VM
            shutil.rmtree(f"{world}worker-{worker}", ignore_errors=True)
    elif verb == "start":
        state["tpu-vm"] = ["READY"]
    elif verb == "describe":
        current = state[noun]
        return current.pop(0) if len(current) > 1 else (current or [None])[0]
    return state["workers"]

def who_can_read(file):  # of the group (0o040) and others (0o004), who must be able to enter each folder too
    readers = os.stat(file).st_mode & 0o044
    while (file := os.path.dirname(file)) + "/" != world:
        readers &= (os.stat(file).st_mode & 0o011) << 2
    return readers

def ssh(worker, command):
    print("SSH: Attempting to connect to worker", worker, file=sys.stderr, flush=True)
    # gcloud splits the command at spaces, and ssh joins it again for the login shell.
    command = " ".join(command.split(" "))
    environment = os.environ | {"HOME": f"{world}worker-{worker}", "WORKER": str(worker)}
    os.chdir(environment["HOME"])
    os.closerange(3, 20)  # ssh hands nothing else on
    code = os.spawnvpe(os.P_WAIT, "bash", ["bash", "-c", command], environment)
    return 128 - code if code < 0 else code

code = change(failure)
if code is not None:
    sys.exit("ERROR: played" if code == 1 else code)
found = change(play)
if verb == "describe":
    if found is None:
        sys.exit(f"ERROR: (gcloud.compute.tpus.{noun}.describe) NOT_FOUND: Resource was not found.")
    print(found)
elif verb in ("ssh", "scp"):
    option = dict(a.partition("=")[::2] for a in arguments if a.startswith("--"))
    workers = range(found) if option["--worker"] == "all" else [int(option["--worker"])]
    for worker in workers:
        os.makedirs(f"{world}worker-{worker}", exist_ok=True)
        if verb == "scp":
            os.umask(0o022)  # most machines' default
            with open(arguments[4], "rb") as source:
                with open(f"{world}worker-{worker}/" + arguments[5].partition(":")[2], "wb") as target:
                    target.write(source.read())
                    record(copied=target.name, open_to=who_can_read(target.name))
    if verb == "ssh":
        codes = [ssh(worker, option["--command"]) for worker in workers]
        sys.exit(next((code for code in codes if code), 0))
"""

# Replaces the interpreter of a worker and of its virtual environments, and jax_rlhf itself.
PYTHON = """
worker = os.environ.get("WORKER", "0")
if arguments[0] == "-c":
    if "ensurepip" in arguments[1] and name not in change(lambda state: state["pythons"]):
        sys.exit(1)
    exec(arguments[1])
    sys.exit()
kept = {name: os.environ.get(name) for name in ("HF_TOKEN", "JAX_COMPILATION_CACHE_DIR", "XLA_CACHES")}
kept["XLA_CACHES"] = os.environ.get("JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES")
record(worker=worker, cwd=os.getcwd(), **kept)
if arguments[:2] == ["-m", "venv"]:
    if arguments[2] == "--clear":
        import shutil
        shutil.rmtree(arguments[3])
    os.makedirs(arguments[-1] + "/bin")
    os.symlink(f"{world}bin/{name}", arguments[-1] + "/bin/python")
elif arguments[:2] == ["-m", "pip"]:
    time.sleep(change(lambda state: state["pip seconds"]))
    sys.exit(change(lambda state: state["pip code"]))
elif arguments[:4] == ["-m", "uv", "python", "find"]:
    print(world + "bin/python3.12")
elif arguments[:2] == ["-m", "jax_rlhf"]:
    def how_far(state):
        state["steps"] += 1
        said = state["progress"]
        return f"sft {state['steps']}" if not said else said.pop(0) if len(said) > 1 else said[0]
    code = change(lambda state: (state["exit codes"].get(worker) or [0]).pop(0))
    print("a line of the log, then", code, flush=True)
    if "JAX_RLHF_PROGRESS_FILE" in os.environ and worker == "0":
        with open(os.environ["JAX_RLHF_PROGRESS_FILE"], "w") as told:
            told.write(change(how_far) + "\\n")
    if code == "hang":
        import signal
        def save(number, frame):
            print("saved after", signal.Signals(number).name, flush=True)
            sys.exit(75)
        signal.signal(signal.SIGTERM, save)
        signal.signal(signal.SIGINT, save)
        open(world + "hanging", "w").close()
        for _ in range(300):
            time.sleep(0.1)
    sys.exit(code)
"""

HOSTNAME = 'print("t1v-n-fake-w-" + os.environ["WORKER"])\n'

NVIDIA_SMI = """
gpus, driver, capabilities = change(lambda state: [state[name] for name in ("gpus", "driver", "capabilities")])
for gpu in range(gpus):
    if arguments[0] == "--list-gpus":
        print(f"GPU {gpu}: NVIDIA H100 (UUID: GPU-{gpu})")
    else:
        print(driver, capabilities[gpu % len(capabilities)], sep=", ")
sys.exit(0 if gpus else 9)
"""

SRUN = """
record()
while arguments[0].startswith("--"):
    arguments.pop(0)
codes = []
for task in range(2):
    os.environ["WORKER"] = str(task)
    codes.append(os.spawnvp(os.P_WAIT, arguments[0], arguments))
sys.exit(max(codes))
"""

# CI may run under nohup, which ignores SIGHUP. Child processes inherit that, and a shell cannot trap a signal that was
# ignored when it started.
UNIGNORED = """
import os, signal, sys
for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_DFL)
os.execvp(sys.argv[1], sys.argv[1:])
"""

PROGRAMS = {
    "gcloud": GCLOUD,
    "python3": PYTHON,
    "python3.11": PYTHON,
    "python3.12": PYTHON,
    "python3.13": PYTHON,
    "hostname": HOSTNAME,
    "nvidia-smi": NVIDIA_SMI,
    "srun": SRUN,
    "scontrol": "record()\n",
}


def wait_until(condition: Callable[[], object]):
    for _ in range(600):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("it did not happen in 30 seconds")


class World:
    """A folder with the fakes, and with a checkout of this repository's scripts whose path contains a space."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.checkout = folder / "a checkout"
        (folder / "bin").mkdir()
        for name, text in PROGRAMS.items():
            program = folder / "bin" / name
            program.write_text(COMMON + text)
            program.chmod(0o755)
        self.set(
            workers=1,
            pythons=["python3"],
            gpus=8,
            driver="580.65.06",
            capabilities=["9.0"],
            failures=[],
            progress=[],  # reports of successive starts, the last one repeated; empty = one step more per start
            steps=0,
            **{"tpu-vm": [], "queued-resources": [], "exit codes": {}, "pip code": 0, "pip seconds": 0},
            **{
                "after create": {
                    "tpu-vm": ["CREATING", "READY"],
                    "queued-resources": ["WAITING_FOR_RESOURCES", "ACTIVE"],
                }
            },
        )
        shutil.copytree(ROOT / "launch", self.checkout / "launch")
        (self.checkout / "configs").mkdir()
        for name in ("configs/sft.py", "pyproject.toml", *(f.name for f in ROOT.glob("requirements*.txt"))):
            shutil.copy(ROOT / name, self.checkout / name)
        subprocess.run(["git", "init", "--quiet"], cwd=self.checkout, check=True)
        self.track()

    def track(self):
        subprocess.run(["git", "add", "--all", "."], cwd=self.checkout, check=True)

    def set(self, **state):
        file = self.folder / "state"
        file.write_text(repr((ast.literal_eval(file.read_text()) if file.exists() else {}) | state))

    def calls(self, *words: str) -> list[dict]:
        """The logged calls that contain all these words."""
        file = self.folder / "calls"
        calls = [ast.literal_eval(line) for line in file.read_text().split("\n")[:-1]] if file.exists() else []
        return [c for c in calls if all(w in [c["program"], *c["arguments"]] for w in words)]

    def runs(self, worker: int = 0) -> list[list[str]]:
        """The arguments of each start of the program on a worker."""
        return [c["arguments"][2:] for c in self.calls("-m", "jax_rlhf") if c.get("worker") == str(worker)]

    def environment(self, **more: str) -> dict[str, str]:
        path = f"{self.folder / 'bin'}:{os.environ['PATH']}"
        ours = {
            "WORLD": str(self.folder),
            "PATH": path,
            "TPU_VM_POLL": "0",
            "TPU_VM_FOLLOW": "2",
            "HOME": str(self.folder),
        }
        theirs = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "JAX", "PYTHON", "HF_"))}
        return theirs | ours | more

    def start(self, script: str, *arguments: str, **environment: str) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-ISc", UNIGNORED, "bash", str(self.checkout / "launch" / script), *arguments],
            cwd=self.folder,
            env=self.environment(**environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C in a terminal reaches only the script's process group
        )

    def run(self, script: str, *arguments: str, expect: int = 0, **environment: str) -> subprocess.CompletedProcess:
        process = self.start(script, *arguments, **environment)
        output, errors = process.communicate(timeout=60)
        assert process.returncode == expect, f"{process.returncode}\n{output}\n{errors}"
        return subprocess.CompletedProcess(arguments, process.returncode, output, errors)
