"""The memory of compiled programs, as the compiler reports it. The programs do not run."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from jax_rlhf import PPOTrainer, RLHFEngine
from jax_rlhf.parallel import as_layout
from jax_rlhf.ppo.step import make_score, make_update
from jax_rlhf.sampling import Samples
from tests.ppo import tiny
from tests.programs import equations

WIDTH, LENGTH = 128, 128  # of prompts and responses, in tokens


def arrays(rows, mesh=None):
    """A function (dtype, shape per row) → abstract array of a batch."""
    sharding = None if mesh is None else as_layout(mesh).sharding(("rows",))
    return lambda dtype, *shape: jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=sharding)


def temporaries(function, *arguments):
    """Bytes per device, without arguments and results."""
    return function.lower(*arguments).compile().memory_analysis().temp_size_in_bytes


def scoring(engine, trainer, rows, mesh=None):
    array, config = arrays(rows, mesh), trainer._with_microbatches(rows, WIDTH)
    length = config.sampling.max_new_tokens
    per_token = [array(jnp.float32, length) for _ in range(2)]
    samples = Samples(array(jnp.int32, WIDTH + length), array(jnp.bool_, length), *per_token)
    arguments = engine.params, array(jnp.bool_, WIDTH), samples, array(jnp.float32)
    return make_score(engine.models, config), *arguments, jax.ShapeDtypeStruct((), jnp.float32)


def updating(engine, trainer, rows):
    score, *arguments = scoring(engine, trainer, rows)
    made = score.eval_shape(*arguments)
    arguments = engine.params.trainable, trainer.state, engine.params.frozen, made, None, trainer._key
    return make_update(engine.models, trainer._with_microbatches(rows, WIDTH)), *arguments


def size(tree):
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def trainer(engine, **config):
    settings = tiny.nested(**({"max_new_tokens": LENGTH, "eos_ids": [2]} | config))
    return PPOTrainer(engine, settings, reward_functions=tiny.fractional_reward)


@pytest.mark.parametrize("option", [{"target_kl": 0.1}, {"critic_warmup_iterations": 1}, {"policy_loss": "penalty"}])
def test_update_options_need_no_second_copy_of_trainable_parameters(option):
    """A `cond` over parameters and optimizer states would store them twice."""
    engine = RLHFEngine(tiny.policy(hidden_size=128, intermediate_size=512, num_heads=4, num_kv_heads=4, head_dim=32))
    state = size(
        (engine.params.trainable, trainer(engine).state.actor_optimizer, trainer(engine).state.critic_optimizer)
    )
    common = {"num_minibatches": 2, "ppo_epochs": 2, "microbatch_size": 1}
    without, with_option = (
        temporaries(*updating(engine, trainer(engine, **common, **more), 4)) for more in ({}, option)
    )
    assert with_option - without < 0.2 * state


@pytest.mark.parametrize("devices", [1, 4])
@pytest.mark.parametrize("trainable_layers", [None, 1])
def test_scoring_memory_does_not_grow_with_the_number_of_rows(devices, trainable_layers):
    mesh = None if devices == 1 else Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "fsdp"))
    start, reward = tiny.policy(hidden_size=64), tiny.policy(5, head="scalar", hidden_size=64)
    layers = {"trainable_layers": trainable_layers, "critic_trainable_layers": trainable_layers}
    engine = RLHFEngine(start, reward=reward, mesh=mesh, **layers)
    few, many = (temporaries(*scoring(engine, trainer(engine), rows, mesh)) for rows in (32, 128))
    assert many < 1.1 * few


def test_the_update_never_stores_the_logits_of_all_positions():
    """B 8, T 512, V 50,000, tiny trunk, default settings: temporaries take less than a quarter of B·T·V·4 bytes."""
    start = tiny.policy(vocab_size=50_000, hidden_size=16, intermediate_size=16, num_heads=2, num_kv_heads=2)
    engine = RLHFEngine(start)
    assert temporaries(*updating(engine, trainer(engine, max_new_tokens=512 - WIDTH), 8)) < 8 * 512 * 50_000 * 4 / 4


@pytest.mark.parametrize("program", [scoring, updating])
def test_logprob_chunk_limits_the_positions_that_have_logits_at_once(program):
    """By default, all 9 response positions of a microbatch have logits at once. With logprob_chunk=3, 3 have."""
    engine = RLHFEngine(tiny.policy())

    def logits(**settings):
        function, *arguments = program(engine, trainer(engine, max_new_tokens=9, microbatch_size=4, **settings), 8)
        shapes = [
            variable.aval.shape
            for equation in equations(function.trace(*arguments).jaxpr.jaxpr)
            for variable in equation.outvars
        ]
        return {shape[1] for shape in shapes if len(shape) == 3 and shape[0] == 4 and shape[2] == tiny.VOCAB}

    assert logits() == {9}
    assert logits(logprob_chunk=3) == {3}
