"""Learning rates, both forms of Adam, weight decay and gradient clipping."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jax_rlhf.models import Decoder, init_params
from jax_rlhf.optim.config import OptimizerConfig
from jax_rlhf.optim.optimizer import create_optimizer, decayed, learning_rate_schedule, optimizer_step
from tests.models.test_decoder import tiny_config


def adam(gradients, *, form, b1=0.9, b2=0.95, eps=1e-3, rate=0.1, decay=0.0, start=1.0):
    """Adam on one parameter in float64, as each framework's documentation defines it."""
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
def test_adam_follows_each_frameworks_definition(form):
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


def test_schedules_follow_their_formulas():
    rate = lambda step, **fields: float(learning_rate_schedule(OptimizerConfig(learning_rate=2.0, **fields))(step))  # noqa: E731
    assert rate(0) == rate(10**6) == 2.0
    linear = {"schedule": "linear", "warmup_steps": 4, "total_steps": 14}
    np.testing.assert_allclose([rate(s, **linear) for s in (0, 1, 3, 4, 9, 14, 99)], [0.5, 1, 2, 2, 1, 0, 0], atol=1e-6)
    cosine = {"schedule": "cosine", "total_steps": 10, "final_fraction": 0.1}
    np.testing.assert_allclose([rate(s, **cosine) for s in (0, 5, 10, 99)], [2, 1.1, 0.2, 0.2], rtol=1e-6)
    np.testing.assert_allclose(rate(0, warmup_steps=1), 2.0)
    # Warm-up to step 4, then decay to 10 % at step 14. Step 9 is half-way.
    ends = {"warmup_steps": 4, "total_steps": 14, "final_fraction": 0.1}
    for schedule in ("linear", "cosine"):
        rates = [rate(step, schedule=schedule, **ends) for step in (0, 4, 9, 14, 99)]
        np.testing.assert_allclose(rates, [0.5, 2, 1.1, 0.2, 0.2], rtol=1e-6)


LINEAR = {"learning_rate": 2.0, "eps": 1e6, "beta1": 0.0, "beta2": 0.0}
"""Adam whose step is −2e-6 times the gradient, so that a step shows the scale of the gradient."""


def stepped(params, gradient, *, step=0, scale=1.0, **fields):
    """The updates of one step, times 1e6."""
    optimizer = create_optimizer(OptimizerConfig(**LINEAR | fields))
    updates, _ = optimizer.update(gradient, optimizer.init(params), params, step=step, scale=scale)
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64) * 1e6, updates)


def test_the_global_norm_is_clipped_before_adam():
    gradient = {"a": jnp.array([30.0, 0.0]), "b": jnp.array([0.0, 40.0])}
    zeros = jax.tree.map(jnp.zeros_like, gradient)
    for limit, factor in ((0.5, 0.01), (100.0, 1.0), (None, 1.0)):
        updates = stepped(zeros, gradient, max_grad_norm=limit)
        np.testing.assert_allclose(updates["a"], [-60 * factor, 0], rtol=1e-3)
        np.testing.assert_allclose(updates["b"], [0, -80 * factor], rtol=1e-3)


def test_the_rate_is_that_of_the_given_step_times_the_scale():
    params, gradient = {"a": jnp.zeros(1)}, {"a": jnp.ones(1)}
    falling = {"schedule": "linear", "total_steps": 10}
    for step, scale, wanted in ((0, 1.0, -2.0), (5, 1.0, -1.0), (5, 0.5, -0.5), (9, 1.0, -0.2)):
        updates = stepped(params, gradient, step=step, scale=scale, **falling)
        np.testing.assert_allclose(updates["a"], [wanted], rtol=1e-3)
        config = OptimizerConfig(**LINEAR | falling)
        state, options = create_optimizer(config).init(params), {"step": jnp.int32(step), "scale": jnp.float32(scale)}
        after, _, rate = optimizer_step(config, gradient, state, params, take=jnp.bool_(True), **options)
        np.testing.assert_allclose(np.asarray(after["a"]) * 1e6, [wanted], rtol=1e-3)
        np.testing.assert_allclose(rate, learning_rate_schedule(config)(step) * scale, rtol=1e-6)
        same, kept, _ = optimizer_step(config, gradient, state, params, take=jnp.bool_(False), **options)
        jax.tree.map(np.testing.assert_array_equal, (same, kept), (params, state))


def test_weight_decay_is_decoupled_and_skips_norms_and_biases():
    params = {name: {kind: jnp.full(2, 3.0) for kind in ("kernel", "scale", "bias")} for name in ("norm", "dense")}
    updates = stepped(params, jax.tree.map(jnp.zeros_like, params), weight_decay=0.01)
    for part in updates.values():
        np.testing.assert_allclose(part.pop("kernel"), [-2 * 0.01 * 3 * 1e6] * 2, rtol=1e-5)
    assert all(not leaf.any() for leaf in jax.tree.leaves(updates))


@pytest.mark.parametrize("form", ["pytorch", "tensorflow"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_first_moment_has_the_configured_dtype_the_second_float32(form, dtype):
    config = OptimizerConfig(eps_form=form, first_moment_dtype=dtype, max_grad_norm=None)
    adam_state = create_optimizer(config).init({"kernel": jnp.ones(3)})[0]
    assert (adam_state.mu["kernel"].dtype, adam_state.nu["kernel"].dtype) == (jnp.dtype(dtype), jnp.dtype("float32"))


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
def test_errors_name_the_invalid_field(fields, message):
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"schedule": "linear"}, "needs total_steps above warmup_steps=0"),
        ({"schedule": "cosine", "warmup_steps": 9, "total_steps": 9}, "not 9"),
    ],
)
def test_a_decaying_schedule_needs_total_steps(fields, message):
    with pytest.raises(ValueError, match=message):
        create_optimizer(OptimizerConfig(**fields))


def test_the_head_can_have_its_own_learning_rate():
    params = {"scalar_head": {"kernel": jnp.ones(3)}, "layers": {"kernel": jnp.ones(3)}}
    optimizer = create_optimizer(OptimizerConfig(learning_rate=1e-3, max_grad_norm=None), head_learning_rate=1e-2)
    updates, _ = optimizer.update(jax.tree.map(jnp.ones_like, params), optimizer.init(params), params, step=0)
    np.testing.assert_allclose(updates["scalar_head"]["kernel"], 10 * updates["layers"]["kernel"], rtol=1e-5)
    np.testing.assert_allclose(updates["layers"]["kernel"], -1e-3, rtol=1e-4)
