"""The settings of sampling."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How responses are sampled."""

    max_new_tokens: int = 128
    """The longest response, in tokens."""
    min_new_tokens: int = 0
    """The shortest response, in tokens: EOS is not sampled earlier."""
    temperature: float = 1.0
    """τ > 0; logits are divided by it, in sampling and in all log-probs."""
    top_k: int = 0
    """Sample from the k most likely tokens; 0 = all, 1 = greedy. Leave it at 0 in PPO: log-probs are those of the
    unfiltered softmax, so ratios would be of a distribution that was not sampled from; `val/kept_mass` shows by how
    much."""
    top_p: float = 1.0
    """Sample from the smallest set of tokens with at least this total probability; 1 = all. Leave it at 1 in PPO, for
    the same reason."""
    eos_ids: tuple[int, ...] | None = None
    """Token ids that end a response; None = those of the tokenizer and of the checkpoint's generation_config (in
    `jax_rlhf.sample`: none)."""
    pad_id: int | None = None
    """The token id after the end of a response; None = the tokenizer's pad, or an EOS if it has none (in
    `jax_rlhf.sample`: 0)."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens} must be 1 or more.")
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens={self.min_new_tokens} must lie between 0 and max_new_tokens={self.max_new_tokens}."
            )
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature} must be above 0; greedy decoding is top_k=1.")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k} must be 0 (all tokens) or more.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must lie in (0, 1].")

    @property
    def filtered(self) -> bool:
        """Whether top-k or top-p is on."""
        return self.top_k > 0 or self.top_p < 1
