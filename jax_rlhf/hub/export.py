"""Writes the files beside the weights so that transformers 4, transformers 5 and other programs read the same settings.

transformers 5 keeps all settings of rotary embeddings in `rope_parameters`. transformers 4 and most other programs read
`rope_theta` and `rope_scaling` instead, and silently use defaults if these are missing. So both are written. A program
that reads both uses `rope_scaling`.
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
"""The top-level names of rope_theta and partial_rotary_factor in families that have their own."""
_LEARNED_POSITIONS = ("gpt2", "opt")
"""Families with learned positions, for which rotary settings in the file have no meaning."""
_NOT_SCALING = ("rope_theta", "partial_rotary_factor", "type")
_OF_LOADING = ("backend", "is_local", "local_files_only", "auto_map", "name_or_path")
"""Keys that transformers 5 adds to a tokenizer's settings to describe how, and from where, it was loaded."""


def write_config(folder: Path, config: PretrainedConfig) -> None:
    """Writes config.json from the model's config, an object of transformers 5."""
    _write(folder / "config.json", config_fields(config))


def config_fields(config: PretrainedConfig) -> Fields:
    """The content of config.json: every field of the family, with the names of transformers 4 and 5.

    Args:
      config: the model's config, an object of transformers 5.
    """
    # It has all fields of the family, also those with default values: another version or program may have other
    # defaults.
    content = config.to_diff_dict()
    if content.get("rope_parameters") and content["model_type"] not in _LEARNED_POSITIONS:
        content |= _rotary_fields(content)
    if content.get("dtype"):
        content["torch_dtype"] = content["dtype"]
    return content


def _rotary_fields(content: Fields) -> Fields:
    """`rope_parameters` under the names of transformers 4."""
    kind, parameters, fields = content["model_type"], content["rope_parameters"], {}
    if "rope_theta" not in parameters:  # one rotation per kind of layer: Gemma 3
        sliding, parameters = parameters["sliding_attention"], parameters["full_attention"]
        fields["rope_local_base_freq"] = sliding["rope_theta"]
        if sliding["rope_type"] != "default":
            logging.warning(
                "transformers 4 has no field for the scaling %r of %s's sliding layers; only transformers 5 reads it.",
                sliding["rope_type"],
                kind,
            )
    theta, share = _TOP_LEVEL.get(kind, ("rope_theta", "partial_rotary_factor"))
    fields[theta] = parameters["rope_theta"]
    if "partial_rotary_factor" in parameters:
        fields[share] = parameters["partial_rotary_factor"]
    scaling = {name: value for name, value in parameters.items() if name not in _NOT_SCALING and value is not None}
    fields["rope_scaling"] = None if parameters["rope_type"] == "default" else scaling
    if kind == "phi3" and fields["rope_scaling"]:  # transformers 4 allows exactly three keys, and computes the others
        first, most = content["original_max_position_embeddings"], content["max_position_embeddings"]
        if scaling.get("factor", most / first) == most / first:
            scaling.pop("factor", None)
        scaling.pop("original_max_position_embeddings", None)
        scaling["type"] = scaling.pop("rope_type")
    return fields


def write_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Writes tokenizer.json, tokenizer_config.json and the chat template.

    Args:
      folder: the checkpoint folder.
      tokenizer: a fast tokenizer. Its tokenizer.json defines all it does, so every version can load it with the generic
        class.
    """
    # Several templates are written into the config, because not every program reads a separate folder of templates.
    tokenizer.save_pretrained(folder, save_jinja_files=not isinstance(tokenizer.chat_template, dict))
    file = folder / "tokenizer_config.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    for name in _OF_LOADING:
        content.pop(name, None)
    if isinstance(content.get("extra_special_tokens"), list):  # transformers 4 has another name for this list
        content["additional_special_tokens"] = content.pop("extra_special_tokens")
    # The generic class of transformers 4 has other defaults for these: token_type_ids, which no decoder accepts.
    content["model_input_names"] = list(tokenizer.model_input_names)
    content["padding_side"] = tokenizer.padding_side
    if (folder / "tokenizer.json").is_file():
        content["tokenizer_class"] = "PreTrainedTokenizerFast"
    _write(file, content)


def write_generation_config(folder: Path, config: PretrainedConfig, stored: Mapping[str, Any] | None) -> None:
    """Writes generation_config.json.

    Args:
      folder: the checkpoint folder.
      config: the model's config.
      stored: the content of the original checkpoint's file; None = derive it from the config.
    """
    text = GenerationConfig.from_model_config(config).to_json_string() if stored is None else _generation_text(stored)
    (folder / "generation_config.json").write_text(text, encoding="utf-8")


def check_generation_config(stored: Mapping[str, Any], where: str) -> None:
    """Checks that transformers can write this generation_config.json again, before training rather than after it.

    Args:
      stored: the file's content.
      where: the file, for the error message.

    Raises:
      CheckpointError: a field has an invalid value, such as `"dtype": false`.
    """
    try:
        _generation_text(stored)
    except Exception as error:  # transformers raises many types
        raise CheckpointError(
            f"{where}: transformers cannot use it ({type(error).__name__}: {error}); correct it, or download it again."
        ) from error


def _generation_text(stored: Mapping[str, Any]) -> str:
    return GenerationConfig.from_dict(dict(stored)).to_json_string()


def _write(file: Path, content: Fields) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
