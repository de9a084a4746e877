"""Sampling responses, and scoring tokens."""

from jax_rlhf.rollout.reshard import decodes_unrolled, reshard, rollout_form, sampling_layout
from jax_rlhf.rollout.sampler import (
    Samples,
    Sampling,
    check_positions,
    check_prompts,
    decode_stages,
    in_rows,
    loop_turns,
    rollout,
    sample,
    sample_program,
)
from jax_rlhf.rollout.scorer import score_hidden, token_logprobs

__all__ = [
    "Samples",
    "Sampling",
    "check_positions",
    "check_prompts",
    "decode_stages",
    "decodes_unrolled",
    "in_rows",
    "loop_turns",
    "reshard",
    "rollout",
    "rollout_form",
    "sample",
    "sample_program",
    "sampling_layout",
    "score_hidden",
    "token_logprobs",
]
