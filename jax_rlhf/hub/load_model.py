"""Loads a model by its settings, and decides how it runs on its devices."""

import dataclasses

from jax import Array
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase

from jax_rlhf.hub.config import ModelConfig
from jax_rlhf.hub.pretrained import Pretrained, load_pretrained
from jax_rlhf.hub.tokenizer import ids_of
from jax_rlhf.models.config import DecoderConfig
from jax_rlhf.models.decoder import Head
from jax_rlhf.models.flash import check_flash
from jax_rlhf.parallel import Layout


def load_model(
    config: ModelConfig, head: Head, mesh: Mesh | Layout | None = None, *, key: Array | None = None
) -> Pretrained:
    """Loads a model by its settings.

    Args:
      config: the settings.
      head: "lm" or "scalar".
      mesh: the mesh; None = one device.
      key: for a new scalar head, as in `load_pretrained`.

    Raises:
      ValueError: config.path is None.
      FileNotFoundError, CheckpointError: as in `load_pretrained`.
    """
    pretrained = load_pretrained(config.required_path(), head=head, mesh=mesh, revision=config.revision, key=key)
    model = pretrained.model.clone(config=running(pretrained.model.config, config))
    return dataclasses.replace(pretrained, model=model)


def running(decoder: DecoderConfig, config: ModelConfig) -> DecoderConfig:
    """Sets dtype, remat and attention of a model for its devices.

    Args:
      decoder: the config of the loaded model.
      config: the settings; the defaults of fields that are None depend on the platform.

    Raises:
      ValueError: flash attention is set, and this model or platform does not support it.
    """
    on_cpu = decoder.platform == "cpu"
    dtype = config.dtype or ("float32" if on_cpu else "bfloat16")
    remat = config.remat or ("dots" if on_cpu else "full")
    decoder = decoder.replace(dtype=dtype, remat=remat, attention=config.attention or "xla")
    check_flash(decoder)
    return decoder


def running_as(decoder: DecoderConfig, config: ModelConfig, policy: ModelConfig) -> DecoderConfig | None:
    """Sets dtype, remat and attention of a reference or critic that starts as a copy of another model.

    Args:
      decoder: the config of the model that is copied.
      config: the settings of the reference or critic.
      policy: the actor's settings, which apply where `config` has None.

    Returns:
      The decoder's config; None if `config` names a checkpoint, since nothing is copied then.

    Raises:
      ValueError: flash attention is set, and this model or platform does not support it.
    """
    if config.path is not None:
        return None
    names = ("dtype", "remat", "attention")
    unset = {name: getattr(policy, name) for name in names if getattr(config, name) is None}
    return running(decoder, dataclasses.replace(config, **unset))


def sampled_ids(
    config: DecoderConfig, tokenizer: PreTrainedTokenizerBase | None, vocab_size: int | None = None
) -> DecoderConfig:
    """Limits a policy to ids that are tokens and that all models have: other ids get probability 0.

    Args:
      config: the policy's config.
      tokenizer: defines which ids are tokens; None = all ids.
      vocab_size: the smallest vocabulary of all models; None = the policy's own.
    """
    vocab_size = config.vocab_size if vocab_size is None else vocab_size
    size, absent = (vocab_size, ()) if tokenizer is None else ids_of(tokenizer)
    return config.limited_to(min(vocab_size, size), absent)
