"""Responses to prompts, in one jitted function: prefill, then `while_loop`s that stop when every row has ended.

Positions in a row of P = 4 prompt slots and R = 4 response slots, EOS = `.`:

    tokens          pad  the  cat  sat  │  on   it   .    pad
    prompt_mask      0    1    1    1   │
    response_mask                       │  1    1    1    0         true through EOS
    drawn from the hidden state at:        sat  on   it   –

Logits exist for one position a row at a time. The key of a draw is an address, fold_in(fold_in(key, row id), index in
the response), so a row's response does not depend on its batch, slot, padding or mesh.
"""

import functools
import re
from collections.abc import Callable, Sequence

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array
from jax.sharding import NamedSharding
from jaxtyping import Bool, Float, Float32, Int, Int32, PRNGKeyArray

from jax_rlhf.models import (
    Decoder,
    DecoderConfig,
    KVCache,
    create_cache,
    grow_cache,
    kernels_by_output,
    model_jit,
    traced,
)
from jax_rlhf.models.decoder import Params
from jax_rlhf.parallel import Layout, constrained
from jax_rlhf.rl.types import AnyArray, Prompts
from jax_rlhf.sampling.config import Sampling
from jax_rlhf.sampling.draw import draw_tokens
from jax_rlhf.sampling.weights import rollout_form

STAGE_TOKENS = 128  # new tokens per stage at least: the loop of each stage takes its time to compile
MAX_STAGES = 4
TURNING_PAYS = 32  # tokens per response, from which on turning the kernels round once is made up for by faster steps


class Samples(struct.PyTreeNode):
    """Prompts with their responses.

    Attributes:
      tokens: ids, of T = P + R slots.
      response_mask: True through EOS.
      logprobs: of the unfiltered softmax at the temperature, in nats; 0 after EOS.
      kept_mass: probability that the filters left; 1 where nothing is filtered, 0 after EOS.
    """

    tokens: Int32[Array, "B T"]
    response_mask: Bool[Array, "B R"]
    logprobs: Float32[Array, "B R"]
    kept_mass: Float32[Array, "B R"]


def sample(
    model: Decoder,
    params: Params,
    prompts: Int[AnyArray, "B P"],
    prompt_mask: Bool[AnyArray, "B P"],
    key: PRNGKeyArray,
    *,
    max_new_tokens: int,
    min_new_tokens: int = 0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    eos_id: int | Sequence[int] | None = None,
    pad_id: int = 0,
    row_ids: Int[AnyArray, "B"] | None = None,
) -> Samples:
    """Samples a response to each prompt.

    Args:
      model: with an LM head.
      params: its parameters.
      prompts: ids, padded on the left.
      prompt_mask: True = real token; each row ends with one.
      key: a JAX random key. The same (key, row id, prompt) gives the same response in any batch, order, padding width
        or mesh, up to draws that float rounding turns: those where two perturbed scores lie within rounding.
      max_new_tokens: R, in tokens.
      min_new_tokens: before so many tokens EOS is not drawn.
      temperature: τ > 0, what logits are divided by.
      top_k: draw among the k likeliest tokens; 0 = all, 1 = greedy.
      top_p: draw among the fewest tokens that hold this probability (after top-k); 1 = all.
      eos_id: one id or several, any of which ends a response; None = none does.
      pad_id: what stands after the end; it may equal an EOS.
      row_ids: the address of each row's randomness; default 0 … B − 1.

    Returns:
      The samples. Log-probs are of the unfiltered softmax at the temperature.

    Raises:
      ValueError: a setting is out of range, a prompt is empty or not padded on the left, or prompt and response are
        longer than the model's table of positions.
    """
    eos_ids = () if eos_id is None else (eos_id,) if isinstance(eos_id, int | np.integer) else eos_id
    sampling = Sampling(
        max_new_tokens, min_new_tokens, temperature, top_k, top_p, tuple(int(e) for e in eos_ids), pad_id
    )
    prompts, prompt_mask = jnp.asarray(prompts), jnp.asarray(prompt_mask)
    row_ids = jnp.arange(len(prompts)) if row_ids is None else jnp.asarray(row_ids)
    rows = Prompts(prompts, prompt_mask, row_ids, columns=None)
    if traced(params, rows, key):
        return sample_program(model, params, rows, key, sampling)
    if prompt_mask.is_fully_addressable:
        check_prompts(model, np.asarray(prompt_mask), sampling)
    count, layout = len(prompts), model.config.layout
    if layout is None or isinstance(prompts.sharding, NamedSharding):
        return sample_program(model, params, rows, key, sampling)
    # Onto the mesh, the last row once more where the mesh does not divide them.
    filled = np.minimum(np.arange(count - count % -layout.num_shards("rows")), count - 1)
    rows = jax.tree.map(lambda leaf: jax.device_put(np.asarray(leaf)[filled], layout.sharding(("rows",))), rows)
    samples = sample_program(model, params, rows, key, sampling)
    if len(filled) == count:
        return samples
    return jax.tree.map(lambda leaf: jax.device_put(leaf, layout.sharding(()))[:count], samples)


def check_prompts(model: Decoder, prompt_mask: np.ndarray, sampling: Sampling) -> None:
    """Raises where prompts cannot be sampled from.

    Args:
      model: the model.
      prompt_mask: on the host; that it is bool[B, P] is looked at here.
      sampling: how they will be sampled.

    Raises:
      ValueError: the mask's form, an empty prompt, padding not on the left, too long for the model, an EOS that it
        does not have; says which row.
    """
    config = model.config
    if prompt_mask.ndim != 2 or prompt_mask.dtype != bool:
        raise ValueError(f"prompt_mask must be bool[B, P], not {prompt_mask.dtype}{list(prompt_mask.shape)}.")
    lengths = prompt_mask.sum(axis=1)
    if not lengths.all():
        raise ValueError(f"prompt {int(np.argmin(lengths))} is empty; give at least one token, BOS say.")
    ragged = (np.diff(prompt_mask.astype(int), axis=1) < 0).any(axis=1)
    if ragged.any():
        raise ValueError(f"prompt {int(np.argmax(ragged))} is not padded on the left only (tokenizer.padding_side).")
    check_positions(config, lengths, sampling.max_new_tokens, run=sampling.max_new_tokens - 1)  # not over the last one
    outside = [eos for eos in sampling.eos_ids or () if not 0 <= eos < config.vocab_size]
    if outside:
        raise ValueError(f"eos_id {outside[0]} is not among the model's {config.vocab_size} tokens.")


def check_positions(
    config: DecoderConfig,
    lengths: Int[np.ndarray, "B"],
    max_new_tokens: int,
    *,
    run: int | None = None,
    whose: str = "model's",
) -> None:
    """Raises where a prompt and its response are longer than a learned table of positions.

    Args:
      config: the model's.
      lengths: of the prompts, in tokens.
      max_new_tokens: R.
      run: how many of a response's tokens the model runs over; None = all.
      whose: positions, for the message.

    Raises:
      ValueError: says which prompt.
    """
    longest = int(lengths.max()) + (max_new_tokens if run is None else run)
    if config.position_kind == "learned" and longest > config.max_positions:
        raise ValueError(
            f"prompt {int(np.argmax(lengths))} has {int(lengths.max())} tokens; with max_new_tokens={max_new_tokens} "
            f"it runs past the {whose} {config.max_positions} positions."
        )


@functools.partial(model_jit, static_argnums=(0, 4))
def sample_program(model: Decoder, params: Params, prompts: Prompts, key: PRNGKeyArray, sampling: Sampling) -> Samples:
    """`rollout`, in the form that decodes fastest, and its rows with the sharding of the training layout."""
    return in_rows(rollout(*rollout_form(model, params), prompts, key, sampling), model.config.layout)


def in_rows(samples: Samples, layout: Layout | None) -> Samples:
    """Samples with their rows where training has them.

    Args:
      samples: made in the rollout layout.
      layout: that of training; None = one device.

    Returns:
      The samples.
    """
    return jax.tree.map(lambda leaf: constrained(leaf, layout, "rows", "length"), samples)


class _Decoding(struct.PyTreeNode):
    """What a loop over tokens carries; index, of the next token, counts from 0 at the first response slot."""

    index: Int32[Array, ""]
    running: Bool[Array, "B"]  # no EOS so far
    hidden: Float[Array, "B E"]  # what the head reads next
    cache: KVCache
    token: Int32[Array, "B"]  # drawn last
    real: Bool[Array, "B"]  # whether it belongs to the response
    tokens: Int32[Array, "B R"]
    mask: Bool[Array, "B R"]
    logprobs: Float32[Array, "B R"]
    kept_mass: Float32[Array, "B R"]


def rollout(model: Decoder, params: Params, prompts: Prompts, key: PRNGKeyArray, sampling: Sampling) -> Samples:
    """`sample` without its checks, to be called under `jit`.

    Args:
      model: with an LM head.
      params: its parameters.
      prompts: B rows without columns.
      key: a JAX random key.
      sampling: the settings.

    Returns:
      The samples, in the model's layout.
    """
    tokens, mask, row_ids = (jnp.asarray(x) for x in (prompts.tokens, prompts.mask, prompts.row_ids))
    chex.assert_rank([tokens, mask, row_ids], [2, 2, 1])
    chex.assert_type([tokens, mask, row_ids], [int, bool, int])
    chex.assert_equal_shape([tokens, mask])
    (batch, width), length, layout = tokens.shape, sampling.max_new_tokens, model.config.layout
    # Rows come in the training layout; this one's must be said here, else every layer exchanges its masks.
    tokens, mask = (constrained(x, layout, "rows", "length") for x in (tokens, mask))
    row_ids, key = constrained(row_ids, layout, "rows"), constrained(key, layout)
    run = functools.partial(model.apply, {"params": params})
    decode = run  # prefill has rows enough to read kernels as they are
    if model.config.platform == "cpu" and not model.scan_layers and length >= TURNING_PAYS:
        decode = functools.partial(model.apply, {"params": kernels_by_output(params)})
    draw = _make_draw(functools.partial(run, method="apply_head"), key, row_ids, sampling, layout)

    def step(state: _Decoding) -> _Decoding:
        """Runs the model over the last token of every row, and draws the next."""
        hidden, cache = decode(state.token[:, None], state.cache, mask=state.real[:, None], method="extend")
        return draw(state.replace(hidden=hidden[:, -1], cache=cache))

    stages = decode_stages(length)
    cache = create_cache(model.config, batch, width + stages[0] - 1, scan_layers=model.scan_layers)
    hidden, cache = run(tokens, cache, mask=mask, span=width, method="extend")  # [B, P, E]
    state = draw(
        _Decoding(
            index=jnp.int32(0),
            running=jnp.ones(batch, bool),
            hidden=hidden[:, -1],
            cache=cache,
            token=jnp.zeros(batch, jnp.int32),
            real=jnp.zeros(batch, bool),
            tokens=jnp.full((batch, length), sampling.pad_id or 0, jnp.int32),
            mask=jnp.zeros((batch, length), bool),
            logprobs=jnp.zeros((batch, length), jnp.float32),
            kept_mass=jnp.zeros((batch, length), jnp.float32),
        )
    )
    for start, end in zip((1, *stages), stages, strict=False):
        state = state.replace(cache=grow_cache(state.cache, model.config, width + end - 1))
        goes_on = functools.partial(lambda end, state: (state.index < end) & jnp.any(state.running), end)
        with jax.named_scope(loop_scope(end - start)):
            state = jax.lax.while_loop(goes_on, step, state)
    tokens = jnp.concatenate([tokens.astype(jnp.int32), state.tokens], axis=1)  # [B, P + R]
    return Samples(tokens, state.mask, state.logprobs, state.kept_mass)


def _make_draw(
    head: Callable[[Float[Array, "B E"]], Float32[Array, "B V"]],
    key: PRNGKeyArray,
    row_ids: Int[Array, "B"],
    sampling: Sampling,
    layout: Layout | None,
) -> Callable[[_Decoding], _Decoding]:
    """draw(state): draws token `index` of every row from `hidden`."""
    row_keys, eos_ids = jax.vmap(lambda row: jax.random.fold_in(key, row))(row_ids), sampling.eos_ids or ()

    def draw(state: _Decoding) -> _Decoding:
        index, running = state.index, state.running
        logits = head(state.hidden) / sampling.temperature  # [B, V]
        # The devices that hold parts of the vocabulary exchange them for whole rows, so that each draws for its own.
        logits = constrained(logits, layout, "drawn_rows", None)
        keys = jax.vmap(lambda row_key: jax.random.fold_in(row_key, index))(row_keys)
        ban = index < sampling.min_new_tokens if sampling.min_new_tokens else False
        filters = {"top_k": sampling.top_k, "top_p": sampling.top_p, "banned": eos_ids, "ban": ban}
        drawn = draw_tokens(logits, keys, **filters)
        drawn = jax.tree.map(lambda x: constrained(x, layout, "rows"), drawn)
        tokens = jnp.where(running, drawn.tokens, sampling.pad_id or 0)  # [B]
        return state.replace(
            index=index + 1,
            running=running & ~jnp.isin(tokens, jnp.asarray(eos_ids, jnp.int32)),
            token=tokens,
            real=running,
            tokens=state.tokens.at[:, index].set(tokens),
            mask=state.mask.at[:, index].set(running),
            logprobs=state.logprobs.at[:, index].set(jnp.where(running, drawn.logprobs, 0)),
            kept_mass=state.kept_mass.at[:, index].set(jnp.where(running, drawn.kept_mass, 0)),
        )

    return draw


def loop_scope(turns: int) -> str:
    """The scope in which a loop over tokens is traced; `loop_turns` reads it off compiled programs.

    Args:
      turns: of the loop, at most.

    Returns:
      Its name.
    """
    return f"decode_{turns}_turns"


def loop_turns(scope: str) -> int | None:
    """How often a loop over tokens turns at most, which neither its program nor its condition says.

    Args:
      scope: of a `while` operation, as JAX's name stack or the compiled program's op_name has it.

    Returns:
      Turns; None for other loops.
    """
    found = re.search(r"decode_(\d+)_turns(/while)?$", scope)
    return int(found[1]) if found else None


def decode_stages(length: int) -> tuple[int, ...]:
    """Where the cache of a rollout grows: a step of decoding reads all slots that there are, filled or not.

    Each stage is a loop of its own, compiled by itself. With as many prompt tokens as new ones, four stages read 19 %
    fewer slots than one, and 8 % more than are filled.

    Args:
      length: R, new tokens at most.

    Returns:
      Of each stage, the tokens that are drawn when it ends; the last is R.
    """
    count = max(1, min(MAX_STAGES, length // STAGE_TOKENS))
    return tuple(length * (stage + 1) // count for stage in range(count))
