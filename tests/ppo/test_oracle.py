"""A whole iteration compared with `oracle.py`, with settings in which every term matters."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_rlhf import RLHFEngine
from jax_rlhf.models.split import SplitParams
from jax_rlhf.rl import Batch
from tests.ppo import oracle, tiny

ROWS, ITERATION = 16, 3


def noisy(pretrained, seed, **biases):
    """The model with noise on all parameters, so that no norm is 1 and no bias is 0, as in a trained model."""
    random = np.random.RandomState(seed)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(leaf + 0.1 * random.randn(*leaf.shape), jnp.float32), pretrained.params
    )
    return dataclasses.replace(pretrained, params=params, **biases)


@functools.cache
def four_models():
    shape = {"qkv_bias": True, "out_bias": True, "norm_kind": "layer"}
    return {
        "actor": noisy(tiny.policy(0, **shape), 0),
        "reference": noisy(tiny.policy(3, num_layers=1), 1),
        "critic": noisy(tiny.policy(4, head="scalar", **shape), 2, reward_bias=0.4, missing_eos_bias=0.15),
        "reward": noisy(tiny.policy(5, head="scalar"), 3, reward_bias=0.3, missing_eos_bias=0.7),
    }


def engine_of(**kwargs):
    models = four_models()
    return RLHFEngine(models["actor"], **{role: models[role] for role in ("reference", "critic", "reward")}, **kwargs)


def prompts():
    """Prompts whose row ids are not 0, 1, 2, …"""
    made = tiny.ragged_prompts(ROWS, seed=4)
    return dataclasses.replace(made, row_ids=np.asarray(7 * np.arange(ROWS) + 5, np.int32))


COLLECTING = [
    {
        "temperature": 0.7,
        "min_new_tokens": 2,
        "kl_coef": 0.3,
        "kl_kind": "k3",
        "reward_clip": 0.8,
        "missing_eos_penalty": 0.5,
        "truncation": "bootstrap",
        "gamma": 0.9,
        "lam": 0.8,
        "whiten_rewards": True,
    },
    {
        "temperature": 1.3,
        "kl_coef": 0.2,
        "kl_kind": "k2",
        "kl_reduction": "mean",
        "top_k": 6,
        "top_p": 0.9,
        "whiten_advantages": False,
        "seed": 9,
    },
]


@pytest.mark.parametrize("settings", COLLECTING, ids=["one", "other"])
def test_an_experience_equals_the_oracles(settings):
    engine = engine_of()
    trainer = tiny.trainer(engine, reward=None, microbatch_size=4, **settings)
    trainer.state = trainer.state.replace(iteration=jnp.int32(ITERATION))
    made, models = trainer.generate_experience(prompts()), four_models()
    actor = models["actor"].model, models["actor"].params
    tokens, mask, logprobs, kept_mass = oracle.sampled(*actor, prompts(), trainer.config, ITERATION)
    np.testing.assert_array_equal(made.tokens, tokens)
    np.testing.assert_array_equal(made.response_mask, mask)
    np.testing.assert_allclose(made.sampler_logprobs, logprobs, atol=1e-4)
    np.testing.assert_allclose(made.kept_mass, kept_mass, atol=1e-4)
    biases = {"reward": 0.3, "missing_eos": 0.7, "critic": 0.4 - 0.15}
    pairs = {role: (each.model, each.params) for role, each in models.items()}
    wanted = oracle.collected(pairs | {"biases": biases}, made, trainer.config, settings["kl_coef"])
    assert 0 < wanted["ended"].sum() < ROWS
    for name, value in wanted.items():
        np.testing.assert_allclose(getattr(made, name), value, atol=2e-4, err_msg=name)
    if "reward_clip" in settings:
        assert 0 < (np.abs(wanted["scores"]) > settings["reward_clip"]).sum() < ROWS


OPTIMIZER = {"schedule": "linear", "warmup_steps": 2, "final_fraction": 0.1, "eps": 3e-3}
ACTOR = {**OPTIMIZER, "learning_rate": 2e-2, "total_steps": 40, "weight_decay": 0.3, "max_grad_norm": 0.4}
CRITIC = {**OPTIMIZER, "learning_rate": 1e-2, "total_steps": 30, "beta1": 0.8, "beta2": 0.9, "max_grad_norm": 2.0}
UPDATING = {
    "clip": {
        "clip_range": 0.1,
        "clip_range_high": 0.3,
        "dual_clip": 1.3,
        "value_clip_range": 0.15,
        "temperature": 0.7,
        "entropy_coef": 0.05,
        "ptx_coef": 0.4,
        "kl_coef": 0.1,
        "kl_target": 1.0,
        "kl_horizon": 200.0,
        "actor_optimizer": ACTOR,
        "critic_optimizer": CRITIC | {"weight_decay": 0.2},
    },
    "penalty": {
        "policy_loss": "penalty",
        "penalty_coef": 0.7,
        "penalty_target": 0.5,
        "temperature": 1.3,
        "entropy_coef": 0.2,
        "entropy_target": 1.5,
        "seed": 5,
        "actor_optimizer": ACTOR | {"eps_form": "tensorflow", "max_grad_norm": None},
        "critic_optimizer": CRITIC | {"eps_form": "tensorflow"},
    },
}


def moved_on(made):
    """Adds noise to the old log-probs and values, as if actor and critic had been trained since the rollout."""
    random, mask = np.random.RandomState(0), made.response_mask
    noise = [jnp.where(mask, jnp.asarray(random.randn(*mask.shape), jnp.float32), 0) for _ in range(3)]
    changed = {
        name: getattr(made, name) + 0.3 * each for name, each in zip(("logprobs", "values"), noise, strict=False)
    }
    return made.replace(**changed, sampler_logprobs=made.sampler_logprobs + 0.01 * noise[2])


def text():
    random, mask = np.random.RandomState(5), np.ones((8, 7), bool)
    mask[::2, 5:], mask[1, :3] = False, False
    return Batch(random.randint(0, tiny.VOCAB, (8, 7)).astype(np.int32), mask)


@pytest.mark.parametrize(("form", "layers"), [("clip", 1), ("penalty", None)])
def test_an_update_equals_the_oracles(form, layers):
    """Two epochs of two minibatches of two microbatches, in the fourth iteration."""
    engine, settings = engine_of(trainable_layers=layers, critic_trainable_layers=layers), UPDATING[form]
    steps = {"ppo_epochs": 2, "num_minibatches": 2, "microbatch_size": 4, "ema_decay": 0.7}
    trainer = tiny.trainer(engine, reward=None, **steps, **settings)
    trainer.state = trainer.state.replace(iteration=jnp.int32(ITERATION), entropy=jnp.float32(1.6))
    made = moved_on(trainer.generate_experience(prompts()))
    actor, critic, frozen = engine.models.actor, engine.models.critic, engine.params.frozen
    networks = (
        lambda tree: (actor.model, actor.join(SplitParams(frozen.actor, tree))),
        lambda tree: (critic.model, critic.join(SplitParams(frozen.critic, tree))),
    )
    start = jax.device_get(engine.params.trainable)
    state = {"iteration": ITERATION, "per_iteration": 4, "entropy": 1.6, "penalty": settings.get("penalty_coef", 0)}
    texts = text() if "ptx_coef" in settings else None
    trained = start.actor, start.critic
    *wanted, metrics, after = oracle.update(networks, frozen, trained, trainer.config, made, text=texts, state=state)
    ours = trainer.train_rlhf(made, texts)

    ended = jax.device_get(engine.params.trainable)
    for got, want, before in zip((ended.actor, ended.critic), wanted, trained, strict=True):
        largest = max(np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (want, before)), strict=True))
        assert largest > 0.01
        jax.tree.map(lambda a, b, size=largest: np.testing.assert_allclose(a, b, atol=2e-3 * size), got, want)
    average = jax.tree.map(lambda a, b: 0.7 * a + 0.3 * b, start.actor, ended.actor)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), ended.actor_ema, average)

    beta = settings.get("kl_coef", 0.05)
    metrics |= oracle.experience_metrics(trainer.config, made, beta)
    metrics |= {"val/updates": 4, "val/skipped_updates": 0, "val/bad_steps": 0}
    kl, penalty = beta, settings.get("penalty_coef", 1.0)
    if "kl_target" in settings:
        kl = beta * (1 + np.clip(metrics["objective/kl"] - 1, -0.2, 0.2) * ROWS / 200)
        assert kl != beta
    if form == "penalty":
        penalty *= 0.5 if after["penalty_kl"] < 0.5 / 1.5 else 2.0 if after["penalty_kl"] > 0.75 else 1.0
    metrics["policy/penalty_coef"] = penalty
    # Metrics of features that are off are not reported.
    off = {"policy/clipfrac_avg"} if form == "penalty" else {"policy/penalty_coef", "policy/penalty_kl"}
    off |= {"val/kept_mass"} | (set() if "ptx_coef" in settings else {"loss/ptx_avg"})
    assert metrics.keys() - ours.keys() == off
    metrics = {name: value for name, value in metrics.items() if name not in off}
    assert ours.keys() - metrics.keys() == {"eps", "time/iteration"}
    for name, value in metrics.items():
        np.testing.assert_allclose(ours[name], value, rtol=3e-3, atol=2e-5, err_msg=name)
    np.testing.assert_allclose(float(trainer.state.kl.value), kl, rtol=1e-4)
    np.testing.assert_allclose(float(trainer.state.penalty.value), penalty, rtol=1e-6)
    np.testing.assert_allclose(float(trainer.state.entropy), after["entropy"], rtol=1e-3)
    assert int(trainer.state.iteration) == ITERATION + 1
    if form == "penalty":  # the KL of other rows or parameters would not lie between these two
        for target, factor in ((1.01 * after["penalty_kl"] / 1.5, 1.0), (0.99 * after["penalty_kl"] / 1.5, 2.0)):
            again = tiny.trainer(engine_of(), reward=None, **steps, **settings)
            controller = again.state.penalty.replace(target=jnp.float32(target))
            again.state = again.state.replace(
                iteration=jnp.int32(ITERATION), entropy=jnp.float32(1.6), penalty=controller
            )
            again.train_rlhf(made)
            np.testing.assert_allclose(float(again.state.penalty.value), settings["penalty_coef"] * factor, rtol=1e-6)
    if form == "clip":
        assert 0.1 < metrics["policy/clipfrac_avg"] < 0.9
    assert 0.1 < metrics["val/clipfrac_avg"] < 0.9
