"""On every mesh PPO's two programs, the SFT step and the reward step compute the same as on one device."""

import dataclasses

import jax
import numpy as np
import pytest

from jax_rlhf import RLHFEngine
from jax_rlhf.data.batches import pair_batch, text_batch
from jax_rlhf.optim.supervised import create_state, update
from jax_rlhf.parallel import MeshConfig, RolloutMeshConfig, create_layout, put_rows
from jax_rlhf.ppo.initialize import on_layout, whole_shardings
from tests.optim import test_supervised
from tests.ppo import tiny

ROWS = 16
ACTOR = {"num_heads": 8, "num_kv_heads": 4}
# (data, fsdp, tensor) for training, and for sampling; 4 key/value heads allow tensor=4
FORMS = {
    "data": ((8, 1, 1), None),
    "fsdp": ((1, 8, 1), None),  # samples with tensor=4, data=2
    "tensor": ((1, 2, 4), (2, 1, 4)),
    "all": ((2, 2, 2), (2, 1, 4)),
}


def layout_of(form):
    sizes, rollout = FORMS[form]
    names = ("data", "fsdp", "tensor")
    rollout = RolloutMeshConfig(**dict(zip(names, rollout, strict=True))) if rollout else None
    return create_layout(MeshConfig(**dict(zip(names, sizes, strict=True))), rollout)


def close(one, other, **tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), jax.device_get(one), jax.device_get(other))


@pytest.fixture(scope="module")
def run():
    """Trains twice on the same experience on a mesh, and caches the result. All four models differ in size."""
    done = {}

    def of(form):
        if form in done:
            return done[form]
        engine = RLHFEngine(
            tiny.policy(**ACTOR),
            reference=tiny.policy(3, num_layers=1, **ACTOR),
            critic=tiny.policy(4, head="scalar", hidden_size=16, intermediate_size=32),
            reward=tiny.policy(5, head="scalar", num_layers=3),
            mesh=layout_of(form) if form else None,
        )
        slow = {"learning_rate": 30.0, "eps": 1e3, "max_grad_norm": None, "beta1": 0.0, "beta2": 0.0}
        settings = {"num_minibatches": 2, "microbatch_size": 8, "ema_decay": 0.5, "entropy_coef": 0.01}
        trainer = tiny.trainer(engine, reward=None, actor_optimizer=slow, critic_optimizer=slow, **settings)
        start = jax.device_get(engine.params.trainable)
        made = trainer.generate_experience(tiny.ragged_prompts(ROWS))
        metrics = [trainer.train_rlhf(made)]
        once = jax.device_get(engine.params.trainable)
        metrics.append(trainer.train_rlhf(made))
        done[form] = {"made": made, "metrics": metrics, "start": start, "once": once, "engine": engine}
        return done[form]

    return of


@pytest.mark.parametrize("form", FORMS)
def test_ppo_on_a_mesh_equals_ppo_on_one_device(form, run):
    one, mesh = run(None), run(form)
    lengths = np.asarray(one["made"].response_mask).sum(axis=1)
    assert len(set(lengths.tolist())) > 2  # responses have different lengths
    for field in dataclasses.fields(one["made"]):
        wanted, got = (jax.device_get(getattr(side["made"], field.name)) for side in (one, mesh))
        if field.name == "frozen_activations":  # all layers train here
            assert jax.tree.leaves((wanted, got)) == []
            continue
        if wanted.dtype.kind == "f":
            np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=2e-5, err_msg=field.name)
        else:
            np.testing.assert_array_equal(got, wanted, err_msg=field.name)
    for wanted, got in zip(one["metrics"], mesh["metrics"], strict=True):
        for name in wanted.keys() - {"eps", "time/iteration"}:
            np.testing.assert_allclose(got[name], wanted[name], rtol=1e-3, atol=1e-5, err_msg=name)
    # With Adam's ε = 1,000 a step is proportional to the gradient, so the parameters' change shows the gradient.
    for before, after in (("start", "once"), ("once", "trained")):
        steps = []
        for side in (one, mesh):
            last = jax.device_get(side["engine"].params.trainable) if after == "trained" else side[after]
            steps.append(jax.tree.map(np.subtract, last, side[before]))
        largest = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(steps[0]))
        assert largest > 1e-3
        close(*steps, rtol=1e-3, atol=1e-4 * largest)


@pytest.mark.parametrize("form", FORMS)
def test_each_device_has_its_share_of_the_parameters(form, run):
    (data, _, _), _ = FORMS[form]
    engine = run(form)["engine"]
    for part in (engine.params.trainable.actor, engine.params.trainable.actor_ema, engine.params.trainable.critic):
        kernel = part["layers"]["mlp"]["up"]["kernel"]
        assert kernel.addressable_shards[0].data.size == kernel.size * data // 8
    kernel = engine.params.frozen.reference.trainable["layers"]["attention"]["query"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size * data // 8


@pytest.mark.parametrize(("phase", "form"), [*(("sft", form) for form in FORMS), ("reward", "fsdp"), ("reward", "all")])
def test_supervised_steps_on_a_mesh_equal_those_on_one_device(phase, form):
    layout = layout_of(form)
    if phase == "sft":
        spec, start = test_supervised.sft(1)
        batch = text_batch([[row] for row in test_supervised.examples(8)], 12, 0)
    else:
        spec, start = test_supervised.reward()
        batch = pair_batch(test_supervised.examples(8, answers=2), 12, 0)
    one, wanted = update(spec, *create_state(spec, start.params), batch)
    network = dataclasses.replace(spec.network, model=on_layout(spec.network.model, layout))
    params = jax.device_put(start.params, whole_shardings(network, layout))
    spread = dataclasses.replace(spec, network=network)
    state, frozen = create_state(spread, params, layout)
    other, got = update(spread, state, frozen, put_rows(batch, layout))
    for name in wanted:
        np.testing.assert_allclose(got[name], wanted[name], rtol=1e-4, atol=1e-6, err_msg=name)
    close(one.trainable, other.trainable, rtol=1e-4, atol=1e-5)
