"""`load_pretrained` and `save_pretrained`: load models from Hugging Face folders, hub ids and GGUF files; save them."""

import copy
import dataclasses
import math
import re
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import Mesh, SingleDeviceSharding
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from jax_rlhf.hub.checkpoint_error import CheckpointError
from jax_rlhf.hub.export import write_config, write_generation_config, write_tokenizer
from jax_rlhf.hub.families import config_from_hub, config_to_hub, family_of, hub_tensors
from jax_rlhf.hub.folder import replaced_folder
from jax_rlhf.hub.gguf import GGUFSource
from jax_rlhf.hub.hub_tensor import HubTensor
from jax_rlhf.hub.locate import in_file, open_source, resolve
from jax_rlhf.hub.read import check_tensors, read_params
from jax_rlhf.hub.safetensors_source import TensorSource
from jax_rlhf.hub.scalar_head import HEAD_TENSORS, check_no_other_head, head_bias, lost_head, stored_head
from jax_rlhf.hub.tokenizer import gguf_tokenizer, load_tokenizer
from jax_rlhf.hub.write import MAX_SHARD_BYTES, weight_files, write_weights
from jax_rlhf.io.paths import local_path
from jax_rlhf.models import Decoder, DecoderConfig, abstract_params, compute_dtypes, logical_axes
from jax_rlhf.models.decoder import Head
from jax_rlhf.models.layers import head_init
from jax_rlhf.parallel import Layout, as_layout, padded_vocab_size, shardings

_SCORE = ("scalar_head", "kernel")
_LM_HEAD = ("lm_head", "kernel")
_TABLE = ("embedding", "table")
# Buffers that older versions of transformers wrote beside the weights, and the tensors of the other head.
_IGNORED = re.compile(
    r"(attn|attention)\.(bias|masked_bias)$|rotary_emb\.inv_freq$|^(lm_head|embed_out)\.weight$|" + HEAD_TENSORS.pattern
)


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A model that can be run, trained and saved.

    Attributes:
      model: the Flax module; `model.apply({"params": params}, tokens, positions, mask)`.
      params: its parameters, nested dicts of arrays.
      tokenizer: transformers' tokenizer, or None if the checkpoint has none.
      generation_config: the content of generation_config.json, or the same fields of config.json; None without both.
      reward_bias: for a reward model, is added to the scalar head's output; `reward_bias` in config.json.
      missing_eos_bias: for a reward model, is subtracted from the scores of texts that do not end in EOS;
        `reward_missing_eos_bias` in config.json.
      new_head: the checkpoint had no scalar head, so the head is new and untrained.
    """

    model: Decoder
    params: dict[str, Any]
    tokenizer: PreTrainedTokenizerBase | None = None
    generation_config: dict[str, Any] | None = None
    reward_bias: float = 0.0
    missing_eos_bias: float = 0.0
    new_head: bool = False


class Description(NamedTuple):
    """A checkpoint without its weights.

    Attributes:
      config: the decoder's config.
      tokenizer: None if the checkpoint has none.
      generation_config: the content of generation_config.json, or the same fields of config.json; None without both.
      scalar_head: the name of the scalar head; None if it is a language model, or if its tensors were not read.
    """

    config: DecoderConfig
    tokenizer: PreTrainedTokenizerBase | None
    generation_config: dict[str, Any] | None
    scalar_head: str | None


def load_pretrained(
    path_or_hub_id: str | Path,
    *,
    head: Head = "lm",
    dtype: Any = None,
    mesh: Mesh | Layout | None = None,
    revision: str | None = None,
    key: Array | None = None,
) -> Pretrained:
    """Loads a causal language model or a sequence classifier with one label.

    Args:
      path_or_hub_id: a folder with config.json and safetensors, a .gguf file or a folder with one, or a hub id.
      head: "lm" for logits; "scalar" for one value per token, with the checkpoint's own head, or a new one if it is a
        language model. The bias of its own head becomes `reward_bias`.
      dtype: of parameters and computation: float32, bfloat16 or float16; None = as stored.
      mesh: the mesh over which parameters are sharded (see `parallel/layout.py`); None = the first device.
      revision: branch, tag or commit of the hub id.
      key: a JAX random key for a new scalar head, with normal weights of standard deviation 1/√(width + 1); None =
        zeros, or an error if the checkpoint is a classifier without its head.

    Returns:
      The model.

    Raises:
      FileNotFoundError: the path does not exist, or a file is missing.
      CheckpointError: the checkpoint is invalid, unsafe or not supported; the message names the file and tensor.
      ValueError: the mesh does not divide a parameter, or the head or dtype is not one of those above.
    """
    if head not in ("lm", "scalar"):
        raise ValueError(f'head={head!r} must be "lm" or "scalar".')
    dtype = None if dtype is None else _float_dtype(dtype)
    path = resolve(path_or_hub_id, revision)
    source, config_dict, generation_config = open_source(path, str(path_or_hub_id))
    config = in_file(path, config_from_hub, config_dict)
    if mesh is not None:
        config = config.replace(padded_vocab_size=padded_vocab_size(config.vocab_size, mesh), layout=as_layout(mesh))
    assert source is not None, "weights are asked for"
    config = _untie_if_stored_apart(source, config, head)
    model, tensors, stored_as = _planned(path, source, config_dict, config, head, new_head=key is not None)
    new_head = head == "scalar" and stored_as is None

    table = next(tensor.name for tensor in tensors if tensor.leaves == (_TABLE,))
    stored = source.dtype(table)
    model = model.clone(config=config.replace(dtype=jnp.dtype(dtype or stored)))
    abstract = abstract_params(model)
    if mesh is None:
        device = SingleDeviceSharding(jax.local_devices()[0])
        sharding_tree = jax.tree.map(lambda _: device, abstract)
    else:
        sharding_tree = shardings(logical_axes(model), abstract, mesh)
    shapes = {keys: leaf.shape for keys, leaf in cast(dict[tuple, Any], flatten_dict(abstract)).items()}
    leaf_shardings = cast(dict[tuple, Any], flatten_dict(sharding_tree))
    params = read_params(source, tensors, shapes, leaf_shardings, dtype, config.num_layers)
    if new_head:
        params[_SCORE] = _new_head(shapes[_SCORE], dtype or stored, leaf_shardings[_SCORE], key)
    tokenizer = _load_tokenizer(path, source)
    if tokenizer is not None and len(tokenizer) > config.vocab_size:
        logging.warning(
            "%s: the tokenizer has %d tokens, but the model has only %d; larger ids give NaN.",
            path,
            len(tokenizer),
            config.vocab_size,
        )
    biases = [0.0, 0.0]
    if head == "scalar" and stored_as is not None:
        biases = [_number(path, config_dict, name) for name in ("reward_bias", "reward_missing_eos_bias")]
        biases[0] += head_bias(source, stored_as)
    return Pretrained(model, unflatten_dict(params), tokenizer, generation_config, biases[0], biases[1], new_head)


def _planned(
    path: Path,
    source: TensorSource,
    config_dict: dict[str, Any],
    config: DecoderConfig,
    head: Head,
    *,
    new_head: bool,
) -> tuple[Decoder, list[HubTensor], str | None]:
    """(model, tensors to read, name of the stored scalar head or None); raises if a tensor is missing or invalid."""
    stored_as, kinds = stored_head(source), ", ".join(map(str, config_dict.get("architectures") or ["a classifier"]))
    model = Decoder(config, head=head)
    tensors = [_as_named(tensor, source, config, stored_as) for tensor in hub_tensors(model)]
    if head == "scalar" and stored_as is None:
        check_no_other_head(source, path, config.output_size)
        if lost_head(config_dict) and not new_head:
            raise CheckpointError(
                f"{path}: its architecture is {kinds}, but it has no score.weight. Its scalar head was not saved, and "
                "without a head every text would score 0. Save the model again with its head, or train a new one."
            )
        tensors = [tensor for tensor in tensors if tensor.leaves != (_SCORE,)]
    if head == "lm" and (stored_as or lost_head(config_dict)):
        if any(tensor.name not in source.shapes for tensor in tensors if tensor.leaves == (_LM_HEAD,)):
            raise CheckpointError(
                f"{path} is a reward model or a critic ({kinds}): it has a scalar head and no LM head, so it cannot "
                "be a policy. Use the language model from which it was made."
            )
        logging.warning("%s is a reward model or a critic (%s), but it is loaded as a language model.", path, kinds)
    check_tensors(source, tensors, config.num_layers, _IGNORED)
    return model, tensors, stored_as


def describe_pretrained(
    path_or_hub_id: str | Path, *, revision: str | None = None, head: Head | None = None, new_head: bool = False
) -> Description:
    """Reads a checkpoint without its weights, to check settings before anything runs.

    The weights of a hub id are downloaded only if `head` is set.

    Args:
      path_or_hub_id: as for `load_pretrained`.
      revision: the revision of the hub id.
      head: the head with which the model will be loaded, to check names and shapes of tensors; None = no check.
      new_head: the model will be loaded with a key, so that a classifier may lack its scalar head.

    Raises:
      FileNotFoundError, CheckpointError: as for `load_pretrained`.
    """
    path = resolve(path_or_hub_id, revision, weights=head is not None)
    source, config_dict, generation_config = open_source(path, str(path_or_hub_id), weights=head is not None)
    config = in_file(path, config_from_hub, config_dict)
    if head is not None:
        assert source is not None  # weights are asked for
        _planned(path, source, config_dict, config, head, new_head=new_head)
    scalar_head = None if source is None else stored_head(source)
    return Description(config, _load_tokenizer(path, source), generation_config, scalar_head)


def save_pretrained(
    directory: str | Path, pretrained: Pretrained, *, dtype: Any = None, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Writes a folder from which transformers and `load_pretrained` load a model with the same outputs.

    The new folder is written beside the old one and replaces it at the end, so that a crash leaves one of them intact.
    With several processes all must call it: tensors are gathered one at a time, and process 0 writes.

    Args:
      directory: the folder to make or replace; it may contain no other files than those of a model.
      pretrained: the model, with parameters of scanned layers.
      dtype: float32, bfloat16 or float16, the dtype in which parameters are written; norms and a scalar head, which are
        computed in float32, are written in float32. None = the dtype of the parameters.
      max_shard_bytes: the largest size of a weight file, in bytes.

    Raises:
      CheckpointError: the model was not made from a Hugging Face config, so its family is unknown.
      FileExistsError: the directory contains files that do not belong to a model.
      OSError: the folder cannot be written; an old folder is unchanged.
    """
    directory = local_path(directory)
    model, params = pretrained.model, pretrained.params
    if "layers_0" in params:
        raise ValueError("params are those of unrolled layers; save the parameters of scanned layers instead.")
    dtypes = jax.tree.map(lambda leaf: leaf.dtype, params)
    if dtype is not None:
        dtypes = compute_dtypes(model.clone(config=model.config.replace(dtype=_float_dtype(dtype))))
    files, index = weight_files(model, params, dtypes, max_shard_bytes)
    config = config_to_hub(model, dtypes[_TABLE[0]][_TABLE[1]].name)
    if model.head == "scalar":
        pretrained = _with_pooling_pad(pretrained, config)
    if jax.process_index() > 0:
        _raise_on_all(None, directory)  # waits until process 0 has made a folder
        write_weights(None, params, files, index)
        _raise_on_all(None, directory)
        return
    failure = None
    try:
        with replaced_folder(directory) as folder:
            _raise_on_all(None, directory)
            write_weights(folder, params, files, index)
            _write_other_files(folder, pretrained, config)
    except Exception as error:  # of any type: the other processes must be told
        failure = error
    _raise_on_all(failure, directory)


def _raise_on_all(failure: Exception | None, directory: Path) -> None:
    """Process 0 tells the others whether it failed; if it did, all processes raise."""
    failed = failure is not None
    if jax.process_count() > 1:
        failed = bool(multihost_utils.broadcast_one_to_all(np.asarray(failed)))
    if failure is not None:
        raise failure
    if failed:
        raise OSError(f"process 0 could not write {directory}; see the error message of process 0.")


def _write_other_files(folder: Path, pretrained: Pretrained, config: PretrainedConfig) -> None:
    write_config(folder, config)
    if pretrained.tokenizer is not None:
        write_tokenizer(folder, pretrained.tokenizer)
    if pretrained.model.head == "lm":
        write_generation_config(folder, config, pretrained.generation_config)


# ---- names and heads -----------------------------------------------------------------------------------------------


def _as_named(tensor: HubTensor, source: TensorSource, config: DecoderConfig, stored_as: str | None) -> HubTensor:
    """The tensor with its name in this checkpoint."""
    if tensor.leaves == (_SCORE,):
        return dataclasses.replace(tensor, name=f"{stored_as}.weight")
    family = family_of(config)
    base = family.base
    table = f"{base}{family.modules['embedding/table']}.weight"
    bare = table not in source.shapes and table.removeprefix(base) in source.shapes  # a base model without a head
    name = tensor.name.removeprefix(base) if bare else tensor.name
    head = f"{family.lm_head}.weight"
    if config.tie_embeddings and tensor.leaves == (_TABLE,) and name not in source.shapes and head in source.shapes:
        name = head  # the tied weight is stored under the name of the LM head
    return dataclasses.replace(tensor, name=name)


def _load_tokenizer(path: Path, source: TensorSource | None) -> PreTrainedTokenizerBase | None:
    if isinstance(source, GGUFSource):
        return gguf_tokenizer(source.tokenizer, path)
    return load_tokenizer(path)


def _number(path: Path, config: dict[str, Any], name: str) -> float:
    number = config.get(name, 0.0)
    if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
        raise CheckpointError(f"{path / 'config.json'}: {name}={number!r} must be a finite number.")
    return float(number)


def _with_pooling_pad(pretrained: Pretrained, config: PretrainedConfig) -> Pretrained:
    """Completes a classifier's config, and chooses a pad token that is not EOS.

    transformers reads the score at the last token that is not the pad token, and a text ends with EOS.
    """
    config.reward_bias, config.reward_missing_eos_bias = pretrained.reward_bias, pretrained.missing_eos_bias
    tokenizer, stored = pretrained.tokenizer, config.eos_token_id
    ends = set(stored if isinstance(stored, list) else [stored])
    choices = [config.pad_token_id]
    if tokenizer is not None:
        ends.add(tokenizer.eos_token_id)
        choices = [tokenizer.pad_token_id, *choices, tokenizer.unk_token_id, *sorted(tokenizer.all_special_ids)]
    choices = [choice for choice in [*choices, *range(config.vocab_size)] if choice is not None]
    config.pad_token_id = next(choice for choice in choices if choice not in ends)
    if tokenizer is None or tokenizer.pad_token_id == config.pad_token_id:
        return pretrained
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(config.pad_token_id)
    return dataclasses.replace(pretrained, tokenizer=tokenizer)


def _untie_if_stored_apart(source: TensorSource, config: DecoderConfig, head: Head) -> DecoderConfig:
    """Unties embedding and LM head if both are stored and differ, as transformers does."""
    family = family_of(config)
    base = f"{family.base}{family.modules['embedding/table']}.weight"
    names = [f"{family.lm_head}.weight", base if base in source.shapes else base.removeprefix(family.base)]
    if head != "lm" or not config.tie_embeddings or not all(name in source.shapes for name in names):
        return config
    rows = 4096
    pairs = zip(source.read_rows(names[0], rows), source.read_rows(names[1], rows), strict=False)
    if source.shapes[names[0]] == source.shapes[names[1]] and all(np.array_equal(a, b) for (_, a), (_, b) in pairs):
        return config
    logging.warning(
        "%s: config.json ties the LM head to the embedding, but %s is stored and differs; the stored head is used.",
        source.where(names[0]),
        names[0],
    )
    return config.replace(tie_embeddings=False)


def _new_head(shape: tuple[int, ...], dtype: np.dtype, sharding: Any, key: Array | None) -> Array:
    kernel = np.zeros(shape, dtype) if key is None else np.asarray(head_init(shape[0])(key, shape), dtype)
    return jax.make_array_from_callback(shape, sharding, lambda index: kernel[index])


def _float_dtype(dtype: Any) -> np.dtype:
    dtype = jnp.dtype(dtype)
    if dtype not in (jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16)):
        raise ValueError(f"dtype={dtype.name}; float32, bfloat16 and float16 are supported.")
    return dtype
