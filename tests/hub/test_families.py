"""Every family computes the same as torch transformers from the same files, and its saved files load in torch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_rlhf import load_pretrained, save_pretrained
from jax_rlhf.models import create_cache, unstack_layers
from tests.hub import tiny

TOLERANCE = 2e-4
CASES, HEADS = list(tiny.CASES), ["lm", "scalar"]

each_case = pytest.mark.parametrize("case", CASES)
each_head = pytest.mark.parametrize("head", HEADS)


@functools.partial(jax.jit, static_argnums=0)
def apply(model, params, tokens, positions, mask):
    return model.apply({"params": params}, tokens, positions, mask)


def outputs(pretrained):
    """The outputs on `tiny.batch()`, with default positions."""
    tokens, mask, _ = tiny.batch()
    return np.asarray(apply(pretrained.model, pretrained.params, tokens, None, mask))


def real_difference(ours, theirs):
    """The largest difference at real tokens."""
    mask = tiny.batch()[1]
    return np.abs(ours - theirs)[mask].max()


@each_head
@each_case
def test_outputs_equal_the_stored_outputs_of_torch(case, head, tmp_path):
    ours = outputs(load_pretrained(tiny.write_checkpoint(tmp_path / case, case, head), head=head))
    theirs = tiny.stored_logits(case, head)
    assert ours.dtype == np.float32
    assert ours.shape == theirs.shape
    assert np.isfinite(ours).all()
    assert theirs[tiny.batch()[1]].std() > 0.1  # the outputs are not nearly constant
    assert real_difference(ours, theirs) < TOLERANCE


@each_head
@each_case
def test_torch_loads_a_saved_model_and_computes_the_same(case, head, tmp_path):
    pytest.importorskip("torch")
    from tests.hub import torch_oracle

    source = tiny.write_checkpoint(tmp_path / "source", case, head)
    pretrained = load_pretrained(source, head=head)
    ours = outputs(pretrained)
    assert real_difference(ours, torch_oracle.outputs(torch_oracle.load(source, head), head)) < TOLERANCE
    save_pretrained(tmp_path / "saved", pretrained)
    assert real_difference(ours, torch_oracle.outputs(torch_oracle.load(tmp_path / "saved", head), head)) < TOLERANCE


@each_case
def test_stored_names_and_shapes_still_equal_torchs(case):
    pytest.importorskip("torch")
    from tests.hub import make_fixtures, torch_oracle

    stored = {name: list(array.shape) for name, array in tiny.tensors(case).items()}
    assert stored == make_fixtures.stored_names(torch_oracle.empty(case, "lm"))


@each_case
def test_round_trip_is_bit_identical(case, tmp_path):
    first = load_pretrained(tiny.write_checkpoint(tmp_path / "source", case))
    save_pretrained(tmp_path / "saved", first)
    again = load_pretrained(tmp_path / "saved")
    assert again.model == first.model
    same = jax.tree.map(lambda a, b: a.dtype == b.dtype and bool((a == b).all()), first.params, again.params)
    assert all(jax.tree.leaves(same))


def decode(model, params, tokens, mask, prompt):
    """Logits [B, T, V], with the KV cache: first the whole prompt, then one token per step."""
    variables = {"params": params}
    length = tokens.shape[1]
    cache = create_cache(model.config, len(tokens), length + 2, scan_layers=model.scan_layers)
    hidden, cache = model.apply(
        variables, tokens[:, :prompt], cache, None, mask[:, :prompt], span=prompt, method="extend"
    )

    def step(cache, column):
        token, real = column
        hidden, cache = model.apply(variables, token[:, None], cache, None, real[:, None], method="extend")
        return cache, hidden[:, 0]

    _, rest = jax.lax.scan(step, cache, (tokens[:, prompt:].T, mask[:, prompt:].T))
    hidden = jnp.concatenate([hidden, rest.swapaxes(0, 1)], axis=1)
    return model.apply(variables, hidden, method="apply_head")


@pytest.mark.parametrize("scan_layers", [True, False], ids=["scanned", "unrolled"])
@each_case
def test_decoding_with_the_cache_equals_one_forward_pass_of_whole_rows(case, scan_layers, tmp_path):
    pretrained = load_pretrained(tiny.write_checkpoint(tmp_path / case, case))
    model, params = pretrained.model.clone(scan_layers=scan_layers), pretrained.params
    if not scan_layers:
        params = unstack_layers(params, model.config.num_layers)
    tokens, mask, _ = tiny.batch()
    if case == "phi3_longrope":  # keys cached before the switch to the long factors keep the short ones
        tokens, mask = tokens[:, :8], mask[:, :8]
    run = jax.jit(functools.partial(decode, model, prompt=5))
    stepped = np.asarray(run(params, jnp.asarray(tokens), jnp.asarray(mask)))
    whole = np.asarray(apply(pretrained.model, pretrained.params, tokens, None, mask))
    assert np.abs(stepped - whole)[mask].max() < TOLERANCE


@each_case
def test_ids_and_slots_of_pads_do_not_change_the_outputs(case, tmp_path):
    pretrained = load_pretrained(tiny.write_checkpoint(tmp_path / case, case))
    tokens, mask, positions = tiny.batch()
    plain = outputs(pretrained)
    for pad in (-100, 2, 10**6):  # the ignored label, EOS, an id beyond the table
        changed = np.where(mask, tokens, pad)
        other = np.asarray(apply(pretrained.model, pretrained.params, changed, np.where(mask, positions, -7), mask))
        assert (other[mask] == plain[mask]).all(), pad

    row, short = tokens[2], 7  # seven tokens alone, and with pads before, between and after them
    places = np.array([1, 2, 4, 5, 6, 8, 9])
    scattered, real = np.full((1, tiny.LENGTH), 5), np.zeros((1, tiny.LENGTH), bool)
    scattered[0, places], real[0, places] = row[:short], True
    alone = np.asarray(apply(pretrained.model, pretrained.params, row[None, :short], None, np.ones((1, short), bool)))
    among = np.asarray(apply(pretrained.model, pretrained.params, scattered, None, real))
    assert np.abs(among[0, places] - alone[0]).max() < 2e-5
