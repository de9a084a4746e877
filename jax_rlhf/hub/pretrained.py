"""`load_pretrained` and `save_pretrained`: models in from Hugging Face folders, hub ids and GGUF files, and back."""

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
# Buffers that older versions wrote beside the weights, and the other head's tensors.
_IGNORED = re.compile(
    r"(attn|attention)\.(bias|masked_bias)$|rotary_emb\.inv_freq$|^(lm_head|embed_out)\.weight$|" + HEAD_TENSORS.pattern
)


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A model that can be run, trained and saved.

    Attributes:
      model: the Flax module; `model.apply({"params": params}, tokens, positions, mask)`.
      params: its parameters, nested dicts of arrays.
      tokenizer: transformers' tokenizer, or None where the checkpoint had none.
      generation_config: what generation_config.json said, or config.json of the same; None where neither did.
      reward_bias: of a reward model, whose score is the scalar head's value + this; `reward_bias` in config.json.
      missing_eos_bias: of a reward model, subtracted from the scores of texts that do not end in EOS;
        `reward_missing_eos_bias` in config.json.
      new_head: the checkpoint had no scalar head, so this one knows nothing yet.
    """

    model: Decoder
    params: dict[str, Any]
    tokenizer: PreTrainedTokenizerBase | None = None
    generation_config: dict[str, Any] | None = None
    reward_bias: float = 0.0
    missing_eos_bias: float = 0.0
    new_head: bool = False


class Description(NamedTuple):
    """What a checkpoint says of itself.

    Attributes:
      config: the decoder's.
      tokenizer: None where the checkpoint has none.
      generation_config: what generation_config.json says, or config.json of the same; None where neither does.
      scalar_head: the name of its scalar head; None: it is a language model, or its tensors were not looked at.
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
      head: "lm" for logits; "scalar" for one value per token: the checkpoint's own, or a new one where it is a language
        model. A bias of its own becomes `reward_bias`.
      dtype: of parameters and of computing, float32, bfloat16 or float16; None: as stored.
      mesh: where to put the parameters, sharded (see `parallel/layout.py`); None: the first device.
      revision: of the hub id: branch, tag or commit.
      key: a JAX random key for a new scalar head, normal with standard deviation 1/√(width + 1); None: zeros, or an
        error where the checkpoint is a classifier that has lost its head.

    Returns:
      The model.

    Raises:
      FileNotFoundError: there is nothing at that path, or a file is missing.
      CheckpointError: the checkpoint is broken, unsafe or not supported; the message says which file and tensor.
      ValueError: the mesh does not divide a parameter, or the head or dtype is not one of those above.
    """
    if head not in ("lm", "scalar"):
        raise ValueError(f'head={head!r}; "lm" and "scalar" are the heads there are.')
    dtype = None if dtype is None else _float_dtype(dtype)
    place = resolve(path_or_hub_id, revision)
    source, config_dict, generation_config = open_source(place, str(path_or_hub_id))
    config = in_file(place, config_from_hub, config_dict)
    if mesh is not None:
        config = config.replace(padded_vocab_size=padded_vocab_size(config.vocab_size, mesh), layout=as_layout(mesh))
    assert source is not None, "weights are asked for"
    config = _untie_if_stored_apart(source, config, head)
    model, tensors, stored_as = _planned(place, source, config_dict, config, head, new_head=key is not None)
    new_head = head == "scalar" and stored_as is None

    table = next(tensor.name for tensor in tensors if tensor.leaves == (_TABLE,))
    stored = source.dtype(table)
    model = model.clone(config=config.replace(dtype=jnp.dtype(dtype or stored)))
    abstract = abstract_params(model)
    if mesh is None:
        device = SingleDeviceSharding(jax.local_devices()[0])
        places = jax.tree.map(lambda _: device, abstract)
    else:
        places = shardings(logical_axes(model), abstract, mesh)
    shapes = {path: leaf.shape for path, leaf in cast(dict[tuple, Any], flatten_dict(abstract)).items()}
    places = cast(dict[tuple, Any], flatten_dict(places))
    params = read_params(source, tensors, shapes, places, dtype, config.num_layers)
    if new_head:
        params[_SCORE] = _new_head(shapes[_SCORE], dtype or stored, places[_SCORE], key)
    tokenizer = _load_tokenizer(place, source)
    if tokenizer is not None and len(tokenizer) > config.vocab_size:
        logging.warning(
            "%s: the tokenizer has %d tokens, the model %d; ids past that give NaN.",
            place,
            len(tokenizer),
            config.vocab_size,
        )
    biases = [0.0, 0.0]
    if head == "scalar" and stored_as is not None:
        biases = [_number(place, config_dict, name) for name in ("reward_bias", "reward_missing_eos_bias")]
        biases[0] += head_bias(source, stored_as)
    return Pretrained(model, unflatten_dict(params), tokenizer, generation_config, biases[0], biases[1], new_head)


def _planned(
    place: Path,
    source: TensorSource,
    config_dict: dict[str, Any],
    config: DecoderConfig,
    head: Head,
    *,
    new_head: bool,
) -> tuple[Decoder, list[HubTensor], str | None]:
    """The model, what is read for it, and what its scalar head is called; raises where that is not all there."""
    stored_as, kinds = stored_head(source), ", ".join(map(str, config_dict.get("architectures") or ["a classifier"]))
    model = Decoder(config, head=head)
    tensors = [_as_named(tensor, source, config, stored_as) for tensor in hub_tensors(model)]
    if head == "scalar" and stored_as is None:
        check_no_other_head(source, place, config.output_size)
        if lost_head(config_dict) and not new_head:
            raise CheckpointError(
                f"{place} calls itself {kinds}, and has no score.weight: its scalar head was not saved with it, and "
                "without one every text would score 0. Save the model again with its head, or train a new one."
            )
        tensors = [tensor for tensor in tensors if tensor.leaves != (_SCORE,)]
    if head == "lm" and (stored_as or lost_head(config_dict)):
        if any(tensor.name not in source.shapes for tensor in tensors if tensor.leaves == (_LM_HEAD,)):
            raise CheckpointError(
                f"{place} is a reward model or a critic ({kinds}): it has a scalar head and no LM head, so it cannot "
                "be a policy. Give the language model that it was made from."
            )
        logging.warning("%s is a reward model or a critic (%s), and is taken for a language model.", place, kinds)
    check_tensors(source, tensors, config.num_layers, _IGNORED)
    return model, tensors, stored_as


def describe_pretrained(
    path_or_hub_id: str | Path, *, revision: str | None = None, head: Head | None = None, new_head: bool = False
) -> Description:
    """Reads a checkpoint without its weights: to check settings before anything runs.

    Of a hub id weights are downloaded only with `head`.

    Args:
      path_or_hub_id: as for `load_pretrained`.
      revision: of the hub id.
      head: that it will be loaded with: its tensors' names and shapes are checked; None = they are not.
      new_head: it will be loaded with a key, so that a classifier may have lost its scalar head.

    Returns:
      What it says of itself.

    Raises:
      FileNotFoundError, CheckpointError: as for `load_pretrained`.
    """
    place = resolve(path_or_hub_id, revision, weights=head is not None)
    source, config_dict, generation_config = open_source(place, str(path_or_hub_id), weights=head is not None)
    config = in_file(place, config_from_hub, config_dict)
    if head is not None:
        assert source is not None, "weights are asked for"
        _planned(place, source, config_dict, config, head, new_head=new_head)
    scalar_head = None if source is None else stored_head(source)
    return Description(config, _load_tokenizer(place, source), generation_config, scalar_head)


def save_pretrained(
    directory: str | Path, pretrained: Pretrained, *, dtype: Any = None, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Writes a folder that transformers (and `load_pretrained`) loads, and computes the same with.

    The folder is written beside the old one and takes its place at the end, so that a crash leaves one or the other.
    With several processes all must call it: tensors are gathered one at a time, and process 0 writes.

    Args:
      directory: to make or replace; it may hold only what a model folder holds.
      pretrained: the model. Its parameters are those of the scanned form.
      dtype: float32, bfloat16 or float16, in which they are written; norms and a scalar head, which are computed in
        float32, in that. None = as they are.
      max_shard_bytes: of one weight file, in bytes.

    Raises:
      CheckpointError: the model was not made from a Hugging Face config, so its family is not known.
      FileExistsError: the directory holds other things than a model.
      OSError: it cannot be written; what was there is as it was.
    """
    directory = local_path(directory)
    model, params = pretrained.model, pretrained.params
    if "layers_0" in params:
        raise ValueError("params are those of unrolled layers; save the scanned ones that they were made from.")
    dtypes = jax.tree.map(lambda leaf: leaf.dtype, params)
    if dtype is not None:
        dtypes = compute_dtypes(model.clone(config=model.config.replace(dtype=_float_dtype(dtype))))
    files, index = weight_files(model, params, dtypes, max_shard_bytes)
    config = config_to_hub(model, dtypes[_TABLE[0]][_TABLE[1]].name)
    if model.head == "scalar":
        pretrained = _with_pooling_pad(pretrained, config)
    if jax.process_index() > 0:
        _agree(None, directory)  # process 0 has a folder to write to
        write_weights(None, params, files, index)
        _agree(None, directory)
        return
    failure = None
    try:
        with replaced_folder(directory) as folder:
            _agree(None, directory)
            write_weights(folder, params, files, index)
            _write_rest(folder, pretrained, config)
    except Exception as error:  # whatever it is, the others must hear of it
        failure = error
    _agree(failure, directory)


def _agree(failure: Exception | None, directory: Path) -> None:
    """Process 0 tells the others whether it failed; all raise where it did."""
    failed = failure is not None
    if jax.process_count() > 1:
        failed = bool(multihost_utils.broadcast_one_to_all(np.asarray(failed)))
    if failure is not None:
        raise failure
    if failed:
        raise OSError(f"process 0 could not write {directory}; its message says why.")


def _write_rest(folder: Path, pretrained: Pretrained, config: PretrainedConfig) -> None:
    write_config(folder, config)
    if pretrained.tokenizer is not None:
        write_tokenizer(folder, pretrained.tokenizer)
    if pretrained.model.head == "lm":
        write_generation_config(folder, config, pretrained.generation_config)


# ---- names and heads -----------------------------------------------------------------------------------------------


def _as_named(tensor: HubTensor, source: TensorSource, config: DecoderConfig, stored_as: str | None) -> HubTensor:
    """The tensor under the name that this checkpoint uses."""
    if tensor.leaves == (_SCORE,):
        return dataclasses.replace(tensor, name=f"{stored_as}.weight")
    family = family_of(config)
    base = family.base
    table = f"{base}{family.modules['embedding/table']}.weight"
    bare = table not in source.shapes and table.removeprefix(base) in source.shapes  # a base model's file
    name = tensor.name.removeprefix(base) if bare else tensor.name
    head = f"{family.lm_head}.weight"
    if config.tie_embeddings and tensor.leaves == (_TABLE,) and name not in source.shapes and head in source.shapes:
        name = head  # the writer kept the other name of the tied pair
    return dataclasses.replace(tensor, name=name)


def _load_tokenizer(place: Path, source: TensorSource | None) -> PreTrainedTokenizerBase | None:
    if isinstance(source, GGUFSource):
        return gguf_tokenizer(source.tokenizer, place)
    return load_tokenizer(place)


def _number(place: Path, config: dict[str, Any], name: str) -> float:
    number = config.get(name, 0.0)
    if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
        raise CheckpointError(f"{place / 'config.json'}: {name}={number!r}; a finite number is expected.")
    return float(number)


def _with_pooling_pad(pretrained: Pretrained, config: PretrainedConfig) -> Pretrained:
    """Completes a classifier's config: transformers reads the score at the last token that is not the pad.

    So the pad must not be EOS, which ends a text.
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
    """As transformers does: where both of a tied pair are stored and differ, they are not tied."""
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
        "%s: config.json ties the LM head to the embedding, but %s is stored and differs; it is used as it is.",
        source.where(names[0]),
        names[0],
    )
    return config.replace(tie_embeddings=False)


def _new_head(shape: tuple[int, ...], dtype: np.dtype, place: Any, key: Array | None) -> Array:
    kernel = np.zeros(shape, dtype) if key is None else np.asarray(head_init(shape[0])(key, shape), dtype)
    return jax.make_array_from_callback(shape, place, lambda index: kernel[index])


def _float_dtype(dtype: Any) -> np.dtype:
    dtype = jnp.dtype(dtype)
    if dtype not in (jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16)):
        raise ValueError(f"dtype={dtype.name}; float32, bfloat16 and float16 are supported.")
    return dtype
