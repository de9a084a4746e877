"""Sampling responses, and scoring tokens."""

from jax_rlhf.sampling.logprobs import score_hidden, token_logprobs
from jax_rlhf.sampling.sampler import (
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
from jax_rlhf.sampling.weights import decodes_unrolled, reshard, rollout_form, sampling_layout

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
