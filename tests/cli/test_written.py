"""Recomputes what a run wrote from the models that it exported: samples, scores, KL, losses and means."""

import itertools
import json

import jax
import numpy as np
import pytest

from jax_rlhf import load_pretrained, sample, token_logprobs
from tests.cli import test_end_to_end as alone
from tests.data import tiny as data

SAMPLING = {"temperature": 1.5, "top_k": 3, "top_p": 0.9, "min_new_tokens": 2, "max_new_tokens": 6}


def answers(pretrained, prompts, key, rows, **sampling):
    """A model's responses to prompts of three letters, each as a list of words, special tokens included."""
    tokens = np.array([data.ids(prompt) for prompt in prompts])
    mask = np.ones(tokens.shape, bool)
    made = sample(pretrained.model, pretrained.params, tokens, mask, key, eos_id=data.EOS, row_ids=rows, **sampling)
    found = []
    for row, real in zip(np.asarray(made.tokens)[:, 3:], np.asarray(made.response_mask), strict=True):
        found.append([data.WORDS[token] for token in row[real]])
    return found


def text(words):
    """The words as a sample shows them, without special tokens."""
    return " ".join(word for word in words if word not in ("<pad>", "<eos>", "<bos>"))


def evaluated(workdir, step):
    rows = alone.lines(workdir / "ppo" / "samples.jsonl")
    return [row for row in rows if row["split"] == "eval" and row["step"] == step]


def test_scores_are_normalised_on_samples_with_ppos_settings(whole):
    """The SFT policy samples with PPO's temperature, top-k and top-p. Each batch has its own random key."""
    workdir, _ = whole
    policy, wanted = load_pretrained(workdir / "sft" / "model"), alone.lines(workdir / "reward" / "samples.jsonl")
    assert len(wanted) == 64
    for step in range(8):
        batch = wanted[8 * step : 8 * step + 8]
        prompts = [row["prompt"] for row in batch]
        rows = [" ".join([row["prompt"], *row["response"].split(), *["<eos>"] * row["ended"]]) for row in batch]
        key = jax.random.fold_in(jax.random.key(alone.SEED), step)
        made = answers(policy, prompts, key, np.arange(8), **SAMPLING)
        assert [" ".join([prompt, *words]) for prompt, words in zip(prompts, made, strict=True)] == rows
    assert len({row["prompt"] for row in wanted}) > 40  # 64 of the 90 prompts
    reward = json.loads((workdir / "reward" / "summary.json").read_text())
    assert reward["missing_eos_bias"] > 0  # if it were 0, the check below could not show that it is saved
    model = load_pretrained(workdir / "reward" / "model", head="scalar")
    written = reward["bias"], reward["missing_eos_bias"]  # rounded to seven digits
    assert (model.reward_bias, model.missing_eos_bias) == pytest.approx(written, rel=1e-6)


@pytest.mark.parametrize(("step", "folder"), [(0, "sft/model"), (3, "ppo/model")])
def test_an_evaluation_samples_from_the_current_actor_with_its_own_noise(whole, step, folder):
    """Evaluation rows have ids from 2²⁴ on, so that no training row has the same noise."""
    workdir, _ = whole
    rows, actor = evaluated(workdir, step), load_pretrained(workdir / folder)
    assert len(rows) == 10
    key = jax.random.fold_in(jax.random.key(alone.SEED), step)
    made = answers(actor, [row["prompt"] for row in rows[:8]], key, 2**24 + np.arange(8), **SAMPLING)
    assert [text(words) for words in made] == [row["response"] for row in rows[:8]]
    assert [len(words) for words in made] == [row["length"] for row in rows[:8]]


def test_an_evaluation_has_the_kl_to_the_sft_policy_and_the_scores(whole):
    workdir, _ = whole
    policies = [load_pretrained(workdir / phase / "model") for phase in ("ppo", "sft")]
    reward, scores = load_pretrained(workdir / "reward" / "model", head="scalar"), []
    rows = evaluated(workdir, 3)
    words = [row["response"].split() for row in rows]
    ended = np.array([len(answer) < row["length"] for answer, row in zip(words, rows, strict=True)])
    assert all(len(answer) + end == row["length"] for answer, end, row in zip(words, ended, rows, strict=True))
    assert ended.any()
    assert not ended.all()
    tokens, mask = np.zeros((10, 9), np.int32), np.zeros((10, 9), bool)
    for index, (row, end) in enumerate(zip(rows, ended, strict=True)):
        ids = data.ids(f"{row['prompt']} {row['response']}{' <eos>' * int(end)}")
        tokens[index, : len(ids)], mask[index, : len(ids)] = ids, True
    logprobs, reference = (
        np.where(mask[:, 3:], np.asarray(token_logprobs(m.model, m.params, tokens, mask, temperature=1.5))[:, 2:], 0)
        for m in policies
    )
    np.testing.assert_allclose([row["kl"] for row in rows], np.sum(logprobs - reference, axis=1), atol=1e-4)
    assert np.abs(np.sum(logprobs - reference, axis=1)).max() > 0.1
    scores = np.asarray(reward.model.apply({"params": reward.params}, tokens, mask=mask))
    scores = scores[np.arange(10), mask.sum(axis=1) - 1] + reward.reward_bias - reward.missing_eos_bias * ~ended
    np.testing.assert_allclose([row["score"] for row in rows], scores, atol=1e-4)


@pytest.mark.parametrize(("step", "suffix"), [(0, "_before"), (3, "")])
def test_evaluation_metrics_are_computed_over_the_held_out_rows(whole, step, suffix):
    workdir, _ = whole
    rows = evaluated(workdir, step)
    words = " ".join(row["response"] for row in rows).split()
    wanted = {name: np.mean([row[name] for row in rows]) for name in ("score", "kl", "length", "count_a")}
    wanted["distinct_1"] = len(set(words)) / len(words)
    wanted["distinct_responses"] = len({row["response"] for row in rows}) / 10
    assert [row["count_a"] for row in rows] == [row["response"].split().count("a") - 1 for row in rows]
    (line,) = (
        line for line in alone.lines(workdir / "ppo" / "metrics.jsonl") if line["step"] == step and "eval/kl" in line
    )
    summary = json.loads((workdir / "ppo" / "summary.json").read_text())
    for name, value in wanted.items():
        assert line[f"eval/{name}"] == summary[f"eval/{name}{suffix}"] == pytest.approx(value), name


def test_the_critic_is_saved_with_its_bias_and_the_actor_with_its_ema(whole):
    workdir, _ = whole
    reward = json.loads((workdir / "reward" / "summary.json").read_text())
    critic = load_pretrained(workdir / "ppo" / "critic", head="scalar")
    assert critic.reward_bias == pytest.approx(reward["bias"] - reward["missing_eos_bias"])
    start = load_pretrained(workdir / "reward" / "model", head="scalar").params
    assert moved(critic.params, start) > 1e-3
    first, last, average = (
        load_pretrained(workdir / name).params for name in ("sft/model", "ppo/model", "ppo/model_ema")
    )
    # With decay 0.75 the EMA has moved from the first to the last weights by at most 1 − 0.75³ = 0.58 of the way.
    assert 0.25 * moved(last, first) < moved(average, first) < 0.75 * moved(last, first)


def moved(one, other):
    """The distance between two models' parameters."""
    leaves = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return np.sqrt(sum(np.sum(np.square(np.asarray(a) - np.asarray(b))) for a, b in leaves))


def test_held_out_loss_and_samples_are_those_of_the_sft_model(whole):
    workdir, _ = whole
    policy, samples = load_pretrained(workdir / "sft" / "model"), alone.lines(workdir / "sft" / "samples.jsonl")
    held_out = [row["prompt"] for row in evaluated(workdir, 0)]
    assert len(samples) == 3
    assert {row["prompt"] for row in samples} <= set(held_out)
    key, options = jax.random.key(alone.SEED), {"max_new_tokens": 3}
    made = answers(policy, [row["prompt"] for row in samples], key, np.arange(3), **options)
    assert data.WORDS[data.EOS] not in made[0]  # truncated at three tokens
    assert [row["response"] for row in samples] == [text(words) for words in made]
    rows = [json.loads(line) for line in (workdir.parent / "preferences.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["prompt"] in held_out]
    total, count = 0.0, 0
    tokens, mask = np.zeros((10, 16), np.int32), np.zeros((10, 16), bool)
    for index, row in enumerate(rows):
        ids = data.ids(f"{row['prompt']} {row['chosen']} <eos>")
        tokens[index, : len(ids)], mask[index, : len(ids)] = ids, True
    logprobs = np.asarray(token_logprobs(policy.model, policy.params, tokens, mask))[:, 2:]
    total, count = -np.sum(logprobs[mask[:, 3:]]), mask[:, 3:].sum()
    summary = json.loads((workdir / "sft" / "summary.json").read_text())
    assert summary["eval/loss"] == pytest.approx(total / count, rel=1e-4)
    before, after = (line for line in alone.lines(workdir / "sft" / "metrics.jsonl") if "eval/loss" in line)
    assert (before["eval/loss"], after["eval/loss"]) == (summary["eval/loss_before"], summary["eval/loss"])
    assert after["eval/perplexity"] == pytest.approx(np.exp(summary["eval/loss"]))


@pytest.mark.parametrize("phase", ["sft", "reward"])
def test_tokens_per_second_count_all_tokens_of_a_batch(whole, phase):
    """A step takes less time than passes between two lines of metrics, which bounds its rate from below."""
    found = [row for row in alone.lines(whole[0] / phase / "metrics.jsonl") if "train/tokens" in row]
    for before, row in itertools.pairwise(found):
        between = row["seconds"] - before["seconds"] + 0.002  # both are rounded
        assert row["train/tokens_per_second"] * between > row["train/tokens"]


def test_samples_per_second_follow_from_the_iterations_own_time(whole):
    found = [row for row in alone.lines(whole[0] / "ppo" / "metrics.jsonl") if "time/iteration" in row]
    for before, row in itertools.pairwise(found):
        assert row["time/iteration"] < row["seconds"] - before["seconds"] + 0.002
        assert row["eps"] * row["time/iteration"] == pytest.approx(8, rel=0.05)


def test_reward_metrics_are_of_the_model_before_normalisation(whole):
    """Normalisation later multiplies the head by the gain, so the test divides the scores by it."""
    workdir, _ = whole
    model, held_out = load_pretrained(workdir / "reward" / "model", head="scalar"), evaluated(workdir, 0)
    assert model.model.config.num_layers == 2
    rows = [json.loads(line) for line in (workdir.parent / "preferences.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["prompt"] in [one["prompt"] for one in held_out]]
    texts = [data.ids(f"{row['prompt']} {row[side]} <eos>") for side in ("chosen", "rejected") for row in rows]
    tokens = np.array([ids + [0] * (16 - len(ids)) for ids in texts])
    mask = np.arange(16) < np.array([len(ids) for ids in texts])[:, None]
    scores = np.asarray(model.model.apply({"params": model.params}, tokens, mask=mask))
    scores = scores[np.arange(20), mask.sum(axis=1) - 1]
    summary = json.loads((workdir / "reward" / "summary.json").read_text())
    scores = scores / summary["gain"]
    assert summary["eval/margin"] == pytest.approx(np.mean(scores[:10] - scores[10:]), rel=1e-4)
    assert summary["eval/score_mean"] == pytest.approx(np.mean(scores), abs=1e-4)
    assert summary["eval/score_std"] == pytest.approx(np.std(scores), rel=1e-4)
