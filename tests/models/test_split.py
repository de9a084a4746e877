"""A model that is split into frozen bottom and trainable top layers computes the same as the whole model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_rlhf.models import Decoder, init_params, unstack_layers
from jax_rlhf.models.split import SplitModel
from tests.models.test_decoder import MASK, TOKENS, tiny_config

FAMILY = {"sliding_window": 3, "sliding_layers": (True, False, True)}


@pytest.mark.parametrize("trainable_layers", [None, 1, 3])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_embeddings": True},
        {"position_kind": "learned", "rotary": None, "embedding_size": 16, "tie_embeddings": True},
        {"scale_by_layer": True, "parallel_residual": True},
    ],
)
def test_frozen_activations_and_top_layers_give_the_whole_models_logits(changes, trainable_layers):
    model = Decoder(tiny_config(**FAMILY, **changes))
    params = init_params(model, jax.random.key(0))
    network = SplitModel(model, trainable_layers)
    parts = network.split(params)

    @jax.jit
    def both(parts, params):
        activations = network.frozen_activations(parts, TOKENS, MASK)
        assert (activations is None) == (trainable_layers is None)
        hidden = network.hidden_states(parts, TOKENS, MASK, activations)
        other = hidden if activations is None else network.hidden_states(parts, TOKENS, MASK, activations + 1)
        logits = model.apply({"params": network.head_params(parts)}, hidden, method="apply_head")
        return logits, model.apply({"params": params}, TOKENS, mask=MASK), other - hidden

    logits, wanted, moved = (np.asarray(x)[np.asarray(MASK)] for x in both(parts, params))
    np.testing.assert_allclose(logits, wanted, atol=1e-6)
    assert (np.abs(moved).max() > 1e-3) == (trainable_layers is not None)  # the frozen activations are used


@pytest.mark.parametrize("trainable_layers", [None, 1, 2, 3])
def test_join_and_unstack_give_the_whole_tree(trainable_layers):
    model = Decoder(tiny_config())
    params = init_params(model, jax.random.key(0))
    network = SplitModel(model, trainable_layers)
    parts = network.split(params)
    jax.tree.map(np.testing.assert_array_equal, network.join(parts), params)
    jax.tree.map(np.testing.assert_array_equal, network.unstack(parts), unstack_layers(params, 3))
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (parts.frozen, parts.trainable, params)]
    assert sizes[0] + sizes[1] == sizes[2]  # no parameter is stored twice
    assert (sizes[0] == 0) == (trainable_layers is None)


def test_layers_out_of_range_and_unrolled_models_are_errors():
    model = Decoder(tiny_config())
    for wrong in (0, 4, -1):
        with pytest.raises(ValueError, match=f"trainable_layers={wrong} must be from 1 to the model's 3"):
            SplitModel(model, wrong)
    with pytest.raises(ValueError, match="scan_layers=True"):
        SplitModel(model.clone(scan_layers=False))


def test_no_gradient_reaches_the_frozen_part():
    model = Decoder(tiny_config(tie_embeddings=True))
    network = SplitModel(model, 1)
    parts = network.split(init_params(model, jax.random.key(0)))

    def loss(trainable):
        whole = parts.replace(trainable=trainable)
        hidden = network.hidden_states(whole, TOKENS, MASK, network.frozen_activations(whole, TOKENS, MASK))
        return jnp.sum(hidden**2)

    gradient = jax.jit(jax.grad(loss))(parts.trainable)
    assert jax.tree.structure(gradient) == jax.tree.structure(parts.trainable)
    assert "embedding" not in gradient
    assert all(len(leaf) == 1 for leaf in jax.tree.leaves(gradient["layers"]))
