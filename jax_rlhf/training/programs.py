"""The device programs of PPO: what `PPOTrainer` runs, and what `jax_rlhf.plan` compiles.

generate = sample, score    one program where `in_one_program`
update                      all epochs and minibatches of an iteration; parameters and state are donated
"""

import functools

import jax
import numpy as np
from jax import Array

from jax_rlhf.models import model_jit
from jax_rlhf.parallel import kept_in_place
from jax_rlhf.rl import Experience
from jax_rlhf.rollout import Sampling
from jax_rlhf.training.collect import sample_responses, score_samples
from jax_rlhf.training.config import PPOConfig
from jax_rlhf.training.networks import Frozen, Networks, Trained
from jax_rlhf.training.objective import PretrainingRows
from jax_rlhf.training.state import PPOState
from jax_rlhf.training.update import ppo_update

_ORDER_ADDRESS = np.uint32(0xFFFFFFFF)  # of the row orders' key, among the row ids that address the samples' keys

iteration_key = jax.jit(jax.random.fold_in)
sample = model_jit(sample_responses, static_argnums=(0, 1))
score = model_jit(score_samples, static_argnums=(0, 1))


def in_one_program(networks: Networks, config: PPOConfig) -> bool:
    """Whether `generate` samples and scores at once, or `sample` and `score` follow each other.

    Args:
      networks: the models.
      config: PPO's settings.

    Returns:
      False where Python functions score, where phases are timed, and where a model has cuDNN's attention: JAX takes
      that only into programs of a single mesh, and sampling has its own.
    """
    models = [
        each.model.config for each in (networks.actor, networks.reference, networks.critic, networks.reward) if each
    ]
    cudnn = any(model.attention == "flash" and model.platform == "gpu" for model in models)
    return not (config.reward_functions or config.time_phases or cudnn)


@functools.partial(model_jit, static_argnums=(0, 1, 8))
def generate(
    networks: Networks,
    sampling: Sampling,
    trained: Trained,
    frozen: Frozen,
    tokens: Array,
    mask: Array,
    row_ids: Array,
    key: Array,
    config: PPOConfig,
    kl_coef: Array,
) -> Experience:
    """Samples, then scores: arguments as in `sample_responses` and `score_samples`."""
    samples = sample_responses(networks, sampling, trained, frozen, tokens, mask, row_ids, key)
    return score_samples(networks, config, trained, frozen, samples, mask, None, kl_coef)


@functools.partial(model_jit, static_argnums=(0, 1, 2), donate_argnums=(3, 4))
def update(
    networks: Networks,
    config: PPOConfig,
    places: tuple | None,
    trained: Trained,
    state: PPOState,
    frozen: Frozen,
    experience: Experience,
    pretraining: PretrainingRows | None,
    seed_key: Array,
) -> tuple[Trained, PPOState, dict[str, Array]]:
    """`ppo_update` of one iteration; `trained` and `state` come out where `places` says that they went in."""
    key = jax.random.fold_in(jax.random.fold_in(seed_key, state.iteration), _ORDER_ADDRESS)
    trained, state, metrics = ppo_update(networks, config, trained, state, frozen, experience, pretraining, key)
    if places is not None:
        trained, state = kept_in_place((trained, state), places)
    return trained, state, metrics


update_kept = model_jit(update.__wrapped__, static_argnums=(0, 1, 2))  # the same, and its arguments stay
