"""Part `flash`: the attention kernel (cuDNN on GPU, splash on TPU) against the plain form, values and gradients."""

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.device.lines import attempt, llama, print_row
from jax_rlhf.models.attention import AttentionContext, attend, token_order, visible
from jax_rlhf.models.flash import flash_attend

# Tokens, heads, key/value heads, head width, window, packed rows.
CASES = (
    (128, 4, 4, 64, None, False),
    (151, 8, 2, 128, None, False),
    (1024, 8, 2, 128, None, False),
    (512, 4, 2, 64, 100, False),
    (640, 4, 4, 128, 64, False),
    (513, 8, 2, 128, None, True),
    (640, 4, 4, 256, None, False),
    (257, 4, 2, 256, None, True),
    (256, 9, 3, 64, None, True),
)
# The same kinds of cases, for a CPU.
TINY_CASES = ((128, 4, 4, 64, None, False), (131, 4, 2, 128, 20, False), (129, 2, 2, 256, None, True))
_PLAIN_BAR = 2.0**-5  # for the plain form in bfloat16, which has 8 significant bits, against float32


def flash(tiny: bool) -> None:
    """Errors of the kernel and of the plain form in bfloat16 against float32; then the time of both at 2,048 tokens.

    A CPU has no kernel. There the plain form in bfloat16 is checked, with its own bar.
    """
    kernel = jax.default_backend() in ("gpu", "tpu")
    for case in TINY_CASES if tiny else CASES:
        attempt("flash", case, partial(_compare, case, kernel))
    timed = (128, 4, 2, 64) if tiny else (2048, 16, 8, 128)
    attempt("flash", timed, partial(_time, timed, kernel))


def _forms(config: Any, window: int | None, width: int, segments: jax.Array | None) -> tuple[Callable, Callable]:
    def plain(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array) -> jax.Array:
        context = AttentionContext(*token_order(mask), None, None, None, segments)
        return attend(query, key, value, visible(context, window), scale=width**-0.5)

    def kernel(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array) -> jax.Array:
        return flash_attend(query, key, value, mask, segments, config=config, window=window, scale=width**-0.5)

    return plain, kernel


def _compare(case: tuple, has_kernel: bool) -> None:
    length, heads, kv_heads, width, window, packed = case
    shape = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": width}
    config = llama(True, hidden_size=heads * width, **shape).replace(attention="flash", dtype=jnp.dtype("bfloat16"))
    random, position = np.random.RandomState(length), np.arange(length)
    holes = random.rand(length) < 0.6
    # Pads on the left, on the right, anywhere, nowhere; one real token at the right end, at the left end; only pads.
    masks = [position >= 30, position < length - 50, holes, position >= 0]
    masks += [position >= length - 1, position < 1, position < 0]
    mask, rows = jnp.asarray(np.stack(masks)), len(masks)
    texts = np.broadcast_to(position // (length // 3 + 1), (rows, length)).astype(np.int32)
    segments = jnp.asarray(texts) if packed else None
    query, weight = (jnp.asarray(random.standard_normal((rows, length, heads, width)), jnp.bfloat16) for _ in range(2))
    key, value = (jnp.asarray(random.standard_normal((rows, kv_heads, length, width)), jnp.bfloat16) for _ in range(2))
    plain, kernel = _forms(config, window, width, segments)

    def run(form: Callable, dtype: Any) -> tuple[jax.Array, ...]:
        def both(query: jax.Array, key: jax.Array, value: jax.Array, weight: jax.Array) -> tuple[jax.Array, ...]:
            real = lambda *arrays: jnp.where(mask[..., None, None], form(*arrays, mask), 0)  # noqa: E731
            mixed, back = jax.vjp(real, *(array.astype(dtype) for array in (query, key, value)))
            return (mixed, *back(weight.astype(dtype)))

        return jax.jit(both)(
            query, key, value, weight
        )  # as arguments, because XLA would fold constants while it compiles

    exact, plain_result = run(plain, jnp.float32), run(plain, jnp.bfloat16)
    found = run(kernel, jnp.bfloat16) if has_kernel else plain_result

    def errors(result: tuple[jax.Array, ...]) -> list[float]:
        pairs = zip(result, exact, strict=True)
        return [float(jnp.abs(one.astype(jnp.float32) - two).max() / jnp.abs(two).max()) for one, two in pairs]

    finite = all(bool(jnp.isfinite(one.astype(jnp.float32)).all()) for one in found)
    bars = [3 * error if has_kernel else _PLAIN_BAR for error in errors(plain_result)]
    good = finite and all(error < bar for error, bar in zip(errors(found), bars, strict=True))
    bar = "values and 3 gradients: " + ("3 times the plain form's" if has_kernel else str(_PLAIN_BAR))
    fields = {
        "kernel": "flash" if has_kernel else "plain",
        "errors": errors(found),
        "plain_errors": errors(plain_result),
    }
    print_row("flash", ok=good, case=case, finite=finite, **fields, bar=bar)


def _time(case: tuple[int, int, int, int], has_kernel: bool) -> None:
    length, heads, kv_heads, width = case
    shape = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": width}
    config = llama(True, hidden_size=heads * width, **shape).replace(attention="flash", dtype=jnp.dtype("bfloat16"))
    query = jnp.ones((8, length, heads, width), jnp.bfloat16)
    key = jnp.ones((8, kv_heads, length, width), jnp.bfloat16)
    mask = jnp.ones((8, length), bool)
    plain, kernel = _forms(config, None, width, None)
    for name, form in {"plain": plain, **({"flash": kernel} if has_kernel else {})}.items():
        total = lambda *arrays, form=form: jnp.sum(form(*arrays, mask).astype(jnp.float32))  # noqa: E731
        step, seconds = jax.jit(jax.grad(total, argnums=(0, 1, 2))), []
        jax.block_until_ready(step(query, key, key))
        for _ in range(5):
            start = time.perf_counter()
            jax.block_until_ready(step(query, key, key))
            seconds.append(time.perf_counter() - start)
        print_row("flash", timed=name, case=[8, *case], milliseconds=1000 * statistics.median(seconds))
