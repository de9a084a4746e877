"""Finds the scalar head of reward models and critics under the names that different programs use for it."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jax_rlhf.hub.checkpoint_error import CheckpointError
from jax_rlhf.hub.safetensors_source import TensorSource

NAMES = (
    "score",  # transformers' ForSequenceClassification, and so TRL's reward models
    "v_head.summary",  # TRL's AutoModelForCausalLMWithValueHead
    "v_head",  # DeepSpeed-Chat
    "value_head.summary",
    "value_head",  # OpenRLHF
    "reward_head",
    "regression_head",
    "value",
    "classifier",
    "rm_head",
    "model.score",
)
HEAD_TENSORS = re.compile(rf"^({'|'.join(map(re.escape, NAMES))})\.(weight|bias)$")
_LAYERS = re.compile(rf"^({'|'.join(map(re.escape, NAMES))})\.\d+\.\w+$")
_FILES = ("value_head.safetensors", "value_head.bin")  # LLaMA-Factory
_CLASSIFIER = re.compile(r"(SequenceClassification|TokenClassification|RewardModel)$")


def stored_head(source: TensorSource) -> str | None:
    """The name of a checkpoint's scalar head, one linear layer with or without a bias; None if it has none.

    Raises:
      CheckpointError: there are several heads, a head of several layers, or a bias without a weight.
    """
    deep = sorted(name for name in source.shapes if _LAYERS.match(name))
    if deep:
        raise CheckpointError(
            f"{source.where(deep[0])}: its scalar head has several layers ({', '.join(deep)}); only one linear layer "
            "is supported. Use such a reward model in a Python function: config.ppo.reward.functions."
        )
    tensors = sorted(name for name in source.shapes if HEAD_TENSORS.match(name))
    heads = {name.rpartition(".")[0] for name in tensors}
    if len(heads) > 1 or any(f"{head}.weight" not in source.shapes for head in heads):
        raise CheckpointError(
            f"{source.where(tensors[0])}: the scalar head is ambiguous: there are {', '.join(tensors)}. Keep the "
            "tensors of one layer, and name them score.weight (and score.bias)."
        )
    return next(iter(heads), None)


def head_bias(source: TensorSource, head: str) -> float:
    """The bias of the scalar head, which is added to every score; 0 if it has none.

    Args:
      source: the checkpoint.
      head: the name of the head, from `stored_head`.

    Raises:
      CheckpointError: the bias is not a single number.
    """
    name = f"{head}.bias"
    if name not in source.shapes:
        return 0.0
    if source.shapes[name] not in ((1,), ()):
        raise CheckpointError(
            f"{source.where(name)}: tensor {name!r} has shape {list(source.shapes[name])}; a scalar head must have one "
            "label (num_labels = 1)."
        )
    return float(source.read(name).reshape(()))


def check_no_other_head(source: TensorSource, path: Path, width: int) -> None:
    """Checks that a checkpoint without a recognized scalar head has no tensor that looks like one.

    Args:
      source: the checkpoint.
      path: the checkpoint's folder or file.
      width: the number of inputs of a head.

    Raises:
      CheckpointError: there is such a tensor; the message names it, and says how to rename it without loss.
    """
    alike = [
        name for name, shape in source.shapes.items() if shape in ((1, width), (width, 1)) and name.endswith(".weight")
    ]
    if alike:
        raise CheckpointError(
            f"{path}: {', '.join(alike)} looks like its scalar head, but has an unknown name. Rename it to "
            f"score.weight, of shape [1, {width}], and its bias to score.bias: load_file and save_file of safetensors "
            "do that without loss."
        )
    for name in _FILES:
        if (path / name).is_file():
            raise CheckpointError(
                f"{path}: its scalar head is in a separate file, {name}, which is not supported. Put its tensors into "
                "model.safetensors as score.weight and score.bias: load_file and save_file of safetensors do that "
                "without loss. If it is pickled, convert it only if you trust it."
            )


def lost_head(config: Mapping[str, Any]) -> bool:
    """Whether config.json describes a classifier; if the checkpoint has no scalar head, the head has been lost."""
    return any(_CLASSIFIER.search(str(name)) for name in config.get("architectures") or ())
