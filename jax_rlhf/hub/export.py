"""What is written beside the weights: files that transformers 4 and 5 read alike, and other programs by field.

transformers 5 keeps all of a rotation in `rope_parameters`. transformers 4 and most importers of other programs read
`rope_theta` and `rope_scaling` instead, and take their defaults, without a word, where those are missing. So both are
written. Where both are read, `rope_scaling` counts.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import logging
from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from jax_rlhf.hub.checkpoint_error import CheckpointError

Fields = dict[str, Any]

_TOP_LEVEL = {"gpt_neox": ("rotary_emb_base", "rotary_pct")}
"""What a family calls rope_theta and partial_rotary_factor beside its other fields, where it has names of its own."""
_LEARNED_POSITIONS = ("gpt2", "opt")
"""Families for which a rotation in the file means nothing."""
_NOT_SCALING = ("rope_theta", "partial_rotary_factor", "type")
_OF_LOADING = ("backend", "is_local", "local_files_only", "auto_map", "name_or_path")
"""What transformers 5 adds to a tokenizer's settings of how, and from where, it was loaded."""


def write_config(folder: Path, config: PretrainedConfig) -> None:
    """Writes config.json.

    Args:
      folder: to write to.
      config: the model's, of transformers 5.
    """
    _write(folder / "config.json", config_fields(config))


def config_fields(config: PretrainedConfig) -> Fields:
    """What config.json holds: every field of the family, with the names of transformers 4 and 5.

    Args:
      config: the model's, of transformers 5.

    Returns:
      Its content.
    """
    # All of the family's own fields are in it, at their defaults too: another version or program may have others.
    content = config.to_diff_dict()
    if content.get("rope_parameters") and content["model_type"] not in _LEARNED_POSITIONS:
        content |= _rotary_fields(content)
    if content.get("dtype"):
        content["torch_dtype"] = content["dtype"]
    return content


def _rotary_fields(content: Fields) -> Fields:
    """`rope_parameters` under the names of transformers 4."""
    kind, parameters, more = content["model_type"], content["rope_parameters"], {}
    if "rope_theta" not in parameters:  # one rotation for each kind of layer: Gemma 3
        sliding, parameters = parameters["sliding_attention"], parameters["full_attention"]
        more["rope_local_base_freq"] = sliding["rope_theta"]
        if sliding["rope_type"] != "default":
            logging.warning(
                "transformers 4 has no name for the scaling %r of %s's sliding layers; only transformers 5 reads it.",
                sliding["rope_type"],
                kind,
            )
    theta, share = _TOP_LEVEL.get(kind, ("rope_theta", "partial_rotary_factor"))
    more[theta] = parameters["rope_theta"]
    if "partial_rotary_factor" in parameters:
        more[share] = parameters["partial_rotary_factor"]
    scaling = {name: value for name, value in parameters.items() if name not in _NOT_SCALING and value is not None}
    more["rope_scaling"] = None if parameters["rope_type"] == "default" else scaling
    if kind == "phi3" and more["rope_scaling"]:  # transformers 4 takes exactly these three; it works out the others
        first, most = content["original_max_position_embeddings"], content["max_position_embeddings"]
        if scaling.get("factor", most / first) == most / first:
            scaling.pop("factor", None)
        scaling.pop("original_max_position_embeddings", None)
        scaling["type"] = scaling.pop("rope_type")
    return more


def write_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Writes tokenizer.json, tokenizer_config.json and the chat template.

    Args:
      folder: to write to.
      tokenizer: a fast one; its tokenizer.json says all that it does, so every version loads it by its plain class.
    """
    # Several templates stand in the config: of a folder of templates beside it not every program knows.
    tokenizer.save_pretrained(folder, save_jinja_files=not isinstance(tokenizer.chat_template, dict))
    file = folder / "tokenizer_config.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    for name in _OF_LOADING:
        content.pop(name, None)
    if isinstance(content.get("extra_special_tokens"), list):  # transformers 4 knows such a list by another name
        content["additional_special_tokens"] = content.pop("extra_special_tokens")
    # A plain class of transformers 4 has defaults of its own for these: token_type_ids, which no decoder takes.
    content["model_input_names"] = list(tokenizer.model_input_names)
    content["padding_side"] = tokenizer.padding_side
    if (folder / "tokenizer.json").is_file():
        content["tokenizer_class"] = "PreTrainedTokenizerFast"
    _write(file, content)


def write_generation_config(folder: Path, config: PretrainedConfig, stored: Mapping[str, Any] | None) -> None:
    """Writes generation_config.json.

    Args:
      folder: to write to.
      config: the model's.
      stored: what the checkpoint's file said; None = what the config says of generation.
    """
    text = GenerationConfig.from_model_config(config).to_json_string() if stored is None else _generation_text(stored)
    (folder / "generation_config.json").write_text(text, encoding="utf-8")


def check_generation_config(stored: Mapping[str, Any], where: str) -> None:
    """Raises where transformers cannot write again what a generation_config.json says: at the start, not at the end.

    Args:
      stored: the file's content.
      where: the file, for the message.

    Raises:
      CheckpointError: a field has a value that none has, such as `"dtype": false`.
    """
    try:
        _generation_text(stored)
    except Exception as error:  # whatever it stumbles over
        raise CheckpointError(
            f"{where}: transformers cannot use it ({type(error).__name__}: {error}); correct or download it again."
        ) from error


def _generation_text(stored: Mapping[str, Any]) -> str:
    return GenerationConfig.from_dict(dict(stored)).to_json_string()


def _write(file: Path, content: Fields) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
