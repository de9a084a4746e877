"""PPO in two steps: `generate_experience(prompts)` and `train_rlhf(experience)`.

Each is one jitted function, compiled once (generation is two functions if Python functions score texts). An update
donates the buffers of the parameters and optimizer states that it changes. The experience stays on the devices.
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
      config: the settings, with EOS and pad ids filled in.
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
            completion_ids=…, **columns); one or several. Their weighted sum is added to the reward model's score if
            there is a reward model. Texts are decoded without special tokens, as in TRL.

        Raises:
          ValueError: an unknown field or bad value, neither reward model nor reward functions, or reward functions
            without a tokenizer.
        """
        functions = [reward_functions] if callable(reward_functions) else list(reward_functions)
        functions = [f if isinstance(f, RewardFunction) else RewardFunction(f) for f in functions]
        if engine.models.reward is None and not functions:
            raise ValueError("there is no source of rewards: give the engine a reward model, or pass reward_functions.")
        if functions and engine.tokenizer is None:
            raise ValueError("reward functions score texts, but the actor has no tokenizer to decode responses.")
        self.engine = engine
        self.config = _with_ids(from_mapping(PPOConfig, config or {}, "config.ppo"), engine)
        if self.config.reward.functions and not functions:
            raise ValueError(
                "config.ppo.reward.functions names functions, which only the command line imports: pass them as "
                "reward_functions."
            )
        self.reward_functions = tuple(
            f if f.timeout else dataclasses.replace(f, timeout=self.config.reward.timeout) for f in functions
        )
        self.sampling = self.config.sampling
        if self.sampling.filtered:
            logging.warning(
                "top_k=%d, top_p=%g filter the sampled tokens, but PPO's log-probs are those of the full softmax, so "
                "the probability ratios do not match the sampling distribution. Watch val/kept_mass, or turn the "
                "filters off.",
                self.sampling.top_k,
                self.sampling.top_p,
            )
        if self.config.actor.ema_decay is not None and engine.params.trainable.actor_ema is None:
            average = jax.tree.map(jnp.copy, engine.params.trainable.actor)
            engine.params = engine.params.replace(trainable=engine.params.trainable.replace(actor_ema=average))
        self.state = create_state(self.config, engine.params.trainable, engine.layout)
        self._key = jax.random.key(self.config.seed)
        self._started: float | None = None  # time in s at which generation began
        self._sampled: float | None = None  # time in s at which sampling ended; only with config.time_phases
        self.failures = Failures()

    def generate_experience(self, prompts: Prompts) -> Experience:
        """Samples a response to each prompt, and computes scores, rewards and advantages.

        Args:
          prompts: this process's B rows, padded on the left. A new number or width of rows triggers a recompilation.

        Returns:
          The experience, on the devices.

        Raises:
          ValueError: invalid prompts, or rows that do not divide into minibatches, microbatches and row shards.
          RewardError: a reward function failed more than config.reward.retries times, and config.reward.on_failure
            makes that an error.
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
        """Updates actor and critic on the experience.

        Args:
          experience: from `generate_experience`; it stays valid.
          texts: pretraining rows for the loss of PPO-ptx, required if `ptx_coef` is above 0.

        Returns:
          Metrics, under TRL's names; `eps` is episodes per second since generation began.

        Raises:
          ValueError: pretraining rows without `ptx_coef` or the reverse, or rows that do not divide evenly.
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
        # JAX's NaN check reruns a program to locate the NaN, and needs its arguments intact.
        debug = jax.config.jax_debug_nans  # pyright: ignore[reportAttributeAccessIssue] -- JAX adds its flags at run time
        update = make_update(engine.models, config, shardings, donate=not debug)
        trainable, self.state, metrics = update(
            engine.params.trainable, self.state, engine.params.frozen, experience, texts, self._key
        )
        engine.params = engine.params.replace(trainable=trainable)
        metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
        metrics = {name: value for name, value in metrics.items() if name not in self._unused_metrics()}
        if metrics["val/bad_scores"]:
            logging.warning("%s", self._describe_bad_scores(experience))
        if self.reward_functions:
            metrics |= self.counted_failures("reward")
        seconds = math.nan if self._started is None else time.perf_counter() - self._started
        if times:
            times["time/train"] = seconds - sum(times.values())
        return metrics | {"eps": rows / seconds, "time/iteration": seconds} | times

    def _unused_metrics(self) -> set[str]:
        """Names of the metrics of disabled features."""
        penalty = {"policy/penalty_coef", "policy/penalty_kl"}
        unused = penalty if self.config.loss.policy == "clip" else {"policy/clipfrac_avg"}
        if not self.config.loss.ptx_coef:
            unused = unused | {"loss/ptx_avg"}
        return unused if self.sampling.filtered or self.config.sampling.min_new_tokens else unused | {"val/kept_mass"}

    def counted_failures(self, prefix: str) -> dict[str, float]:
        """Failures of the user's functions since the last call, summed over all processes; every process must call it.

        Args:
          prefix: of the metrics' names.

        Returns:
          "<prefix>/failed_calls", "/timeouts", "/penalized" → count.
        """
        failures, self.failures = self.failures, Failures()
        names = ("failed_calls", "timeouts", "penalized")
        counts = sum_over_processes(np.array([getattr(failures, name) for name in names], np.int32))
        return {f"{prefix}/{name}": float(count) for name, count in zip(names, counts, strict=True)}

    def _with_microbatches(self, rows: int, width: int) -> PPOConfig:
        """The settings, with a microbatch size for this number of rows and this prompt width."""
        platform = self.engine.models.actor.model.config.platform
        plan = batch_plan(self.config, rows, width, self.engine.layout, platform)
        return dataclasses.replace(self.config, microbatch_size=plan.microbatch_size)

    def _check_texts(self, texts: Batch | None, groups: int) -> None:
        if (texts is not None) != (self.config.loss.ptx_coef > 0):
            raise ValueError(
                f"config.ppo.loss.ptx_coef={self.config.loss.ptx_coef}, but pretraining rows are "
                f"{'missing' if texts is None else 'given'}: the pretraining loss needs both or neither."
            )
        if texts is not None and len(texts.tokens) % groups:
            raise ValueError(
                f"{len(texts.tokens)} pretraining rows (config.ppo.loss.ptx_coef > 0) cannot be spread over {groups} "
                f"microbatches; give a multiple of {groups} rows."
            )

    def _describe_bad_scores(self, experience: Experience) -> str:
        """Describes this process's first response whose score is not finite."""
        scores = local_rows(experience.scores)
        rows = np.flatnonzero(~np.isfinite(scores))
        if not len(rows):
            return "a response of another process has a score that is not finite; that process logs which one."
        row, width = int(rows[0]), experience.prompt_mask.shape[1]
        mask = np.concatenate([local_rows(experience.prompt_mask), local_rows(experience.response_mask)], axis=1)[row]
        tokens = local_rows(experience.tokens)[row]
        prompt, response = (tokens[part][mask[part]].tolist() for part in (slice(0, width), slice(width, None)))
        if self.engine.tokenizer is not None:
            prompt, response = self.engine.tokenizer.decode(prompt), self.engine.tokenizer.decode(response)
        return (
            f"{len(rows)} of {len(scores)} responses have a score that is not finite, first row {row} with "
            f"{scores[row]}: prompt {prompt!r}, response {response!r}. Minibatches with these rows are skipped."
        )

    def _function_scores(self, samples: Samples, prompts: Prompts) -> Float32[Array, "B"]:
        """Scores of the reward functions: each process scores the rows it owns, then shares the scores with all."""
        width = prompts.mask.shape[1]
        tokens, mask = local_rows(samples.tokens), local_rows(samples.response_mask)
        masks, tokenizer = (np.asarray(prompts.mask), mask), self.engine.tokenizer
        assert tokenizer is not None, "the constructor requires one for reward functions"

        def decode_texts(skip_special_tokens: bool) -> tuple[list[str], list[str]]:
            """Prompts and responses as texts."""
            decode = functools.partial(tokenizer.decode, skip_special_tokens=skip_special_tokens)
            texts, responses = (
                [cast(str, decode(row[real])) for row, real in zip(*part, strict=True)]
                for part in zip((tokens[:, :width], tokens[:, width:]), masks, strict=True)
            )
            return texts, responses

        texts, responses = decode_texts(skip_special_tokens=True)
        special = asks_for_special_tokens_of(self.reward_functions)
        with_special = decode_texts(skip_special_tokens=False) if special else None
        ids = [row[real].tolist() for row, real in zip(tokens[:, width:], mask, strict=True)]
        owned = np.flatnonzero(owned_rows(batch_rows(len(texts), self.engine.layout), self.engine.layout))
        mine = owned.tolist()
        scores, config = np.zeros(len(texts), np.float32), self.config
        special_of_mine = None
        if with_special is not None:
            special_of_mine = [with_special[0][row] for row in mine], [with_special[1][row] for row in mine]
        # A response that no function scores has the reward model's score alone.
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
        gathered = all_rows(scores, self.engine.layout)
        return put_rows(gathered[local_row_indices(len(gathered), self.engine.layout)], self.engine.layout)


def in_one_program(models: Models, config: PPOConfig) -> bool:
    """Whether one program can sample and score (`make_experience`), or `make_sample` and `make_score` are separate.

    They are separate if Python functions score in between, if the phases are timed, and if a model uses cuDNN
    attention: JAX supports cuDNN only in programs with a single mesh, and the rollout layout has its own mesh.
    """
    networks = (models.actor, models.reference, models.critic, models.reward)
    decoders = [network.model.config for network in networks if network]
    cudnn = any(decoder.attention == "flash" and decoder.platform == "gpu" for decoder in decoders)
    return not (config.reward.functions or config.time_phases or cudnn)


_fold_in = jax.jit(jax.random.fold_in)


def _with_ids(config: PPOConfig, engine: RLHFEngine) -> PPOConfig:
    """The settings, with EOS and pad ids of the tokenizer or checkpoint where they are not set."""
    eos_ids, pad_id = config.sampling.eos_ids, config.sampling.pad_id
    if eos_ids is None:
        eos_ids = end_ids(engine.tokenizer, engine.generation_config)
        if not eos_ids:
            logging.warning("no EOS id found: every response has max_new_tokens tokens. Set ppo.sampling.eos_ids.")
    if pad_id is None:
        pad_id = getattr(engine.tokenizer, "pad_token_id", None)
        pad_id = (eos_ids[0] if eos_ids else 0) if pad_id is None else pad_id
    return dataclasses.replace(config, sampling=dataclasses.replace(config.sampling, eos_ids=eos_ids, pad_id=pad_id))
