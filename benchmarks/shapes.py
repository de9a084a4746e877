"""The models that the benchmarks run: random Llama-like models of two sizes, and their FLOPs."""

import dataclasses
from pathlib import Path

import jax

from jax_rlhf import Pretrained, save_pretrained
from jax_rlhf.hub.families import config_from_hub
from jax_rlhf.models import Decoder, init_params


@dataclasses.dataclass(frozen=True)
class Shape:
    """The sizes of one benchmark, in tokens, rows or features."""

    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    batch: int
    ppo_epochs: int
    vocab_size: int = 8192
    prompt: int = 32
    response: int = 64

    @property
    def hub_config(self) -> dict:
        """The content of a Llama config.json, without EOS."""
        return {
            "model_type": "llama",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": False,
            "eos_token_id": None,
            "bos_token_id": None,
        }

    @property
    def trunk_flops(self) -> float:
        """FLOPs of a forward pass of the layers over prompts and responses, all rows; causal attention counts half."""
        tokens, length, width = (
            self.batch * (self.prompt + self.response),
            self.prompt + self.response,
            self.hidden_size,
        )
        weights = self.num_layers * (4 * width**2 + 3 * width * self.intermediate_size)
        return 2 * tokens * weights + 2 * tokens * length * width * self.num_layers

    @property
    def head_flops(self) -> float:
        """FLOPs of one forward pass of the LM head over the response positions."""
        return 2 * self.batch * self.response * self.hidden_size * self.vocab_size

    @property
    def flops(self) -> dict[str, float]:
        """FLOPs of each phase, without recomputation: a backward pass is twice a forward pass."""
        trunk, head = self.trunk_flops, self.head_flops
        return {
            "sample": trunk + head,
            "score": 4 * trunk + 2 * head,
            "train": 3 * self.ppo_epochs * (2 * trunk + head),
        }


SHAPES = {
    "small": Shape(hidden_size=256, num_layers=4, num_heads=4, intermediate_size=704, batch=32, ppo_epochs=4),
    "m100": Shape(hidden_size=768, num_layers=12, num_heads=12, intermediate_size=2048, batch=8, ppo_epochs=1),
}


def write_checkpoint(folder: Path, shape: Shape, head: str) -> None:
    """Writes a random model as a Hugging Face folder.

    Args:
      folder: the folder to write.
      shape: the model's sizes.
      head: "lm" or "scalar".
    """
    model = Decoder(config_from_hub(shape.hub_config), head=head)
    save_pretrained(folder, Pretrained(model, init_params(model, jax.random.key(0))))
