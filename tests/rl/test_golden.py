"""Comparison with DeepSpeed-Chat: tests/fixtures/deepspeed_chat.npz has float64 results of its functions."""

from pathlib import Path

import jax
import numpy as np
import pytest

from jax_rlhf import rl

GOLDEN = np.load(Path(__file__).parents[1] / "fixtures" / "deepspeed_chat.npz", allow_pickle=False)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def of(case):
    values = {name.removeprefix(f"dsc_{case}_"): GOLDEN[name] for name in GOLDEN if name.startswith(f"dsc_{case}_")}
    return values | {"mask": values["mask"].astype(bool)}


def our_rewards(x):
    score = np.clip(x["score"], -5, 5)
    return rl.token_rewards(score, x["logprobs"], x["ref_logprobs"], x["mask"], kl_coef=0.1)


def test_rewards_of_full_responses_equal_deepspeed_chats():
    x = of("full")
    np.testing.assert_allclose(our_rewards(x), x["rewards"], atol=1e-9)


def test_the_score_of_ragged_responses_is_one_slot_before_deepspeed_chats():
    """DeepSpeed-Chat puts the score on the slot after the last real token, which its loss masks."""
    x = of("ragged")
    lengths = x["mask"].sum(axis=1)
    ours, theirs = np.asarray(our_rewards(x)), x["rewards"]
    kl = -0.1 * (x["logprobs"] - x["ref_logprobs"])
    for row, length in enumerate(lengths):
        full = length == x["mask"].shape[1]
        assert theirs[row, length - full] - kl[row, length - full] == pytest.approx(np.clip(x["score"][row], -5, 5))
        assert ours[row, length - 1] - kl[row, length - 1] == pytest.approx(np.clip(x["score"][row], -5, 5))
        assert not ours[row, length:].any()
    assert np.abs(ours - np.where(x["mask"], theirs, 0)).max() > 0.1  # the two differ on real tokens


@pytest.mark.parametrize("case", ["full", "ragged"])
def test_advantages_and_returns_equal_deepspeed_chats(case):
    x = of(case)
    advantages, returns = rl.gae(x["rewards"], x["values"], np.ones_like(x["mask"]), gamma=1.0, lam=0.95)
    np.testing.assert_allclose(advantages, x["advantages"], atol=1e-9)
    np.testing.assert_allclose(returns, x["returns"], atol=1e-9)


@pytest.mark.parametrize("case", ["full", "ragged"])
def test_losses_equal_deepspeed_chats(case):
    x = of(case)
    actor = rl.clipped_surrogate(x["new_logprobs"] - x["logprobs"], x["advantages"])
    assert float(rl.masked_mean(actor, x["mask"])) == pytest.approx(float(x["actor_loss"]), abs=1e-9)
    critic = rl.clipped_value_loss(x["new_values"], x["values"], x["returns"])
    assert float(rl.masked_mean(critic, x["mask"])) == pytest.approx(float(x["critic_loss"]), abs=1e-6)


def test_the_token_ranking_loss_equals_deepspeed_chats():
    names = ("scores_chosen", "scores_rejected", "chosen", "rejected", "pad", "loss")
    chosen_scores, rejected_scores, chosen, rejected, pad, loss = (GOLDEN[f"dsc_rm_{name}"] for name in names)
    assert (chosen[-1] == rejected[-1]).all()  # in a pair of equal answers, only the last slot counts
    ours = rl.token_ranking_loss(chosen_scores, rejected_scores, chosen, rejected, chosen != pad, rejected != pad)
    assert float(ours.mean()) == pytest.approx(float(loss), abs=1e-9)
