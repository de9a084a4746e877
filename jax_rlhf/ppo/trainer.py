"""PPO in two steps: `generate_experience(prompts)` and `train_rlhf(experience)`.

Each is one device program (generation is two where Python functions score texts), compiled once; the parameters and
optimizer states that an update changes are donated to it. Between the two nothing leaves the device.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax import Array
from jaxtyping import Float32

from jax_rlhf.hub import end_ids
from jax_rlhf.parallel import (
    all_rows,
    barrier,
    batch_rows,
    local_row_indices,
    local_rows,
    owned_rows,
    put_rows,
    shardings_of,
    sum_over_processes,
)
from jax_rlhf.ppo.config import PPOConfig
from jax_rlhf.ppo.engine import RLHFEngine
from jax_rlhf.ppo.models import Models
from jax_rlhf.ppo.resolve import batch_plan
from jax_rlhf.ppo.state import create_state
from jax_rlhf.ppo.step import make_experience, make_sample, make_score, make_update
from jax_rlhf.rewards import Failures, OnFailure, RewardFunction, asks_for_special_tokens_of, score_texts
from jax_rlhf.rl import Batch, Experience, Prompts
from jax_rlhf.sampling import Samples, check_prompts
from jax_rlhf.settings import from_mapping


class PPOTrainer:
    """Trains an engine's actor and critic by PPO.

    Attributes:
      engine: the models; its parameters are replaced after every update.
      config: the settings, all known.
      state: optimizer states, controllers, iteration.
    """

    def __init__(
        self,
        engine: RLHFEngine,
        config: Any = None,
        *,
        reward_functions: Callable | RewardFunction | Sequence[Callable | RewardFunction] = (),
    ) -> None:
        """Prepares training.

        Args:
          engine: the models.
          config: a `PPOConfig`, or a mapping with the fields that differ from its defaults.
          reward_functions: f(prompts, responses, **columns) → float[B], or TRL's f(prompts=…, completions=…,
            completion_ids=…, **columns); one or several, whose weighted sum is added to the reward model's score where
            there is one. Texts are without special tokens, as in TRL.

        Raises:
          ValueError: an unknown field or bad value, no source of rewards, or functions over texts without a tokenizer.
        """
        functions = [reward_functions] if callable(reward_functions) else list(reward_functions)
        functions = [f if isinstance(f, RewardFunction) else RewardFunction(f) for f in functions]
        if engine.models.reward is None and not functions:
            raise ValueError("there is no source of rewards: give the engine a reward model, or reward_functions.")
        if functions and engine.tokenizer is None:
            raise ValueError("reward functions score texts, and the actor came without a tokenizer to make them.")
        self.engine = engine
        self.config = _with_ids(from_mapping(PPOConfig, config or {}, "config.ppo"), engine)
        self.reward_functions = tuple(
            f if f.timeout else dataclasses.replace(f, timeout=self.config.reward.timeout) for f in functions
        )
        self.sampling = self.config.sampling
        if self.sampling.filtered:
            logging.warning(
                "top_k=%d, top_p=%g narrow what is sampled, while PPO's log-probs are of the whole softmax: the ratios "
                "are of another distribution than the samples. Watch val/kept_mass, or leave the filters off.",
                self.sampling.top_k,
                self.sampling.top_p,
            )
        if self.config.actor.ema_decay is not None and engine.params.trainable.actor_ema is None:
            average = jax.tree.map(jnp.copy, engine.params.trainable.actor)
            engine.params = engine.params.replace(trainable=engine.params.trainable.replace(actor_ema=average))
        self.state = create_state(self.config, engine.params.trainable, engine.layout)
        self._key = jax.random.key(self.config.seed)
        self._started: float | None = None  # s, when generation began
        self._sampled: float | None = None  # s, when it had sampled, where phases are timed
        self.failures = Failures()

    def generate_experience(self, prompts: Prompts) -> Experience:
        """Samples a response to each prompt, and scores them.

        Args:
          prompts: B rows (this process's, where there are several), padded on the left. The same number and width of
            rows each time, else the program is compiled anew.

        Returns:
          The experience, on the device.

        Raises:
          ValueError: prompts that cannot be sampled from, or a number of rows that cannot be divided as configured.
          RewardError: a reward function failed more often than config.reward.retries, and that is fatal.
        """
        self._started = time.perf_counter()
        engine, models = self.engine, self.engine.models
        mask = np.asarray(prompts.mask)
        check_prompts(models.actor.model, mask, self.sampling)
        models.check_prompts(np.asarray(prompts.tokens), mask, self.sampling.max_new_tokens)
        config = self._with_microbatches(batch_rows(len(mask), engine.layout), mask.shape[1])
        rows = (np.asarray(prompts.tokens, np.int32), mask, np.asarray(prompts.row_ids, np.int32))
        on_device = Prompts(*put_rows(rows, engine.layout), columns=None)
        key, kl_coef = _fold_in(self._key, self.state.iteration), jnp.asarray(self.state.kl.value)
        if not self.reward_functions and in_one_program(models, self.config):
            return make_experience(models, config)(engine.params, on_device, key, kl_coef)
        samples = make_sample(models, self.sampling)(engine.params, on_device, key)
        if self.config.time_phases:
            jax.block_until_ready(samples)
            self._sampled = time.perf_counter()
        scores = self._function_scores(samples, prompts) if self.reward_functions else None
        return make_score(models, config)(engine.params, on_device.mask, samples, scores, kl_coef)

    def train_rlhf(self, experience: Experience, texts: Batch | None = None) -> dict[str, float]:
        """Updates actor and critic by the experience.

        Args:
          experience: from `generate_experience`; it stays valid.
          texts: rows of text for the pretraining loss (PPO-ptx), where `ptx_coef` is above 0.

        Returns:
          Metrics, under TRL's names; `eps` is episodes a second since generation began.

        Raises:
          ValueError: pretraining rows without `ptx_coef` or the other way round, or a number that cannot be divided.
        """
        engine, rows = self.engine, len(experience.tokens)
        times = {}
        if self._started is not None and self._sampled is not None:
            jax.block_until_ready(experience)
            scored = time.perf_counter()
            times = {"time/generate": self._sampled - self._started, "time/score": scored - self._sampled}
        config = self._with_microbatches(rows, experience.prompt_mask.shape[1])
        assert config.microbatch_size is not None
        self._check_texts(texts, rows // config.microbatch_size)
        texts = None if texts is None else put_rows(texts, engine.layout)
        shardings = None if engine.layout is None else shardings_of((engine.params.trainable, self.state))
        # JAX's NaN checks run a program again to find the place, and must find its arguments.
        debug = jax.config.jax_debug_nans  # pyright: ignore[reportAttributeAccessIssue] -- JAX adds its flags at run time
        update = make_update(engine.models, config, shardings, donate=not debug)
        trainable, self.state, metrics = update(
            engine.params.trainable, self.state, engine.params.frozen, experience, texts, self._key
        )
        engine.params = engine.params.replace(trainable=trainable)
        metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
        metrics = {name: value for name, value in metrics.items() if name not in self._off()}
        if metrics["val/bad_scores"]:
            logging.warning("%s", self._bad_score(experience))
        if self.reward_functions:
            metrics |= self.counted_failures("reward")
        seconds = math.nan if self._started is None else time.perf_counter() - self._started
        if times:
            times["time/train"] = seconds - sum(times.values())
        return metrics | {"eps": rows / seconds, "time/iteration": seconds} | times

    def _off(self) -> set[str]:
        """Metrics of what is not in use."""
        penalty = {"policy/penalty_coef", "policy/penalty_kl"}
        off = penalty if self.config.loss.policy == "clip" else {"policy/clipfrac_avg"}
        if not self.config.loss.ptx_coef:
            off = off | {"loss/ptx_avg"}
        return off if self.sampling.filtered or self.config.sampling.min_new_tokens else off | {"val/kept_mass"}

    def counted_failures(self, prefix: str) -> dict[str, float]:
        """What went wrong with other people's functions since the last call, in all processes; all must call it.

        Args:
          prefix: of the metrics' names.

        Returns:
          "<prefix>/failed_calls", "/timeouts", "/penalized" → count.
        """
        found, self.failures = self.failures, Failures()
        names = ("failed_calls", "timeouts", "penalized")
        counts = sum_over_processes(np.array([getattr(found, name) for name in names], np.int32))
        return {f"{prefix}/{name}": float(count) for name, count in zip(names, counts, strict=True)}

    def _with_microbatches(self, rows: int, width: int) -> PPOConfig:
        """The settings, with the microbatches that rows of such prompts are cut into."""
        platform = self.engine.models.actor.model.config.platform
        plan = batch_plan(self.config, rows, width, self.engine.layout, platform)
        return dataclasses.replace(self.config, microbatch_size=plan.microbatch_size)

    def _check_texts(self, texts: Batch | None, groups: int) -> None:
        if (texts is not None) != (self.config.loss.ptx_coef > 0):
            raise ValueError(
                f"ptx_coef={self.config.loss.ptx_coef}, and pretraining rows are "
                f"{'missing' if texts is None else 'given'}: the pretraining loss needs both or neither."
            )
        if texts is not None and len(texts.tokens) % groups:
            raise ValueError(
                f"{len(texts.tokens)} pretraining rows cannot be spread over {groups} microbatches; give a multiple."
            )

    def _bad_score(self, experience: Experience) -> str:
        """Which of this process's responses has a score that is not finite."""
        scores = local_rows(experience.scores)
        rows = np.flatnonzero(~np.isfinite(scores))
        if not len(rows):
            return "the score of another process's response is not finite; that process says which."
        row, width = int(rows[0]), experience.prompt_mask.shape[1]
        mask = np.concatenate([local_rows(experience.prompt_mask), local_rows(experience.response_mask)], axis=1)[row]
        tokens = local_rows(experience.tokens)[row]
        prompt, response = (tokens[part][mask[part]].tolist() for part in (slice(0, width), slice(width, None)))
        if self.engine.tokenizer is not None:
            prompt, response = self.engine.tokenizer.decode(prompt), self.engine.tokenizer.decode(response)
        return (
            f"{len(rows)} of {len(scores)} responses have a score that is not finite, first row {row} with "
            f"{scores[row]}: prompt {prompt!r}, response {response!r}. Updates by these rows are left out."
        )

    def _function_scores(self, samples: Samples, prompts: Prompts) -> Float32[Array, "B"]:
        """The texts that this process owns to its functions; the scores go to all who hold their rows."""
        width = prompts.mask.shape[1]
        tokens, mask = local_rows(samples.tokens), local_rows(samples.response_mask)
        masks, tokenizer = (np.asarray(prompts.mask), mask), self.engine.tokenizer
        assert tokenizer is not None, "reward functions come with one"

        def read(skip_special_tokens: bool) -> tuple[list[str], list[str]]:
            """The prompts and the responses."""
            decode = functools.partial(tokenizer.decode, skip_special_tokens=skip_special_tokens)
            texts, responses = (
                [cast(str, decode(row[real])) for row, real in zip(*part, strict=True)]
                for part in zip((tokens[:, :width], tokens[:, width:]), masks, strict=True)
            )
            return texts, responses

        texts, responses = read(skip_special_tokens=True)
        special = asks_for_special_tokens_of(self.reward_functions)
        with_special = read(skip_special_tokens=False) if special else None
        ids = [row[real].tolist() for row, real in zip(tokens[:, width:], mask, strict=True)]
        owned = np.flatnonzero(owned_rows(batch_rows(len(texts), self.engine.layout), self.engine.layout))
        mine = owned.tolist()
        scores, config = np.zeros(len(texts), np.float32), self.config
        special_of_mine = None
        if with_special is not None:
            special_of_mine = [with_special[0][row] for row in mine], [with_special[1][row] for row in mine]
        # What they all leave alone is the reward model's.
        unscored = None if self.engine.models.reward is None else 0.0
        with barrier("scoring responses"):
            scores[owned] = score_texts(
                self.reward_functions,
                [texts[row] for row in mine],
                [responses[row] for row in mine],
                {name: [values[row] for row in mine] for name, values in (prompts.columns or {}).items()},
                OnFailure(config.reward.retries, config.reward.on_failure, config.reward.failure_score),
                self.failures,
                completion_ids=[ids[row] for row in mine],
                chats=None if prompts.chats is None else [prompts.chats[row] for row in mine],
                continued=None if prompts.continued is None else [prompts.continued[row] for row in mine],
                with_special_tokens=special_of_mine,
                unscored=unscored,
            )
        everywhere = all_rows(scores, self.engine.layout)
        return put_rows(everywhere[local_row_indices(len(everywhere), self.engine.layout)], self.engine.layout)


def in_one_program(models: Models, config: PPOConfig) -> bool:
    """Whether `make_experience` serves, or `make_sample` and `make_score` must follow each other.

    They must where Python functions score in between, where both are timed, and where a model has cuDNN's attention:
    JAX takes that only into programs of a single mesh, and sampling has its own.
    """
    decoders = [each.model.config for each in (models.actor, models.reference, models.critic, models.reward) if each]
    cudnn = any(decoder.attention == "flash" and decoder.platform == "gpu" for decoder in decoders)
    return not (config.reward.functions or config.time_phases or cudnn)


_fold_in = jax.jit(jax.random.fold_in)


def _with_ids(config: PPOConfig, engine: RLHFEngine) -> PPOConfig:
    """The settings with the ids that the tokenizer or the checkpoint know."""
    eos_ids, pad_id = config.sampling.eos_ids, config.sampling.pad_id
    if eos_ids is None:
        eos_ids = end_ids(engine.tokenizer, engine.generation_config)
        if not eos_ids:
            logging.warning("no EOS id is known: every response fills max_new_tokens. Set ppo.sampling.eos_ids.")
    if pad_id is None:
        pad_id = getattr(engine.tokenizer, "pad_token_id", None)
        pad_id = (eos_ids[0] if eos_ids else 0) if pad_id is None else pad_id
    return dataclasses.replace(config, sampling=dataclasses.replace(config.sampling, eos_ids=eos_ids, pad_id=pad_id))
