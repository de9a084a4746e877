"""The supervised step: the gradient of the mean loss, skipped steps, counters, learning rates and metrics."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_rlhf import Pretrained
from jax_rlhf.data.batches import pair_batch, text_batch
from jax_rlhf.models import Decoder
from jax_rlhf.models.split import SplitModel
from jax_rlhf.optim.supervised import TrainingSpec, create_state, update
from jax_rlhf.reward.loss import RewardLoss, reward_start
from tests.optim.test_supervised import LINEAR, examples, sft
from tests.ppo import tiny


def plain_loss(policy, params, rows):
    """(mean −log π per completion token, number of completion tokens), one text at a time."""
    total, count = 0.0, 0
    for row in rows:
        ids, first = np.concatenate([row.prompt, *row.completions]), len(row.prompt)
        logprobs = jax.nn.log_softmax(policy.model.apply({"params": params}, ids[None])[0])
        total -= jnp.sum(logprobs[np.arange(first - 1, len(ids) - 1), ids[first:]])
        count += len(ids) - first
    return total / count, count


def test_a_step_follows_the_gradient_of_the_mean_loss_per_token():
    rows = examples(1)
    spec, policy = sft()
    plain = jax.jit(jax.value_and_grad(lambda params: plain_loss(policy, params, rows), has_aux=True))
    (loss, count), gradient = plain(policy.params)
    after, metrics = update(spec, *create_state(spec, policy.params), text_batch([[row] for row in rows], 12, 0))
    # Adam without moving averages (β₁ = β₂ = 0), as in LINEAR.
    step = jax.tree.map(lambda slope: LINEAR.learning_rate * slope / (jnp.abs(slope) + LINEAR.eps), gradient)
    wanted = jax.tree.map(jnp.subtract, policy.params, step)
    for (path, leaf), other in zip(
        jax.tree_util.tree_leaves_with_path(after.trainable), jax.tree.leaves(wanted), strict=True
    ):
        np.testing.assert_allclose(leaf, other, atol=1e-5, err_msg=jax.tree_util.keystr(path))
    norm = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(gradient)))
    assert float(metrics["loss"]) == pytest.approx(float(loss), rel=1e-5)
    assert float(metrics["grad_norm"]) == pytest.approx(norm, rel=1e-4)
    assert norm > 0.1
    assert int(metrics["count"]) == count
    assert int(metrics["tokens"]) == sum(row.length for row in rows) > count
    assert float(metrics["lr"]) == LINEAR.learning_rate


# ---- skipped steps and learning rates of a reward model ------------------------------------------------------------


def slope_loss(network, params, batch):
    """A finite loss. Its gradient is not finite if `chosen` is 0, because √x has an infinite slope at 0."""
    del network
    kernel = params.trainable["scalar_head"]["kernel"]
    loss = jnp.sum(kernel) * jnp.sum(batch.margin) + jnp.sqrt(jnp.sum(kernel) * jnp.sum(batch.chosen))
    return {"loss": loss, "count": jnp.float32(1)}


def reward_model(**spec):
    start = reward_start(tiny.policy(), 1, jax.random.key(3))
    return TrainingSpec(SplitModel(start.model), **spec), start


def test_non_finite_steps_change_only_the_counters_and_the_schedule():
    """An infinite margin gives an infinite loss, but a finite gradient."""
    falling = dataclasses.replace(LINEAR, schedule="linear", total_steps=4)
    spec, start = reward_model(loss=RewardLoss(), optimizer=falling)
    state, frozen = create_state(spec, start.params)
    good = pair_batch(examples(2, answers=2), 12, 0)
    bad = good.replace(margin=np.full(2, np.inf, np.float32))
    kept, seen = jax.device_get((state.trainable, state.optimizer)), []
    for batch in (bad, bad, good, good, bad):
        before = jax.device_get((state.trainable, state.optimizer))
        state, metrics = update(spec, state, frozen, batch)
        numbers = [float(metrics[name]) for name in ("skipped_updates", "bad_steps", "lr")]
        if len(seen) == 2:
            moved = jax.device_get(state.trainable)
        seen.append((int(state.step), int(state.skipped_updates), int(state.bad_steps), *numbers))
        if batch is bad:
            assert np.isinf(metrics["loss"])
            assert np.isfinite(metrics["grad_norm"])
            jax.tree.map(np.testing.assert_array_equal, jax.device_get((state.trainable, state.optimizer)), before)
    counts = [(1, 1, 1), (2, 2, 2), (3, 2, 0), (4, 2, 0), (5, 3, 1)]
    rates = [LINEAR.learning_rate * share for share in (1, 0.75, 0.5, 0.25, 0)]
    assert seen == [(*count, *count[1:], rate) for count, rate in zip(counts, rates, strict=True)]
    # The first finite step is the third, so its learning rate is half of the highest.
    first, _ = create_state(spec, start.params)
    fresh, _ = update(spec, first, frozen, good)
    other, _ = create_state(spec, start.params)
    third, _ = update(spec, other.replace(step=jnp.int32(2)), frozen, good)
    jax.tree.map(np.testing.assert_array_equal, moved, jax.device_get(third.trainable))
    for a, b, c in zip(*(jax.tree.leaves(tree) for tree in (kept[0], fresh.trainable, third.trainable)), strict=True):
        np.testing.assert_allclose(np.asarray(b) - a, 2 * (np.asarray(c) - a), atol=1e-5)


def test_a_finite_loss_with_a_non_finite_gradient_is_skipped():
    """The gradient of √x at 0 is infinite."""
    spec, start = reward_model(loss=slope_loss, optimizer=LINEAR)
    state, frozen = create_state(spec, start.params)
    before = jax.device_get(state.trainable)
    pairs = pair_batch(examples(2, answers=2), 12, 0)
    after, metrics = update(spec, state, frozen, pairs.replace(chosen=np.zeros_like(pairs.chosen)))
    assert np.isfinite(metrics["loss"])
    assert (int(after.skipped_updates), int(after.bad_steps)) == (1, 1)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(after.trainable), before)


def test_the_head_trains_with_its_own_learning_rate():
    pairs, steps = pair_batch(examples(2, answers=2), 12, 0), []
    for rate in (None, 3 * LINEAR.learning_rate):
        spec, start = reward_model(loss=RewardLoss(), optimizer=LINEAR, head_learning_rate=rate)
        state, frozen = create_state(spec, start.params)
        before = jax.device_get(state.trainable)
        after, _ = update(spec, state, frozen, pairs)
        steps.append(jax.tree.map(lambda new, old: np.asarray(new) - old, after.trainable, before))
    np.testing.assert_allclose(
        steps[1].pop("scalar_head")["kernel"], 3 * steps[0].pop("scalar_head")["kernel"], rtol=1e-4
    )
    jax.tree.map(np.testing.assert_array_equal, *steps)


def test_trainable_parameters_are_stored_in_float32():
    policy = tiny.policy()
    half = dataclasses.replace(policy, params=jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), policy.params))
    state, _ = create_state(sft()[0], half.params)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.trainable)} == {jnp.dtype("float32")}
    assert {leaf.dtype for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim} == {jnp.dtype("float32")}


# ---- how a reward model is initialised -----------------------------------------------------------------------------


def test_a_new_head_is_normal_with_deviation_1_over_sqrt_of_width_plus_1():
    key = jax.random.key(7)
    kernel = reward_start(tiny.policy(), None, key).params["scalar_head"]["kernel"]
    np.testing.assert_allclose(kernel, jax.random.normal(key, (32, 1)) / np.sqrt(33), rtol=1e-6)


def test_a_reward_model_keeps_head_and_biases_unless_layers_are_removed():
    reward = dataclasses.replace(tiny.policy(5, head="scalar"), reward_bias=0.5, missing_eos_bias=0.25)
    kept, cut = (reward_start(reward, layers, jax.random.key(3)) for layers in (None, 1))
    np.testing.assert_array_equal(kept.params["scalar_head"]["kernel"], reward.params["scalar_head"]["kernel"])
    assert (kept.reward_bias, kept.missing_eos_bias, kept.new_head) == (0.5, 0.25, False)
    np.testing.assert_allclose(
        cut.params["scalar_head"]["kernel"], jax.random.normal(jax.random.key(3), (32, 1)) / np.sqrt(33), rtol=1e-6
    )
    assert (cut.reward_bias, cut.missing_eos_bias, cut.new_head) == (0.0, 0.0, True)


def test_the_layers_of_a_cut_model_keep_their_windows():
    policy = tiny.policy()
    config = policy.model.config.replace(num_layers=4, sliding_layers=(True, False, True, True), sliding_window=4)
    layers = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf]), policy.params["layers"])
    start = Pretrained(Decoder(config), policy.params | {"layers": layers}, None)
    for count in (1, 2, 3):
        cut = reward_start(start, count, jax.random.key(0)).model.config
        assert (cut.num_layers, cut.sliding_layers) == (count, (True, False, True)[:count])
