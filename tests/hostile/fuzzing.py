"""Helpers of the fuzz tests: the number of inputs, their seed, and strategies that damage valid files.

A short run uses the same inputs each time. A long run (`pytest -m slow tests/hostile -k fuzz`) uses new inputs each
time. pytest's header shows its seed. The same command with FUZZ_SEED=… in the environment repeats it.
"""

import copy
import json
import os
import secrets
import struct

import hypothesis
import pytest
from hypothesis import HealthCheck, strategies as some

from tests.memory import growth

SEED = int(os.environ.get("FUZZ_SEED") or secrets.randbits(32))
SECONDS = 20
"""Time limit per input, far above what an input needs."""
GROWTH = 400_000_000
"""Bytes by which the process may grow per input. Loading a model for the first time takes 200 MB."""
NUMBERS = [struct.pack("<Q", n) for n in (0, 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1)]


def inputs(few, many):
    """Parametrizes a test by its number of inputs: `few` by default, `many` in a slow run."""
    return pytest.mark.parametrize("examples", [few, pytest.param(many, marks=pytest.mark.slow)])


def fuzzed(examples, check, *, few=500, timed=True, **strategies):
    """Runs the check on random inputs. Fails if an input raises, takes too long, or takes too much memory."""

    def measured(**given):
        assert growth(lambda: check(**given)) < GROWTH

    long = examples > few
    options = hypothesis.settings(
        max_examples=examples,
        derandomize=not long,
        database=None,
        deadline=SECONDS * 1000 if timed else None,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )
    run = options(hypothesis.given(**strategies)(measured))
    (hypothesis.seed(SEED)(run) if long else run)()


values = some.recursive(
    some.none()
    | some.booleans()
    | some.integers(-(2**70), 2**70)
    | some.sampled_from([-1, 0, 1, 2, 3, 10**6, 10**9, 2**31, 2**63, 10**30])
    | some.floats()
    | some.text(max_size=8)
    | some.sampled_from(["None", "a,b", "1e9999", "../../etc/passwd", "\x1b[31m", "\ud800", "__import__('os')"])
    | some.sampled_from(["x" * 300, "<|im_end|>", "<eos>", "\ufdd0", "[" * 300, "https://example.org/x.jsonl"]),
    lambda inner: some.lists(inner, max_size=3) | some.dictionaries(some.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@some.composite
def damaged(draw, whole):
    """Bytes with some of them changed, removed, inserted, doubled or cut off."""
    content = bytearray(whole)
    for _ in range(draw(some.integers(1, 4))):
        place = draw(
            some.integers(0, min(len(content), 4096)) | some.integers(0, len(content))
        )  # headers are at the start
        piece = draw(some.binary(min_size=1, max_size=9) | some.sampled_from(NUMBERS))
        match draw(some.sampled_from(["change", "remove", "insert", "double", "cut"])):
            case "change":
                content[place : place + len(piece)] = piece
            case "remove":
                del content[place : place + len(piece)]
            case "insert":
                content[place:place] = piece
            case "double":
                content[place:place] = content[place : place + draw(some.integers(1, 64))]
            case "cut":
                del content[place:]
    return bytes(content)


@some.composite
def changed(draw, whole):
    """A JSON value in which one to three inner values are replaced, removed, added, wrapped or nested deeply."""
    content = copy.deepcopy(whole)
    for _ in range(draw(some.integers(1, 3))):
        holder = content
        while True:
            keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
            key = draw(some.sampled_from(keys)) if keys else ""
            inner = holder[key] if keys else None
            if not isinstance(inner, dict | list) or not inner or draw(some.integers(0, 3)) == 0:
                break
            holder = inner
        match draw(some.sampled_from(["replace", "replace", "remove", "add", "wrap", "deepen"])):
            case "replace" if keys:
                holder[key] = draw(values)
            case "remove" if keys:
                del holder[key]
            case "wrap" if keys:
                holder[key] = [holder[key]]
            case "deepen" if keys:
                for _ in range(draw(some.sampled_from([70, 400]))):
                    holder[key] = [holder[key]]
            case _ if isinstance(holder, dict):
                holder[draw(some.text(max_size=5))] = draw(values)
            case _:
                holder.append(draw(values))
    return content


def as_json(content):
    """The value as JSON. If it is nested too deeply for Python's encoder, a deeply nested list instead."""
    try:
        return json.dumps(content).encode()
    except RecursionError:
        return b"[" * 2000 + b"]" * 2000


def json_files(whole):
    """The bytes of a JSON file that is damaged, changed, of another type, or deeply nested."""
    others = [
        b"",
        b"null",
        b"[]",
        b"{}",
        b"7",
        b'""',
        b"[" * 100_000,
        b'{"a":' * 3000 + b"1" + b"}" * 3000,
        b"\xff\xfe{}",
    ]
    return damaged(as_json(whole)) | changed(whole).map(as_json) | some.sampled_from(others) | values.map(as_json)
