"""The settings of sampling."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How responses are sampled."""

    max_new_tokens: int = 128
    """The longest response, in tokens."""
    min_new_tokens: int = 0
    """EOS is not drawn before a response has this many tokens."""
    temperature: float = 1.0
    """τ > 0, by which logits are divided, in sampling and in every log-prob."""
    top_k: int = 0
    """Draws from the k most likely tokens; 0 = all, 1 = greedy. Leave it off in PPO: log-probs are of the unfiltered
    softmax, so ratios would refer to another distribution than the sampled one. `val/kept_mass` measures the gap."""
    top_p: float = 1.0
    """Draws from the smallest set of most likely tokens with at least this probability; 1 = all. Leave it off in PPO,
    like `top_k`."""
    eos_ids: tuple[int, ...] | None = None
    """Ids of tokens that end a response; None = those of the tokenizer and of the checkpoint's generation_config
    (`jax_rlhf.sample`: none)."""
    pad_id: int | None = None
    """The id after the end of a response; None = the tokenizer's pad token, or else an EOS (`jax_rlhf.sample`: 0)."""

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
        """Whether top-k or top-p restricts the distribution."""
        return self.top_k > 0 or self.top_p < 1
