"""A digest covers everything that a phase reads, and nothing else."""

import array
import collections
import dataclasses
import datetime
import enum
import fractions

import numpy as np
import pytest

from jax_rlhf.data import create_datasets
from jax_rlhf.data.digests import examples_digest, row_digest
from jax_rlhf.data.tokens import Example
from tests.data import tiny


def digest(tmp_path, phase, change=None):
    rows = [
        {"prompt": text, "chosen": f"{text} a", "rejected": f"{text} b", "margin": 1, "own": {"k": [number]}}
        for number, text in enumerate(tiny.letters(20))
    ]
    rows[7] |= change or {}
    options = {"paths": (tiny.write(tmp_path / "x.jsonl", rows),), "eval_rows": 2}
    sizes = {"sft_batch_size": 2, "reward_batch_size": 2, "ppo_batch_size": 2}
    return create_datasets(options | sizes, tiny.tokenizer(), phase, seed=0).digest


@pytest.mark.parametrize(
    ("change", "seen_by"),
    [
        ({}, ()),
        ({"chosen": "z"}, ("sft", "reward")),
        ({"rejected": "z"}, ("reward",)),
        ({"prompt": "z"}, ("sft", "reward", "ppo")),
        ({"margin": 1.5}, ("reward",)),
        ({"margin": 1.0}, ()),
        ({"own": {"k": [8]}}, ("ppo",)),
        ({"new": "z"}, ("ppo",)),
    ],
)
def test_a_phases_digest_covers_exactly_what_the_phase_reads(tmp_path, change, seen_by):
    for phase in ("sft", "reward", "ppo"):
        same = digest(tmp_path, phase) == digest(tmp_path, phase, change)
        assert same != (phase in seen_by), phase


def test_only_ppos_digest_covers_the_messages_of_a_chat():
    one = Example(np.arange(3), (), chat=[{"role": "user", "content": "a", "name": "b"}])
    two = Example(np.arange(3), (), chat=[{"role": "user", "content": "a", "name": "c"}])
    assert examples_digest([one], "ppo") != examples_digest([two], "ppo")
    assert examples_digest([one], "sft") == examples_digest([two], "sft")


def test_digests_distinguish_values_that_json_cannot_represent():
    """Columns of parquet files and readers may have values of any type. Memory addresses do not change the digest."""

    class Own:
        pass

    @dataclasses.dataclass
    class Fields:
        a: object

    class Colour(enum.Enum):
        RED = 1j
        BLUE = 2j

    class Said:
        def __init__(self, text):
            self.text = text

        def __repr__(self):
            return self.text

    pairs = [
        (b"a", b"b"),
        (datetime.date(2026, 1, 1), datetime.date(2026, 1, 2)),
        (np.arange(2), np.arange(3)),
        ({"a"}, {"b"}),
        (np.array(["yes", "no"], object), np.array(["a", "b"], object)),
        (np.array([["yes"], None], dtype=object), np.array([["no"], None], dtype=object)),
        (np.array([np.arange(2), {"x": 1}], dtype=object), np.array([np.arange(2), {"x": 2}], dtype=object)),
        (Fields(1), Fields(2)),
        (Fields(Fields({1})), Fields(Fields({2}))),
        (Colour.RED, Colour.BLUE),
        (fractions.Fraction(1, 3), fractions.Fraction(1, 4)),
        (collections.deque([1]), collections.deque([2])),
        (range(6, 7), range(8, 9)),
        ({1: "x", "b": "y"}, {1: "x", "b": "z"}),
        ({(1, 2): "x"}, {(1, 3): "x"}),
        ({(1, 2): {3: Fields(1), "c": 1}}, {(1, 2): {3: Fields(3), "c": 1}}),
        (array.array("d", [1.0]), array.array("d", [2.0])),
        (np.float64(1.5), np.float64(2.5)),
        (1j, 2j),
        (Said("first"), Said("second")),
    ]
    values = [value for pair in pairs for value in pair]
    found = [of_column(value) for value in [*values, Own()]]
    assert len(set(found)) == len(found)
    assert [of_column(value) for value in [*values, Own()]] == found
    assert len({of_column(value) for value in [Own(), Own()]}) == 1  # two objects at different addresses
    assert of_column({1: "x", "b": "y"}) == of_column({"b": "y", 1: "x"})
    assert len({row_digest({"c": value}) for value in values}) == len(values)


def of_column(value):
    return examples_digest([Example(np.arange(3), (), columns={"c": value})], "ppo")
