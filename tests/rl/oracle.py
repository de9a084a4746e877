"""The formulas of `jax_rlhf.rl` as plain float64 loops, which share no code with the package."""

import math

import numpy as np


def gae(rewards, values, mask, gamma, lam, bootstrap=0.0):
    """GAE of one row, backwards over its real steps."""
    advantages, returns = np.zeros(len(rewards)), np.zeros(len(rewards))
    next_value, next_advantage = bootstrap, 0.0
    for t in reversed([t for t in range(len(rewards)) if mask[t]]):
        delta = rewards[t] + gamma * next_value - values[t]
        next_advantage = delta + gamma * lam * next_advantage
        next_value = values[t]
        advantages[t], returns[t] = next_advantage, next_advantage + values[t]
    return advantages, returns


def whiten(x, mask, shift_mean=True):
    real = x[mask]
    mean = real.sum() / len(real)
    variance = ((real - mean) ** 2).sum() / len(real)
    out = np.zeros_like(x)
    out[mask] = (real - mean) / math.sqrt(variance + 1e-8) + (0 if shift_mean else mean)
    return out


def clipped_surrogate(log_ratio, advantage, low, high, dual_clip=None):
    """The loss of one token."""
    ratio = math.exp(max(-20, min(20, log_ratio)))
    loss = max(-advantage * ratio, -advantage * max(1 - low, min(1 + high, ratio)))
    if dual_clip is not None and advantage < 0:
        loss = min(loss, dual_clip * abs(advantage))
    return loss


def clipped_value_loss(value, old, target, clip):
    """The loss of one token."""
    clipped = old + max(-clip, min(clip, value - old))
    return 0.5 * max((value - target) ** 2, (clipped - target) ** 2)


def rewards(score, logprobs, ref_logprobs, length, beta):
    """Rewards per token of one row, whose first `length` tokens are real."""
    out = np.zeros(len(logprobs))
    for t in range(length):
        out[t] = -beta * (logprobs[t] - ref_logprobs[t]) + (score if t == length - 1 else 0)
    return out


def token_ranking(chosen, rejected, chosen_ids, rejected_ids, chosen_length, rejected_length):
    """The loss of one pair, which is padded on the right."""
    end = max(chosen_length, rejected_length)
    first = next(
        (t for t in range(end) if chosen_ids[t] != rejected_ids[t] or (t < chosen_length) != (t < rejected_length)),
        None,
    )
    slots = range(len(chosen) - 1, len(chosen)) if first is None else range(first, end)
    return np.mean([math.log1p(math.exp(-(chosen[t] - rejected[t]))) for t in slots])
