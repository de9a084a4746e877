"""Where a model comes from and how it runs: the settings that all phases share, and loading by them."""

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
    """Loads a model to run as a config says.

    Args:
      config: its fields.
      head: "lm" or "scalar".
      mesh: the mesh; None = one device.
      key: of a new scalar head, as in `load_pretrained`.

    Raises:
      ValueError: config.path is None.
      FileNotFoundError, CheckpointError: the checkpoint cannot be used.
    """
    if config.path is None:
        raise ValueError("the model's path is missing: --config.model.path=CHECKPOINT.")
    pretrained = load_pretrained(config.path, head=head, mesh=mesh, revision=config.revision, key=key)
    model = pretrained.model.clone(config=running(pretrained.model.config, config))
    return dataclasses.replace(pretrained, model=model)


def running(decoder: DecoderConfig, config: ModelConfig) -> DecoderConfig:
    """How a model runs on its devices.

    Args:
      decoder: as loaded.
      config: what is wanted; None = what suits the devices.

    Returns:
      The decoder's config with dtype, remat and form of attention.

    Raises:
      ValueError: flash attention that this model cannot have there.
    """
    on_cpu = decoder.platform == "cpu"
    dtype = config.dtype or ("float32" if on_cpu else "bfloat16")
    remat = config.remat or ("dots" if on_cpu else "full")
    decoder = decoder.replace(dtype=dtype, remat=remat, attention=config.attention or "xla")
    check_flash(decoder)
    return decoder


def running_as(decoder: DecoderConfig, config: ModelConfig, policy: ModelConfig) -> DecoderConfig | None:
    """How a reference or critic runs that starts as another model.

    Args:
      decoder: of the model that it starts as.
      config: its own settings.
      policy: the actor's, which count where its own are None.

    Returns:
      The decoder's config; None where the settings name a checkpoint, which runs as they say.

    Raises:
      ValueError: flash attention that this model cannot have there.
    """
    if config.path is not None:
        return None
    names = ("dtype", "remat", "attention")
    unset = {name: getattr(policy, name) for name in names if getattr(config, name) is None}
    return running(decoder, dataclasses.replace(config, **unset))


def sampled_ids(
    config: DecoderConfig, tokenizer: PreTrainedTokenizerBase | None, known: int | None = None
) -> DecoderConfig:
    """A policy that has probability only on ids that all models know and that are tokens.

    Args:
      config: the policy's.
      tokenizer: whose tokens; None = all ids count as such.
      known: how many ids all models know; None = those of the policy.

    Returns:
      Its config.
    """
    known = config.vocab_size if known is None else known
    size, absent = (known, ()) if tokenizer is None else ids_of(tokenizer)
    return config.limited_to(min(known, size), absent)
