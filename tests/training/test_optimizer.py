"""Learning rates, Adam in both forms, what decays and what is clipped."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jax_rlhf.models import Decoder, init_params
from jax_rlhf.training import OptimizerConfig, create_optimizer, learning_rate_schedule
from jax_rlhf.training.optimizer import decayed
from tests.models.test_decoder import tiny_config


def adam(gradients, *, form, b1=0.9, b2=0.95, eps=1e-3, rate=0.1, decay=0.0, start=1.0):
    """One parameter, float64, as each framework's manual has it."""
    p, m, v, trajectory = start, 0.0, 0.0, []
    for t, g in enumerate(gradients, start=1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        if form == "pytorch":
            step = (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
        else:
            step = np.sqrt(1 - b2**t) / (1 - b1**t) * m / (np.sqrt(v) + eps)
        p -= rate * (step + decay * p)
        trajectory.append(p)
    return trajectory


@pytest.mark.parametrize("form", ["pytorch", "tensorflow"])
def test_adam_follows_the_manuals(form):
    gradients = np.random.RandomState(0).randn(12) * 1e-3
    config = OptimizerConfig(learning_rate=0.1, eps=1e-3, eps_form=form, max_grad_norm=None, weight_decay=0.01)
    optimizer, params = create_optimizer(config), {"kernel": jnp.ones(())}
    state, trajectory = optimizer.init(params), []
    for step, gradient in enumerate(gradients):
        updates, state = optimizer.update({"kernel": jnp.float32(gradient)}, state, params, step=step)
        params = optax.apply_updates(params, updates)
        trajectory.append(float(params["kernel"]))
    np.testing.assert_allclose(trajectory, adam(gradients, form=form, decay=0.01), rtol=1e-5)
    other = "tensorflow" if form == "pytorch" else "pytorch"
    assert not np.allclose(trajectory, adam(gradients, form=other, decay=0.01), rtol=1e-2)


def test_schedules():
    rate = lambda step, **fields: float(learning_rate_schedule(OptimizerConfig(learning_rate=2.0, **fields))(step))  # noqa: E731
    assert rate(0) == rate(10**6) == 2.0
    linear = {"schedule": "linear", "warmup_steps": 4, "total_steps": 14}
    np.testing.assert_allclose([rate(s, **linear) for s in (0, 1, 3, 4, 9, 14, 99)], [0.5, 1, 2, 2, 1, 0, 0], atol=1e-6)
    cosine = {"schedule": "cosine", "total_steps": 10, "final_fraction": 0.1}
    np.testing.assert_allclose([rate(s, **cosine) for s in (0, 5, 10, 99)], [2, 1.1, 0.2, 0.2], rtol=1e-6)
    np.testing.assert_allclose(rate(0, warmup_steps=1), 2.0)


def test_the_gradient_is_clipped_by_its_global_norm():
    params = {"kernel": jnp.zeros(2)}
    optimizer = create_optimizer(OptimizerConfig(max_grad_norm=1.0))
    state = optimizer.init(params)
    _, first = optimizer.update({"kernel": jnp.array([30.0, 40.0])}, state, params, step=0)
    _, same = optimizer.update({"kernel": jnp.array([0.6, 0.8])}, state, params, step=0)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), first, same)


def test_norms_and_biases_do_not_decay():
    config = tiny_config(qkv_bias=True, out_bias=True, mlp_bias=True, norm_kind="layer", qk_norm=True)
    params = init_params(Decoder(config), jax.random.key(0))
    marked = decayed(params)
    paths = {jax.tree_util.keystr(path): value for path, value in jax.tree_util.tree_leaves_with_path(marked)}
    assert {value for path, value in paths.items() if path.endswith(("['scale']", "['bias']"))} == {False}
    kept = [path for path, value in paths.items() if value]
    assert kept
    assert all("norm" not in path and "bias" not in path for path in kept)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"schedule": "step"}, "schedule='step'"),
        ({"eps_form": "jax"}, "eps_form='jax'"),
    ],
)
def test_bad_fields_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"schedule": "linear"}, "needs total_steps above warmup_steps=0"),
        ({"schedule": "cosine", "warmup_steps": 9, "total_steps": 9}, "not 9"),
    ],
)
def test_a_schedule_that_ends_must_know_where(fields, message):
    with pytest.raises(ValueError, match=message):
        create_optimizer(OptimizerConfig(**fields))


def test_the_head_has_a_learning_rate_of_its_own():
    params = {"scalar_head": {"kernel": jnp.ones(3)}, "layers": {"kernel": jnp.ones(3)}}
    optimizer = create_optimizer(OptimizerConfig(learning_rate=1e-3, max_grad_norm=None), head_learning_rate=1e-2)
    updates, _ = optimizer.update(jax.tree.map(jnp.ones_like, params), optimizer.init(params), params, step=0)
    np.testing.assert_allclose(updates["scalar_head"]["kernel"], 10 * updates["layers"]["kernel"], rtol=1e-5)
    np.testing.assert_allclose(updates["layers"]["kernel"], -1e-3, rtol=1e-4)
