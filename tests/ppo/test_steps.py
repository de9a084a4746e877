"""Updates that are skipped, stopped early or slowed down: coefficients, schedules and metrics."""

import jax
import jax.numpy as jnp
import numpy as np

from jax_rlhf import RLHFEngine
from jax_rlhf.ppo.step import make_update
from tests.ppo import tiny
from tests.ppo.test_update import ROWS, assert_close, experience, moved, on_device
from tests.programs import equations


def test_coefficients_do_not_change_while_the_actor_does_not_train():
    """In a critic warm-up, or if every update is skipped, KL(old ‖ new) is 0 and says nothing about β."""
    made = on_device(experience())
    bad = made.replace(scores=made.scores.at[0].set(jnp.nan))
    penalty = {
        "policy_loss": "penalty",
        "penalty_coef": 3.0,
        "penalty_target": 1e3,
        "kl_coef": 0.1,
        "kl_target": 1e3,
    }
    for options, rows in (({"critic_warmup_iterations": 1}, made), ({}, bad)):
        trainer = tiny.trainer(**penalty, **options)
        trainer.train_rlhf(rows)
        assert float(trainer.state.penalty.value) == 3.0
        assert float(trainer.state.kl.value) == np.float32(0.1)
        trainer.train_rlhf(made)
        assert float(trainer.state.penalty.value) == 1.5
        assert float(trainer.state.kl.value) < 0.1


def test_only_ppo_clip_reports_the_fraction_of_clipped_tokens():
    """PPO-clip reports the fraction of clipped tokens. PPO-penalty clips no token, and has no such metric."""
    made = on_device(experience())
    assert "policy/clipfrac_avg" not in tiny.trainer(policy_loss="penalty").train_rlhf(made)
    random = np.asarray(made.logprobs) - np.asarray(
        tiny.trainer().generate_experience(tiny.ragged_prompts(ROWS)).logprobs
    )
    ratio, mask, advantages = np.exp(-random), np.asarray(made.response_mask), np.asarray(made.advantages)
    held = ((advantages < 0) & (ratio < 1 - 0.1)) | ((advantages > 0) & (ratio > 1 + 0.3))
    metrics = tiny.trainer(clip_range=0.1, clip_range_high=0.3).train_rlhf(made)
    np.testing.assert_allclose(metrics["policy/clipfrac_avg"], held[mask].mean(), atol=1e-6)


def test_a_critic_warm_up_computes_no_gradient_of_the_actor():
    """The branch that trains has the products of forward and backward pass. The other has only the forward pass."""
    engine = RLHFEngine(tiny.policy())
    trainer = tiny.trainer(engine, critic_warmup_iterations=1, microbatch_size=4)
    arguments = (
        engine.params.trainable,
        trainer.state,
        engine.params.frozen,
        on_device(experience()),
        None,
        trainer._key,
    )
    config = trainer._with_microbatches(ROWS, 5)
    traced = make_update(engine.models, config).trace(*arguments).jaxpr
    branches = [
        sorted(count_products(branch.jaxpr) for branch in equation.params["branches"])
        for equation in equations(traced.jaxpr)
        if equation.primitive.name == "cond"
    ]
    forward, both = max(branches)
    assert both > 2 * forward > 0


def count_products(jaxpr):
    return sum(equation.primitive.name == "dot_general" for equation in equations(jaxpr))


def rates(trainer, made, iterations):
    metrics = [trainer.train_rlhf(made) for _ in range(iterations)]
    return [metric["lr"] for metric in metrics], [metric["lr_critic"] for metric in metrics]


def test_schedules_end_with_the_run_even_if_updates_are_skipped():
    """The rate falls from 1 to 0 over 3 iterations of 4 steps. `lr` is the rate of an iteration's last step."""
    linear = {"learning_rate": 1.0, "schedule": "linear", "eps": 1e3, "max_grad_norm": None}
    options = {"ppo_epochs": 2, "num_minibatches": 2, "critic_optimizer": linear | {"total_steps": 12}}
    made, wanted = on_device(experience()), [1 - 3 / 12, 1 - 7 / 12, 1 - 11 / 12]
    bad = made.replace(scores=made.scores.at[0].set(jnp.nan))  # one of two minibatches is skipped
    plain = {"actor_optimizer": linear | {"total_steps": 12}}
    np.testing.assert_allclose(rates(tiny.trainer(**options, **plain), made, 3), [wanted] * 2, rtol=1e-5)
    np.testing.assert_allclose(rates(tiny.trainer(**options, **plain), bad, 3), [wanted] * 2, rtol=1e-5)
    # If updates stop at the second step, `lr` is the rate of that step.
    stopped = tiny.trainer(**options, **plain, target_kl=1e-12)
    fresh = stopped.generate_experience(tiny.ragged_prompts(ROWS))
    np.testing.assert_allclose(rates(stopped, fresh, 1)[0], [1 - 1 / 12], rtol=1e-5)
    np.testing.assert_allclose(rates(stopped, made, 1)[0], [1 - 4 / 12], rtol=1e-5)
    # The actor's 8 steps begin after the critic's warm-up.
    warm = {"actor_optimizer": linear | {"total_steps": 8}, "critic_warmup_iterations": 1}
    actor, critic = rates(tiny.trainer(**options, **warm), made, 3)
    np.testing.assert_allclose(actor, [0, 1 - 3 / 8, 1 - 7 / 8], rtol=1e-5)
    np.testing.assert_allclose(critic, wanted, rtol=1e-5)


def test_the_reported_learning_rate_is_the_one_that_is_used():
    """Steps are linear in the gradient, so half the rate, by a schedule or by a limit, gives half the step."""
    made = on_device(experience())
    linear = {"learning_rate": 300.0, "eps": 1e3, "max_grad_norm": None, "beta1": 0.0, "beta2": 0.0}
    full, _ = moved(tiny.trainer(actor_optimizer=linear), made)
    halved = tiny.trainer(actor_optimizer=linear | {"schedule": "linear", "total_steps": 2, "final_fraction": 0.0})
    halved.state = halved.state.replace(iteration=jnp.int32(1))
    step, metrics = moved(halved, made)
    assert metrics["lr"] == 150
    assert_close(jax.tree.map(lambda leaf: 2 * leaf, step[0]), full[0], 2e-3)
    scaled = tiny.trainer(actor_optimizer=linear, kl_limit=1e9, on_limit="lower_lr")
    scaled.state = scaled.state.replace(lr_scale=jnp.float32(0.5))
    step, metrics = moved(scaled, made)
    assert metrics["lr"] == 150
    assert_close(jax.tree.map(lambda leaf: 2 * leaf, step[0]), full[0], 2e-3)


def test_the_last_ratio_gap_is_that_of_the_last_computed_minibatch():
    trainer = tiny.trainer(target_kl=1e-9, ppo_epochs=4, num_minibatches=2)
    metrics = trainer.train_rlhf(trainer.generate_experience(tiny.ragged_prompts(ROWS)))
    assert metrics["val/updates"] == 1
    assert metrics["val/last_ratio_gap"] == metrics["val/largest_ratio_gap"] > 0
    assert metrics["val/skipped_updates"] == metrics["val/bad_steps"] == 0  # stopping early is not an error
    assert float(trainer.state.entropy) > 0.5 * metrics["policy/entropy_avg"]  # of the last computed minibatch


def test_ratio_gaps_are_of_the_first_the_last_and_all_minibatches():
    """One row has old log-probs that are 0.5 too small. It is in one of the two minibatches of 8 rows."""
    still = {"learning_rate": 1e-12}
    trainer = tiny.trainer(num_minibatches=2, actor_optimizer=still, critic_optimizer=still)
    made = trainer.generate_experience(tiny.ragged_prompts(ROWS))
    start, gaps = jax.tree.map(np.asarray, trainer.state), []
    for row in range(ROWS):
        trainer.state = jax.tree.map(jnp.asarray, start)
        metrics = trainer.train_rlhf(made.replace(logprobs=made.logprobs.at[row].add(-0.5)))
        gaps.append([metrics[f"val/{which}_ratio_gap"] for which in ("first", "last", "largest")])
    gaps = np.array(gaps)
    wide = gaps > 0.1
    np.testing.assert_allclose(gaps[wide], np.exp(0.5) - 1, rtol=1e-4)
    assert (gaps[~wide] < 1e-4).all()
    assert wide.sum(axis=0).tolist() == [ROWS // 2, ROWS // 2, ROWS]
    assert (wide[:, 0] != wide[:, 1]).all()


def test_limits_apply_to_the_kl_per_response_and_the_largest_ratio():
    """The KL is about 0.1 nats per token, and one token's ratio is about 5."""
    made = on_device(experience())
    now = tiny.trainer().generate_experience(tiny.ragged_prompts(ROWS)).logprobs
    made = made.replace(logprobs=now.at[2, 0].add(-np.log(5)), ref_logprobs=now - 0.1 * made.response_mask)
    kl = tiny.trainer().train_rlhf(made)["objective/kl"]
    assert 0.2 < kl < 1
    for limits, wanted in (((0.95 * kl, 4.8), (1, 1)), ((1.05 * kl, 5.2), (0, 0))):
        metrics = tiny.trainer(kl_limit=limits[0], ratio_limit=limits[1]).train_rlhf(made)
        assert (metrics["limit/kl"], metrics["limit/ratio"]) == wanted


def test_a_trainer_without_ema_does_not_change_an_existing_average():
    engine = RLHFEngine(tiny.policy())
    tiny.trainer(engine, ema_decay=0.5)
    average = jax.device_get(engine.params.trainable.actor_ema)
    step, _ = moved(tiny.trainer(engine), on_device(experience()))
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(step[0])) > 0
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(engine.params.trainable.actor_ema), average)
