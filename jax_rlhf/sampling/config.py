"""The settings of sampling."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How responses are sampled."""

    max_new_tokens: int = 128
    """R, the longest response, in tokens."""
    min_new_tokens: int = 0
    """Before so many tokens EOS is not drawn."""
    temperature: float = 1.0
    """τ > 0, what logits are divided by, in sampling and in every log-prob."""
    top_k: int = 0
    """Draw among the k likeliest tokens; 0 = all, 1 = greedy. Leave it off in PPO: log-probs are of the unfiltered
    softmax, so that ratios would be of a distribution that was not sampled from; `val/kept_mass` says how far off."""
    top_p: float = 1.0
    """Draw among the fewest tokens that hold this probability; 1 = all. Leave it off in PPO, as `top_k`."""
    eos_ids: tuple[int, ...] | None = None
    """Any of these ids ends a response; None = those of the tokenizer and of the checkpoint's generation_config (of
    `jax_rlhf.sample`: none)."""
    pad_id: int | None = None
    """Stands after the end of a response; None = the tokenizer's pad, else an EOS (of `jax_rlhf.sample`: 0)."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens} must be 1 or more.")
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens={self.min_new_tokens} must lie within 0 and max_new_tokens={self.max_new_tokens}."
            )
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature} must be above 0; greedy decoding is top_k=1.")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k} must be 0 (all tokens) or more.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must lie in (0, 1].")

    @property
    def filtered(self) -> bool:
        """Whether top-k or top-p narrow the distribution."""
        return self.top_k > 0 or self.top_p < 1
