"""The sampler: what it draws, when it stops, and that a response does not depend on the other rows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_rlhf import sample, token_logprobs
from jax_rlhf.models import Decoder, init_params, unstack_layers
from jax_rlhf.parallel import put_rows
from jax_rlhf.rl import Prompts
from jax_rlhf.sampling import Sampling, check_prompts, decode_stages, loop_turns, rollout, sampler
from jax_rlhf.sampling.draw import draw_tokens
from jax_rlhf.sampling.sampler import MIN_TOKENS_TO_TRANSPOSE
from tests.models.test_decoder import tiny_config
from tests.sampling.test_draw import P_VALUE, SAMPLES, chi_square, probabilities

KEY = jax.random.key(3)


def tiny(scale=3.0, **changes):
    model = Decoder(tiny_config(**{"num_layers": 2, **changes}))
    return model, jax.tree.map(lambda leaf: leaf * scale, init_params(model, jax.random.key(0)))


def ragged_prompts(rows, width, vocab=31, seed=0):
    random = np.random.RandomState(seed)
    lengths = random.randint(1, width + 1, rows)
    lengths[0] = width
    mask = np.arange(width) >= width - lengths[:, None]
    return np.where(mask, random.randint(0, vocab, (rows, width)), 0).astype(np.int32), mask


def whole_mask(prompt_mask, samples):
    return jnp.concatenate([jnp.asarray(prompt_mask), samples.response_mask], axis=1)


@functools.partial(jax.jit, static_argnums=0)
def full_logits(model, params, tokens, mask):
    return model.apply({"params": params}, tokens, mask=mask)


def margin_at(model, params, tokens, mask, *, row_id, index, prompt_width):
    """The margin of one draw, from a full forward pass over tokens[T] with mask[T]."""
    end = prompt_width + index
    logits = full_logits(model, params, tokens[None, :end], mask[None, :end])[:, -1]
    key = jax.random.fold_in(jax.random.fold_in(KEY, row_id), index)
    return float(draw_tokens(logits, key[None]).margin[0])


def assert_same_responses(model, params, first, second, *, prompts, mask, row_ids):
    """Tokens are equal, and log-probs agree to 1e-5. Two rows may differ only after a near tie."""
    width = prompts.shape[1]
    parted = 0
    for row, row_id in enumerate(row_ids):
        one, other = (np.asarray(s.tokens)[row, -s.logprobs.shape[1] :] for s in (first, second))
        differ = np.flatnonzero(one != other)
        until = len(one)
        if len(differ):
            parted, until = parted + 1, int(differ[0])
            tokens = np.concatenate([prompts[row], one])
            real = np.concatenate([mask[row], np.ones(len(one), bool)])
            assert margin_at(model, params, tokens, real, row_id=row_id, index=until, prompt_width=width) < 1e-5
        else:
            np.testing.assert_array_equal(first.response_mask[row], second.response_mask[row])
        np.testing.assert_allclose(first.logprobs[row, :until], second.logprobs[row, :until], atol=1e-5)
    assert parted <= len(row_ids) // 20


# ---- what is drawn -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scan_layers", "length"), [(True, 8), (False, 8), (False, MIN_TOKENS_TO_TRANSPOSE)])
@pytest.mark.parametrize("position_kind", ["rotary", "learned"])
def test_greedy_sampling_is_the_argmax_of_a_full_forward_pass(scan_layers, length, position_kind):
    changes = {"position_kind": "learned", "rotary": None} if position_kind == "learned" else {}
    model, params = tiny(num_layers=3, sliding_window=5, sliding_layers=(True, False, True), **changes)
    unrolled = model.clone(scan_layers=False)
    prompts, mask = ragged_prompts(5, 6)
    run = functools.partial(rollout, *((model, params) if scan_layers else (unrolled, unstack_layers(params, 3))))
    rows = Prompts(prompts, mask, jnp.arange(5), columns=None)
    samples = jax.jit(run, static_argnums=2)(rows, KEY, Sampling(length, top_k=1))
    tokens = np.asarray(samples.tokens)
    # The model is causal: one forward pass over the whole row gives the last logits of every prefix.
    logits = full_logits(model, params, tokens, whole_mask(mask, samples))
    np.testing.assert_array_equal(tokens[:, 6:], jnp.argmax(logits[:, 5:-1], axis=-1))
    assert len(np.unique(tokens[:, 6:])) > 5  # not always the same token


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.3])
def test_log_probs_equal_the_scorers_at_the_same_temperature(temperature):
    model, params = tiny()
    prompts, mask = ragged_prompts(16, 7)
    settings = {"max_new_tokens": 12, "temperature": temperature, "eos_id": (3, 4), "pad_id": 3}
    samples = sample(model, params, prompts, mask, KEY, **settings)
    scored = token_logprobs(model, params, samples.tokens, whole_mask(mask, samples), temperature=temperature)[:, 6:]
    real = np.asarray(samples.response_mask)
    assert 0 < real.mean() < 1
    np.testing.assert_allclose(np.asarray(samples.logprobs)[real], np.asarray(scored)[real], atol=1e-4)
    np.testing.assert_array_equal(np.asarray(samples.logprobs)[~real], 0)
    # The test would detect a scorer at another temperature.
    wrong = token_logprobs(model, params, samples.tokens, whole_mask(mask, samples), temperature=0.9)[:, 6:]
    assert np.abs(np.asarray(samples.logprobs - wrong)[real]).max() > 0.05


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.3])
@pytest.mark.parametrize("filters", [{}, {"top_k": 4}, {"top_p": 0.75}, {"top_k": 5, "top_p": 0.8}])
def test_fifty_thousand_samples_follow_the_exact_distribution(temperature, filters):
    """The first token, and the first two tokens jointly, of a model with 7 tokens."""
    model, params = tiny(vocab_size=7, hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=2, intermediate_size=16)
    prompt = np.full((SAMPLES, 1), 2, np.int32)
    samples = sample(
        model, params, prompt, np.ones_like(prompt, bool), KEY, max_new_tokens=2, temperature=temperature, **filters
    )
    first, second = np.asarray(samples.tokens[:, 1:]).T
    pairs = np.stack([np.full(7, 2), np.arange(7)], axis=1)
    logits = np.asarray(full_logits(model, params, pairs, np.ones_like(pairs, bool)))
    expected, _ = probabilities(logits[0, 0] / temperature, **filters)
    conditional = np.stack([probabilities(row / temperature, **filters)[0] for row in logits[:, 1]])
    assert np.ptp(conditional, axis=0).max() > 0.1  # the second token does depend on the first
    assert chi_square(first, expected) > P_VALUE
    joint = expected[:, None] * conditional
    assert chi_square(first * 7 + second, joint.reshape(-1)) > P_VALUE
    # The test would detect another temperature, and a second token that is independent of the first.
    other, _ = probabilities(logits[0, 0] / (temperature * 1.15), **filters)
    if np.array_equal(other > 0, expected > 0):
        assert chi_square(first, other) < P_VALUE
    marginal = np.outer(expected, expected @ conditional).reshape(-1)
    assert chi_square(first * 7 + second, marginal) < P_VALUE


# ---- when it stops -------------------------------------------------------------------------------------------------


def test_eos_ends_a_response_and_pads_follow():
    model, params = tiny()
    prompts, mask = ragged_prompts(64, 5)
    samples = sample(model, params, prompts, mask, KEY, max_new_tokens=20, eos_id=(3, 7), pad_id=1)
    tokens, real = np.asarray(samples.tokens[:, 5:]), np.asarray(samples.response_mask)
    lengths = set()
    for row_tokens, row_real in zip(tokens, real, strict=True):
        ends = np.flatnonzero(np.isin(row_tokens, (3, 7)))
        length = int(ends[0]) + 1 if len(ends) else 20
        lengths.add(length)
        np.testing.assert_array_equal(row_real, np.arange(20) < length)  # up to and including EOS
        assert (row_tokens[length:] == 1).all()
    assert len(lengths) > 3
    np.testing.assert_array_equal(np.asarray(samples.tokens[:, :5]), prompts)


def test_an_eos_in_the_prompt_does_not_end_the_response():
    """Ids at pads have no effect, even if the pad id is the EOS id."""
    model, params = tiny()
    prompts, mask = ragged_prompts(32, 6)
    prompts = np.where(mask, np.where(prompts % 4 == 0, 3, prompts), 3).astype(np.int32)
    assert (prompts[mask] == 3).any()
    settings = {"max_new_tokens": 10, "eos_id": 3}
    same_pad = sample(model, params, prompts, mask, KEY, pad_id=3, **settings)
    other_pad = sample(model, params, np.where(mask, prompts, 17), mask, KEY, pad_id=17, **settings)
    real = np.asarray(same_pad.response_mask)
    assert real.sum(axis=1).max() > 1
    np.testing.assert_array_equal(real, other_pad.response_mask)
    np.testing.assert_array_equal(np.asarray(same_pad.tokens[:, 6:])[real], np.asarray(other_pad.tokens[:, 6:])[real])
    np.testing.assert_array_equal(same_pad.logprobs, other_pad.logprobs)


def test_max_new_tokens_and_min_new_tokens_limit_the_length():
    model, params = tiny()
    prompts, mask = ragged_prompts(16, 4)
    one = sample(model, params, prompts, mask, KEY, max_new_tokens=1, eos_id=3)
    assert one.response_mask.all()
    assert one.tokens.shape == (16, 5)
    without = sample(model, params, prompts, mask, KEY, max_new_tokens=9)
    assert without.response_mask.all()
    eos = int(np.bincount(np.asarray(without.tokens[:, 4:]).reshape(-1)).argmax())
    short = sample(model, params, prompts, mask, KEY, max_new_tokens=9, eos_id=eos)
    longer = sample(model, params, prompts, mask, KEY, max_new_tokens=9, min_new_tokens=5, eos_id=eos)
    assert short.response_mask.sum(axis=1).min() < 5
    assert longer.response_mask.sum(axis=1).min() == 6  # five other tokens, then EOS
    assert not (longer.tokens[:, 4:9] == eos).any()
    # The ban lowers kept_mass, but log-probs stay those of the whole softmax.
    scored = token_logprobs(model, params, longer.tokens, whole_mask(mask, longer))[:, 3:]
    real = np.asarray(longer.response_mask)
    np.testing.assert_allclose(np.asarray(longer.logprobs)[real], np.asarray(scored)[real], atol=1e-4)
    assert float(longer.kept_mass[:, :5].max()) < 1


def test_decoding_stops_when_every_row_has_ended(monkeypatch):
    """The number of draws is the length of the longest response, not max_new_tokens (1,000)."""
    draws = []

    def counted(*args, **kwargs):
        jax.debug.callback(lambda: draws.append(1))
        return draw_tokens(*args, **kwargs)

    monkeypatch.setattr(sampler, "draw_tokens", counted)
    model, params = tiny(max_positions=2000)
    prompts, mask = ragged_prompts(4, 3)
    samples = sample(model, params, prompts, mask, KEY, max_new_tokens=1000, eos_id=(3, 4, 5, 6, 7, 8))
    jax.effects_barrier()
    longest = int(samples.response_mask.sum(axis=1).max())
    assert 1 < longest < 200
    assert len(draws) == longest


def test_the_cache_grows_in_stages_of_at_least_128_tokens():
    assert [decode_stages(length) for length in (1, 127, 255)] == [(1,), (127,), (255,)]
    assert decode_stages(256) == (128, 256)
    assert decode_stages(400) == (133, 266, 400)
    assert decode_stages(1000) == (250, 500, 750, 1000)


@pytest.mark.parametrize("scan_layers", [True, False])
def test_samples_do_not_depend_on_the_number_of_stages(monkeypatch, scan_layers):
    """Seven stages give the same as one, with sliding windows and with rows that end in different stages."""
    model, params = tiny(2.0, sliding_window=5, sliding_layers=(True, False))
    if not scan_layers:
        model, params = model.clone(scan_layers=False), unstack_layers(params, 2)
    prompts, mask = ragged_prompts(6, 5)
    sampling = Sampling(21, temperature=2.0, eos_ids=(3,))

    def drawn(tokens, most):
        monkeypatch.setattr(sampler, "STAGE_TOKENS", tokens)
        monkeypatch.setattr(sampler, "MAX_STAGES", most)
        assert len(decode_stages(21)) == most
        return jax.jit(lambda: rollout(model, params, rows, KEY, sampling))()

    ids = jnp.arange(6)
    rows = Prompts(jnp.asarray(prompts), jnp.asarray(mask), ids, columns=None)
    whole, staged = drawn(21, 1), drawn(3, 7)
    lengths = whole.response_mask.sum(axis=1)
    assert 1 < int(lengths.min()) < 15
    assert int(lengths.max()) == 21
    assert_same_responses(model, params, whole, staged, prompts=prompts, mask=mask, row_ids=ids)


def test_a_step_reads_only_the_slots_of_its_stage(monkeypatch):
    """A stage's cache has slots for the prompt and for the response up to the stage's end, not to max_new_tokens."""
    monkeypatch.setattr(sampler, "STAGE_TOKENS", 4)
    model, params = tiny()
    prompts, mask = ragged_prompts(2, 3)
    rows = Prompts(prompts, mask, jnp.arange(2), columns=None)
    turns = jax.make_jaxpr(lambda: rollout(model, params, rows, KEY, Sampling(16)))()
    loops = [equation for equation in turns.eqns if equation.primitive.name == "while"]
    widths = [{shape[3] for shape in shapes_of(loop.params["body_jaxpr"]) if len(shape) == 5} for loop in loops]
    assert widths == [{3 + end - 1} for end in (4, 8, 12, 16)]  # [L, B, K, S, head_dim]
    assert [loop_turns(str(loop.source_info.name_stack)) for loop in loops] == [3, 4, 4, 4]


def shapes_of(jaxpr):
    return [variable.aval.shape for variable in jaxpr.jaxpr.invars]


def test_padding_rows_of_the_vocabulary_are_never_sampled():
    model, params = tiny(vocab_size=29, padded_vocab_size=32)
    # Without a mask, the padding rows would win every draw.
    params = jax.tree.map(lambda leaf: leaf.at[29:].set(1e3) if leaf.shape[0] == 32 else leaf, params)
    assert sum(bool((leaf == 1e3).any()) for leaf in jax.tree.leaves(params)) == 2  # embedding and head
    prompts, mask = ragged_prompts(64, 4, vocab=29)
    samples = sample(model, params, prompts, mask, KEY, max_new_tokens=10, temperature=5.0)
    assert int(samples.tokens.max()) < 29
    scored = token_logprobs(model, params, samples.tokens, whole_mask(mask, samples), temperature=5.0)[:, 3:]
    np.testing.assert_allclose(samples.logprobs, scored, atol=1e-4)


# ---- a response does not depend on the other rows ------------------------------------------------------------------


def test_a_response_is_independent_of_other_rows_their_order_and_padding():
    model, params = tiny()
    prompts, mask = ragged_prompts(64, 6)
    settings = {"max_new_tokens": 16, "eos_id": 3}
    together = sample(model, params, prompts, mask, KEY, **settings)
    check = functools.partial(assert_same_responses, model, params, together)
    ids = np.arange(64)

    order = np.random.RandomState(1).permutation(64)
    shuffled = sample(model, params, prompts[order], mask[order], KEY, row_ids=order, **settings)
    back = jax.tree.map(lambda leaf: leaf[np.argsort(order)], shuffled)
    check(back, prompts=prompts, mask=mask, row_ids=ids)

    wide = sample(model, params, np.pad(prompts, ((0, 0), (5, 0))), np.pad(mask, ((0, 0), (5, 0))), KEY, **settings)
    check(wide, prompts=prompts, mask=mask, row_ids=ids)

    for row in (0, 17, 63):
        alone = sample(
            model, params, prompts[row : row + 1], mask[row : row + 1], KEY, row_ids=ids[row : row + 1], **settings
        )
        one = jax.tree.map(lambda leaf, row=row: leaf[row : row + 1], together)
        mine = {"prompts": prompts[row : row + 1], "mask": mask[row : row + 1], "row_ids": [row]}
        assert_same_responses(model, params, one, alone, **mine)
    # Other row ids, or another key, give other responses, so the comparison above can fail.
    other = sample(model, params, prompts, mask, KEY, row_ids=ids + 64, **settings)
    assert (np.asarray(other.tokens) != np.asarray(together.tokens)).any(axis=1).mean() > 0.9
    other = sample(model, params, prompts, mask, jax.random.key(4), **settings)
    assert (np.asarray(other.tokens) != np.asarray(together.tokens)).any(axis=1).mean() > 0.9


def test_rows_with_the_same_prompt_get_different_responses():
    model, params = tiny()
    prompts = np.full((64, 3), 5, np.int32)
    samples = sample(model, params, prompts, np.ones_like(prompts, bool), KEY, max_new_tokens=12)
    assert len(np.unique(np.asarray(samples.tokens), axis=0)) == 64


def test_eight_devices_sample_the_same_as_one():
    model, params = tiny()
    prompts, mask = ragged_prompts(64, 6)
    settings = {"max_new_tokens": 16, "eos_id": 3}
    one = sample(model, params, prompts, mask, KEY, **settings)
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "fsdp"))
    rows = put_rows((prompts, mask, np.arange(64, dtype=np.int32)), mesh)
    replicated = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    eight = sample(model, replicated, rows[0], rows[1], KEY, row_ids=rows[2], **settings)
    assert len(eight.tokens.sharding.device_set) == 8
    assert_same_responses(model, params, one, eight, prompts=prompts, mask=mask, row_ids=np.arange(64))


# ---- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"min_new_tokens": 9}, "min_new_tokens=9"),
        ({"temperature": 0.0}, "top_k=1"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_k": -1}, "top_k=-1"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"eos_id": 31}, "eos_id 31"),
        ({"eos_id": [2, -1]}, "eos_id -1"),
    ],
)
def test_errors_name_the_invalid_setting(changes, message):
    model, params = tiny()
    prompts, mask = ragged_prompts(2, 4)
    with pytest.raises(ValueError, match=message):
        sample(model, params, prompts, mask, KEY, **{"max_new_tokens": 4, **changes})


def test_an_eos_id_that_is_not_a_token_is_an_error():
    model, params = tiny()
    few = model.clone(config=model.config.limited_to(20))
    prompts, mask = ragged_prompts(2, 4)
    with pytest.raises(ValueError, match="eos_id 20 is not among the model's 20 tokens"):
        sample(few, params, prompts % 20, mask, KEY, max_new_tokens=4, eos_id=20)
    assert sample(few, params, prompts % 20, mask, KEY, max_new_tokens=4, eos_id=19).tokens.max() < 20


def test_errors_name_the_invalid_prompt():
    model, params = tiny(position_kind="learned", rotary=None, max_positions=16)
    prompts, mask = ragged_prompts(4, 6)
    run = functools.partial(sample, model, params, prompts, max_new_tokens=4)
    empty = mask.copy()
    empty[2] = False
    with pytest.raises(ValueError, match="prompt 2 is empty"):
        run(empty, KEY)
    right = mask.copy()
    right[1] = [True, True, True, True, False, False]
    with pytest.raises(ValueError, match="prompt 1 is not padded on the left"):
        run(right, KEY)
    with pytest.raises(ValueError, match="prompt_mask must be bool"):
        check_prompts(model, mask.astype(np.int32), Sampling(max_new_tokens=4))
    with pytest.raises(ValueError, match=r"prompt 0 has 6 tokens.*16 positions"):
        sample(model, params, prompts, mask, KEY, max_new_tokens=12)
