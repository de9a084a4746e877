"""The scalar head of reward models and critics, under the names that programs save it by."""

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
_FILES = ("value_head.safetensors", "value_head.bin")  # LLaMA-Factory's
_CLASSIFIER = re.compile(r"(SequenceClassification|TokenClassification|RewardModel)$")


def stored_head(source: TensorSource) -> str | None:
    """What a checkpoint calls its scalar head: one linear layer, with or without a bias.

    Args:
      source: the checkpoint.

    Returns:
      The layer's name; None where there is none.

    Raises:
      CheckpointError: there are several, one of several layers, or a bias without a weight.
    """
    deep = sorted(name for name in source.shapes if _LAYERS.match(name))
    if deep:
        raise CheckpointError(
            f"{source.where(deep[0])}: its scalar head has several layers ({', '.join(deep)}); one linear layer can be "
            "read. Such a reward model can score texts as a Python function: config.ppo.reward.functions."
        )
    tensors = sorted(name for name in source.shapes if HEAD_TENSORS.match(name))
    heads = {name.rpartition(".")[0] for name in tensors}
    if len(heads) > 1 or any(f"{head}.weight" not in source.shapes for head in heads):
        raise CheckpointError(
            f"{source.where(tensors[0])}: which scalar head is meant? It holds {', '.join(tensors)}; keep the tensors "
            "of one layer, called score.weight (and score.bias)."
        )
    return next(iter(heads), None)


def head_bias(source: TensorSource, head: str) -> float:
    """The bias that is added to every score.

    Args:
      source: the checkpoint.
      head: from `stored_head`.

    Returns:
      In reward units; 0 where the layer has none.

    Raises:
      CheckpointError: it is not one number.
    """
    name = f"{head}.bias"
    if name not in source.shapes:
        return 0.0
    if source.shapes[name] not in ((1,), ()):
        raise CheckpointError(
            f"{source.where(name)}: tensor {name!r} has shape {list(source.shapes[name])}; a scalar head has one label "
            "(num_labels = 1)."
        )
    return float(source.read(name).reshape(()))


def check_no_other_head(source: TensorSource, place: Path, width: int) -> None:
    """Stops where a checkpoint has no scalar head that is known, and something that looks like one.

    Args:
      source: the checkpoint.
      place: where it is.
      width: of what a head reads.

    Raises:
      CheckpointError: says what it is called, and how to make it a head without loss.
    """
    alike = [
        name for name, shape in source.shapes.items() if shape in ((1, width), (width, 1)) and name.endswith(".weight")
    ]
    if alike:
        raise CheckpointError(
            f"{place}: {', '.join(alike)} looks like its scalar head, under a name that is not known. Call it "
            f"score.weight, of shape [1, {width}], and its bias score.bias: load_file and save_file of safetensors do "
            "that without loss."
        )
    for name in _FILES:
        if (place / name).is_file():
            raise CheckpointError(
                f"{place}: its scalar head is in a file of its own, {name}, which is not read. Put its tensors into "
                "model.safetensors as score.weight and score.bias: load_file and save_file of safetensors do that "
                "without loss. Where it is pickled, convert it where you trust it."
            )


def lost_head(config: Mapping[str, Any]) -> bool:
    """Whether a checkpoint without a scalar head says that it is a classifier.

    Args:
      config: its config.json.

    Returns:
      Whether.
    """
    return any(_CLASSIFIER.search(str(name)) for name in config.get("architectures") or ())
