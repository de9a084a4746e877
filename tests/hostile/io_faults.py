"""Runs whose n-th I/O call fails: `python -m tests.hostile.io_faults FOLDER FIRST STEP`, under the shim `faulty.c`.

A run of three phases without faults counts the calls. Then n is FIRST, FIRST + STEP, … up to that count. For each n,
two runs in new workdirs are tested: in one only call n fails, in the other all calls from n on fail. Each run must end
as documented. The same command then continues it without faults, and its results must equal those of the first run bit
for bit. A line of JSON reports each trial. All runs share one process, so that each program is compiled once.
"""

import contextlib
import ctypes
import errno
import io
import itertools
import json
import shutil
import sys
import traceback
from pathlib import Path

import numpy as np
from absl import flags
from safetensors.numpy import load_file

ERRORS = (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EACCES)
PHASES = ("sft", "reward", "ppo")
TIMES = ("time", "second", "eps")


def main(folder, first, step):
    from jax_rlhf.cli import run as program
    from tests.cli import tiny

    folder, shim = Path(folder), ctypes.CDLL(None)
    config = folder / "config.py"
    tiny.config(folder)
    config.write_text(CONFIG.format(folder=str(folder)))

    def run(workdir):
        arguments = ["jax_rlhf", f"--config={config}", f"--workdir={workdir}", "--compile_cache="]
        said = io.StringIO()
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            try:
                flags.FLAGS.unparse_flags()
                for name in ("config", "workdir"):
                    flags.FLAGS[name].unparse()
                code = program.main(program.parse_flags(arguments))
            except BaseException as error:  # the program must not raise
                traceback.print_exc(file=said)
                code = f"{type(error).__name__}: {error}"
        return code, said.getvalue()

    shim.faulty_set(str(folder / "counted").encode(), 0, 0, 0)  # counts the calls; none fails
    code, said = run(folder / "counted")
    assert code == 0, said
    count, wanted = shim.faulty_count(), results(folder / "counted")
    print(json.dumps({"calls": count}), flush=True)
    workdir = folder / "run"
    for number, stays in itertools.product(range(int(first), count + 1, int(step)), (False, True)):
        number_of_error = ERRORS[(2 * (number // int(step)) + stays) % len(ERRORS)]
        shutil.rmtree(workdir, ignore_errors=True)
        shim.faulty_set(str(workdir).encode(), number, int(stays), number_of_error)
        code, said = run(workdir)
        shim.faulty_set(b"", 0, 0, 0)
        again, said_again = run(workdir)
        differs = same(wanted, results(workdir)) if again == 0 else "it did not go on"
        line = {"n": number, "stays": stays, "errno": errno.errorcode[number_of_error]}
        line |= {"code": code, "again": again, "differs": differs}
        if code not in (0, 1) or again != 0 or differs or (code == 1 and "error: " not in said):
            line |= {"said": said[-3000:], "said_again": said_again[-3000:]}
        else:
            line["said"] = next((text for text in said.splitlines() if text.startswith("error:")), "")[:300]
        print(json.dumps(line), flush=True)


CONFIG = """
from pathlib import Path
from tests.cli import tiny
def get_config():
    config = tiny.config(Path({folder!r}))
    config.sft.steps = config.reward.steps = config.ppo.iterations = 2
    config.checkpoint.every, config.watchdog.action = 1, "off"
    config.reward.normalize_rows = 8
    config.data.eval_rows = 4
    return config
"""


def results(workdir):
    found = {}
    for phase in PHASES:
        for name in ("metrics", "samples"):
            rows = [json.loads(line) for line in (workdir / phase / f"{name}.jsonl").read_text().splitlines()]
            found[f"{phase} {name}"] = [
                {k: v for k, v in row.items() if not any(t in k for t in TIMES)} for row in rows
            ]
        for file in sorted((workdir / phase).glob("*/*.safetensors")):
            found |= {f"{phase} {file.parent.name} {name}": tensor for name, tensor in load_file(file).items()}
        notes = workdir / phase / "checkpoints" / "2" / "notes" / "metadata"
        found[f"{phase} arrays"] = json.loads(notes.read_text())["arrays"]
    return found


def same(wanted, found):
    if wanted.keys() != found.keys():
        return f"{sorted(wanted.keys() ^ found.keys())}"
    for name, value in wanted.items():
        equal = np.array_equal(value, found[name]) if isinstance(value, np.ndarray) else value == found[name]
        if not equal:
            return name
    return ""


if __name__ == "__main__":
    main(*sys.argv[1:])
