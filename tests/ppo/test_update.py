"""The update: its gradient, what does not affect it, and its options."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from jax_rlhf import RLHFEngine
from jax_rlhf.ppo import step as ppo_step
from jax_rlhf.rl import Batch
from tests.ppo import tiny

ROWS = 16


def params_of(trainer):
    return jax.device_get((trainer.engine.params.trainable.actor, trainer.engine.params.trainable.critic))


def moved(trainer, experience, **kwargs):
    """(changes of actor and critic by one `train_rlhf`, its metrics)."""
    before = params_of(trainer)
    metrics = trainer.train_rlhf(experience, **kwargs)
    return jax.tree.map(np.subtract, params_of(trainer), before), metrics


def assert_close(first, second, tolerance=1e-5):
    """Each leaf agrees to a fraction of its largest entry."""

    def close(a, b):
        np.testing.assert_allclose(a, b, atol=tolerance * np.abs(b).max() + 1e-9)

    jax.tree.map(close, first, second)


def distance(first, second):
    """The largest difference of any leaf, as a fraction of the leaf's largest entry."""
    gaps = jax.tree.map(lambda a, b: np.abs(a - b).max() / (np.abs(b).max() + 1e-9), first, second)
    return max(jax.tree.leaves(gaps))


@functools.cache
def experience():
    made = tiny.trainer().generate_experience(tiny.ragged_prompts(ROWS))
    lengths = np.asarray(made.response_mask).sum(axis=1)
    assert len(np.unique(lengths)) >= 4  # the lengths differ
    # As if both models had been trained since: ratios are not 1, some are clipped, and values are not the critic's.
    random = np.random.RandomState(0)
    noise = [jnp.asarray(np.where(made.response_mask, random.randn(*made.values.shape), 0), jnp.float32) for _ in "12"]
    return jax.device_get(made.replace(logprobs=made.logprobs + 0.15 * noise[0], values=made.values + 0.2 * noise[1]))


def on_device(tree):
    return jax.tree.map(jnp.asarray, tree)


# ---- the gradient --------------------------------------------------------------------------------------------------


@functools.cache
def plain_gradients(average="tokens"):
    """Gradients of actor and critic, from full logits and plain formulas. average="rows" is a common mistake."""
    engine, made = RLHFEngine(tiny.policy()), on_device(experience())
    actor_model, critic_model = engine.models.actor.model, engine.models.critic.model
    mask = jnp.concatenate([made.prompt_mask, made.response_mask], axis=1)
    start = made.prompt_mask.shape[1]

    def mean(x):
        x = jnp.where(made.response_mask, x, 0)
        if average == "tokens":
            return x.sum() / made.response_mask.sum()
        return jnp.mean(x.sum(axis=1) / made.response_mask.sum(axis=1))

    def actor_loss(params):
        logp = jax.nn.log_softmax(actor_model.apply({"params": params}, made.tokens, mask=mask)[:, start - 1 : -1])
        chosen = jnp.take_along_axis(logp, made.tokens[:, start:, None], axis=-1)[..., 0]
        ratio = jnp.exp(chosen - made.logprobs)
        loss = jnp.maximum(-made.advantages * ratio, -made.advantages * jnp.clip(ratio, 0.8, 1.2))
        entropy = -jnp.sum(jnp.exp(logp) * logp, axis=-1)
        return mean(loss) - 0.1 * mean(entropy)

    def critic_loss(params):
        values = critic_model.apply({"params": params}, made.tokens, mask=mask)[:, start - 1 : -1]
        near = jnp.clip(values, made.values - 0.2, made.values + 0.2)
        return mean(0.5 * jnp.maximum((values - made.returns) ** 2, (near - made.returns) ** 2))

    trained = engine.params.trainable
    return jax.device_get(
        (jax.jit(jax.grad(actor_loss))(trained.actor), jax.jit(jax.grad(critic_loss))(trained.critic))
    )


@pytest.mark.parametrize(("microbatch", "devices"), [(16, 1), (1, 1), (8, 8)])
def test_the_step_follows_the_gradient_of_the_global_token_mean(microbatch, devices):
    """With Adam's ε at 1,000 and a rate of 300, a step is −0.3 times the gradient, for any split of the rows."""
    mesh = None if devices == 1 else Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "fsdp"))
    trainer = tiny.trainer(RLHFEngine(tiny.policy(), mesh=mesh), microbatch_size=microbatch, entropy_coef=0.1)
    step, metrics = moved(trainer, on_device(experience()))
    ours = jax.tree.map(lambda leaf: leaf / -0.3, step)
    assert 0.05 < metrics["policy/clipfrac_avg"] < 0.95  # both branches of the surrogate occur
    assert 0.05 < metrics["val/clipfrac_avg"] < 0.95
    assert_close(ours, plain_gradients(), 2e-3)
    assert distance(ours, plain_gradients("rows")) > 0.02


def test_extra_pads_do_not_change_the_update():
    """Three pad columns are added before the prompts, and two after the responses."""
    plain, metrics = moved(tiny.trainer(), on_device(experience()))
    made = experience()

    def widen(name, leaf):
        if not isinstance(leaf, np.ndarray) or leaf.ndim < 2:
            return leaf
        left, right = (3, 0) if name == "prompt_mask" else (0, 2)
        left = 3 if name == "tokens" else left
        junk = 5 if name == "tokens" else 0
        return np.pad(leaf, ((0, 0), (left, right)), constant_values=junk)

    wide = dataclasses.replace(
        made, **{field.name: widen(field.name, getattr(made, field.name)) for field in dataclasses.fields(made)}
    )
    step, wide_metrics = moved(tiny.trainer(), on_device(wide))
    assert_close(step, plain, 1e-4)
    for name, value in metrics.items():
        if name not in ("eps", "time/iteration"):
            np.testing.assert_allclose(wide_metrics[name], value, rtol=1e-4, atol=1e-6, err_msg=name)


def test_rows_without_real_tokens_do_not_affect_the_update():
    """The step equals that of the other rows alone, and no metric is NaN."""
    made = on_device(experience())
    none = made.response_mask.at[3].set(False).at[7].set(False)
    zero = lambda x: jnp.where(none, x, 0) if x.shape == none.shape and x.dtype != bool else x  # noqa: E731
    empty = jax.tree.map(zero, made).replace(response_mask=none)
    junk = empty.replace(logprobs=empty.logprobs.at[3].set(1e9), advantages=empty.advantages.at[7].set(jnp.inf))
    keep = np.delete(np.arange(ROWS), [3, 7])
    fewer = jax.tree.map(lambda x: x[keep], empty)
    wanted, _ = moved(tiny.trainer(microbatch_size=1), fewer)
    for rows in (empty, junk):
        step, metrics = moved(tiny.trainer(microbatch_size=1), rows)
        assert_close(step, wanted, 1e-4)
        assert metrics["val/skipped_updates"] == 0
    assert all(np.isfinite(value) for name, value in metrics.items() if name not in ("eps", "time/iteration"))


# ---- old log-probs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.6, 1.3])
def test_ratios_are_one_before_the_first_step_and_change_after_it(temperature):
    """Before the first step, |ρ − 1| < 1e-5 at any temperature, and the KL to the reference is 0."""
    trainer = tiny.trainer(temperature=temperature, ppo_epochs=2, num_minibatches=4, clip_range=0.05)
    made = trainer.generate_experience(tiny.ragged_prompts(ROWS))
    assert (made.logprobs == made.ref_logprobs).all()
    metrics = trainer.train_rlhf(made)
    assert metrics["objective/kl"] == 0
    assert metrics["val/first_ratio_gap"] < 1e-5
    assert metrics["val/last_ratio_gap"] > 1e-3
    assert metrics["policy/clipfrac_avg"] > 0
    assert metrics["val/sampler_logprob_gap"] < 1e-4
    # Both metrics detect that sampling and scoring have different temperatures.
    trainer.config = tiny.changed(trainer.config, temperature=0.8 * temperature)
    metrics = trainer.train_rlhf(trainer.generate_experience(tiny.ragged_prompts(ROWS)))
    assert metrics["val/sampler_logprob_gap"] > 1e-2
    trainer.config = tiny.changed(trainer.config, temperature=temperature)
    assert trainer.train_rlhf(made)["val/first_ratio_gap"] > 1e-3


def test_rows_are_reshuffled_each_epoch_and_iteration(monkeypatch):
    """Each epoch has every row once, in a different order."""
    seen, original = [], ppo_step._make_minibatch

    def spied(*static):
        def minibatch(iteration, carry, inputs):
            jax.debug.callback(lambda rows: seen.append(np.array(rows).reshape(-1)), inputs[0], ordered=True)
            return original(*static)(iteration, carry, inputs)

        return minibatch

    monkeypatch.setattr(ppo_step, "_make_minibatch", spied)
    trainer = tiny.trainer(ppo_epochs=3, num_minibatches=4, microbatch_size=2, seed=77)
    for _ in range(2):
        trainer.train_rlhf(on_device(experience()))
    jax.effects_barrier()
    epochs = np.stack(seen).reshape(6, ROWS)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(ROWS), (6, 1)))
    assert len(np.unique(epochs, axis=0)) == 6


# ---- options -------------------------------------------------------------------------------------------------------


def test_only_the_top_layers_train_and_the_bottom_runs_once():
    """With trainable_layers=1, log-probs, values and the top layers' step equal those of a fully trainable model."""
    start = tiny.policy(tie_embeddings=False)
    engine = RLHFEngine(start, trainable_layers=1, critic_trainable_layers=1)
    trainer = tiny.trainer(engine, entropy_coef=0.1)
    assert engine.models.critic_shares
    assert engine.params.frozen.reference.frozen == {}  # the reference uses the actor's frozen layers
    shared = zip(jax.tree.leaves(engine.params.frozen.critic), jax.tree.leaves(engine.params.frozen.actor), strict=True)
    assert all(critic is actor for critic, actor in shared)
    assert "embedding" not in engine.params.trainable.actor
    moments = trainer.state.actor_optimizer[0].mu
    assert jax.tree.map(jnp.shape, moments) == jax.tree.map(jnp.shape, engine.params.trainable.actor)

    made = trainer.generate_experience(tiny.ragged_prompts(ROWS))
    whole = tiny.trainer(entropy_coef=0.1)
    wanted = whole.generate_experience(tiny.ragged_prompts(ROWS))
    assert made.frozen_activations.actor.shape == (ROWS, 11, 32)
    assert wanted.frozen_activations.actor is None
    np.testing.assert_array_equal(made.tokens, wanted.tokens)
    for name in ("logprobs", "ref_logprobs", "values", "advantages", "returns"):
        np.testing.assert_allclose(getattr(made, name), getattr(wanted, name), atol=1e-5, err_msg=name)

    step, metrics = moved(trainer, made)
    wanted_step, _ = moved(whole, wanted)
    top = jax.tree.map(lambda leaf: leaf[1:], [tree["layers"] for tree in wanted_step])
    assert_close([tree["layers"] for tree in step], top, 1e-4)
    assert metrics["val/first_ratio_gap"] < 1e-5
    after = engine.actor.params
    jax.tree.map(np.testing.assert_array_equal, after["embedding"], start.params["embedding"])
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[0], b[0]), after["layers"], start.params["layers"])
    assert distance(after["layers"], jax.device_get(start.params["layers"])) > 1e-4
    # Log-probs equal those of the joined parameters, so the frozen activations were right.
    again = RLHFEngine(engine.actor)
    mask = np.concatenate([made.prompt_mask, made.response_mask], axis=1)
    np.testing.assert_allclose(engine.score(made.tokens, mask)[0], again.score(made.tokens, mask)[0], atol=1e-5)


def test_the_pretraining_loss_is_added():
    """PPO-ptx: the step is that of PPO alone, plus ptx_coef times the gradient of the mean loss per token."""
    random = np.random.RandomState(5)
    mask = np.ones((8, 7), bool)
    mask[::2, 5:] = False
    mask[1, :3] = False
    text = Batch(random.randint(0, tiny.VOCAB, (8, 7)).astype(np.int32), mask)
    alone, _ = moved(tiny.trainer(microbatch_size=4), on_device(experience()))
    step, metrics = moved(tiny.trainer(microbatch_size=4, ptx_coef=0.5), on_device(experience()), texts=text)
    model, params = RLHFEngine(tiny.policy()).models.actor.model, tiny.policy().params

    def loss(params):
        logp = jax.nn.log_softmax(model.apply({"params": params}, text.tokens, mask=mask)[:, :-1])
        chosen = jnp.take_along_axis(logp, text.tokens[:, 1:, None], axis=-1)[..., 0]
        counted = mask[:, 1:] & mask[:, :-1]
        return -jnp.sum(jnp.where(counted, chosen, 0)) / counted.sum()

    value, gradient = jax.jit(jax.value_and_grad(loss))(params)
    added = jax.tree.map(lambda a, b: (a - b) / -0.3, step[0], alone[0])
    assert_close(added, jax.tree.map(lambda leaf: 0.5 * np.asarray(leaf), gradient), 5e-3)
    assert_close(step[1], alone[1], 1e-6)
    np.testing.assert_allclose(metrics["loss/ptx_avg"], value, rtol=1e-5)
    # With frozen layers, the loss is computed from their activations.
    top = tiny.trainer(RLHFEngine(tiny.policy(), trainable_layers=1), microbatch_size=4, ptx_coef=0.5)
    made = top.generate_experience(tiny.ragged_prompts(ROWS))
    np.testing.assert_allclose(top.train_rlhf(made, text)["loss/ptx_avg"], value, rtol=1e-5)
    for trainer, rows in ((tiny.trainer(), text), (tiny.trainer(ptx_coef=0.5), None)):
        with pytest.raises(ValueError, match="pretraining rows are"):
            trainer.train_rlhf(on_device(experience()), rows)
    with pytest.raises(ValueError, match=r"8 pretraining rows .* over 16 microbatches; give a multiple of 16"):
        tiny.trainer(ptx_coef=0.5, microbatch_size=1).train_rlhf(on_device(experience()), text)


def test_a_critic_warm_up_skips_the_actor_and_ema_follows_its_steps():
    trainer = tiny.trainer(ema_decay=0.9, critic_warmup_iterations=1)
    start = jax.device_get(trainer.engine.params.trainable.actor)
    step, _ = moved(trainer, on_device(experience()))
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(step[0])) == 0
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(step[1])) > 0
    assert int(trainer.state.actor_optimizer[0].count) == 0  # the actor took no step
    step, _ = moved(trainer, on_device(experience()))
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(step[0])) > 0
    wanted = jax.tree.map(lambda a, d: a + 0.1 * d, start, step[0])
    assert_close(jax.device_get(trainer.engine.actor_ema.params), wanted, 1e-6)
    with pytest.raises(ValueError, match="ema_decay"):
        _ = tiny.trainer().engine.actor_ema


def test_the_entropy_bonus_is_off_above_its_target():
    made, bonus = on_device(experience()), {"entropy_coef": 0.5}
    none, metrics = moved(tiny.trainer(), made)
    always, _ = moved(tiny.trainer(**bonus), made)
    assert distance(always[0], none[0]) > 0.05
    assert_close(always[1], none[1])  # the critic has no entropy bonus
    target = 0.9 * metrics["policy/entropy_avg"]
    trainer = tiny.trainer(entropy_target=target, **bonus)
    first, _ = moved(trainer, made)  # before the first minibatch, the entropy is unknown
    assert_close(first, always)
    assert float(trainer.state.entropy) == metrics["policy/entropy_avg"]
    for last, expected in ((1.01 * target, none), (0.99 * target, always)):
        trainer = tiny.trainer(entropy_target=target, **bonus)
        trainer.state = trainer.state.replace(entropy=jnp.float32(last))
        assert_close(moved(trainer, made)[0], expected)


def test_updates_stop_above_the_kl_target():
    steps = {"ppo_epochs": 4, "num_minibatches": 4}
    trainer = tiny.trainer(target_kl=1e-7, **steps)
    made = trainer.generate_experience(tiny.ragged_prompts(ROWS))
    metrics = trainer.train_rlhf(made)
    assert metrics["val/updates"] == 1  # at the second minibatch the KL is above the target, so it is skipped
    assert int(trainer.state.actor_optimizer[0].count) == 1
    assert int(trainer.state.critic_optimizer[0].count) == 1
    one = tiny.trainer(**steps)
    assert one.train_rlhf(one.generate_experience(tiny.ragged_prompts(ROWS)))["val/updates"] == 16
    assert int(one.state.actor_optimizer[0].count) == 16


@pytest.mark.parametrize(("field", "value"), [("advantages", np.nan), ("returns", np.inf)])
def test_non_finite_updates_are_skipped_and_counted(field, value):
    """One bad row of 16 is in one of 4 minibatches in each of 2 epochs, so 2 of 8 steps are skipped."""
    trainer = tiny.trainer(ppo_epochs=2, num_minibatches=4, kl_target=6.0)
    made = on_device(experience())
    bad = made.replace(**{field: getattr(made, field).at[5, 0].set(value)})
    step, metrics = moved(trainer, bad)
    assert metrics["val/skipped_updates"] == 2
    assert metrics["val/updates"] == 6
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((step, jax.device_get(trainer.state))))
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(step)) > 0
    assert int(trainer.state.actor_optimizer[0].count) == int(trainer.state.critic_optimizer[0].count) == 6
    assert metrics["val/bad_steps"] == 1
    assert trainer.train_rlhf(made)["val/bad_steps"] == 0
    assert int(trainer.state.skipped_updates) == 2


def test_the_learning_rate_is_lowered_after_a_limit_is_exceeded():
    """In the first iteration, the policy is the reference. After that, its KL exceeds the limit of 1e-9."""
    options = {"kl_limit": 1e-9, "ratio_limit": 1e9, "on_limit": "lower_lr", "limit_lr_factor": 0.25}
    trainer, free, within = tiny.trainer(**options), tiny.trainer(), tiny.trainer(**options | {"kl_limit": 1e9})
    made = trainer.generate_experience(tiny.ragged_prompts(ROWS))
    assert float(jnp.max(jnp.abs(made.logprobs - made.ref_logprobs))) == 0
    metrics = trainer.train_rlhf(made)
    for other in (free, within):
        other.train_rlhf(other.generate_experience(tiny.ragged_prompts(ROWS)))
    assert (metrics["limit/kl"], metrics["limit/ratio"], metrics["limit/lr_scale"]) == (0, 0, 1)
    jax.tree.map(np.testing.assert_array_equal, trainer.engine.params.trainable, within.engine.params.trainable)
    # The trainer without limits runs another program, which may round differently.
    to_rounding = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7)
    jax.tree.map(to_rounding, trainer.engine.params.trainable, free.engine.params.trainable)
    apart = made.replace(ref_logprobs=made.ref_logprobs - 0.1 * made.response_mask)
    metrics = trainer.train_rlhf(apart)  # reports the limit; the next update is the first with the lower rate
    assert (metrics["limit/kl"], metrics["limit/ratio"], metrics["limit/lr_scale"]) == (1, 0, 0.25)
    free.train_rlhf(apart)
    steps = [moved(each, made)[0] for each in (trainer, free)]
    lowered, full = (step[0]["lm_head"]["kernel"] for step in steps)
    np.testing.assert_allclose(lowered, 0.25 * full, rtol=0.1, atol=1e-3 * np.abs(full).max())
    lowered, full = (step[1]["scalar_head"]["kernel"] for step in steps)
    np.testing.assert_allclose(lowered, full, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("role", ["actor", "critic"])
def test_an_overflowing_gradient_is_skipped_although_losses_are_finite(role):
    """The head's input is 0, so its output is finite. Its huge weights make the gradient overflow."""
    models = {"actor": tiny.policy(), "critic": tiny.policy(4, head="scalar")}
    params, head = dict(models[role].params), "lm_head" if role == "actor" else "scalar_head"
    params["final_norm"] = jax.tree.map(jnp.zeros_like, params["final_norm"])
    params[head] = jax.tree.map(lambda leaf: jnp.full_like(leaf, 3e38) * jnp.sign(leaf), params[head])
    models[role] = dataclasses.replace(models[role], params=params)
    engine = RLHFEngine(models["actor"], critic=models["critic"])
    step, metrics = moved((trainer := tiny.trainer(engine)), trainer.generate_experience(tiny.ragged_prompts(ROWS)))
    assert metrics["val/skipped_updates"] == 1
    assert np.isfinite([metrics["loss/policy_avg"], metrics["loss/value_avg"]]).all()
    assert not any(leaf.any() for leaf in jax.tree.leaves(step))


def test_controllers_adapt_to_the_measured_kl():
    made = on_device(experience())
    kl = float(jnp.mean(jnp.sum(made.logprobs - made.ref_logprobs, axis=1)))
    trainer = tiny.trainer(kl_coef=0.1, kl_target=kl / 1.1, kl_horizon=100.0)  # no other KL is this close to the target
    metrics = trainer.train_rlhf(made)
    np.testing.assert_allclose(metrics["objective/kl"], kl, rtol=1e-5)
    np.testing.assert_allclose(float(trainer.state.kl.value), 0.1 * (1 + 0.1 * ROWS / 100), rtol=1e-5)
    assert float(tiny.trainer(kl_coef=0.1).state.kl.value) == np.float32(0.1)
    # PPO-penalty: β doubles after a step with a large KL, and halves after one with a small KL.
    for target, factor in ((1e-6, 2.0), (1e3, 0.5)):
        trainer = tiny.trainer(policy_loss="penalty", penalty_coef=3.0, penalty_target=target)
        trainer.train_rlhf(made)
        assert float(trainer.state.penalty.value) == 3.0 * factor
