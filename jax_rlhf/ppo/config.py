"""The settings of PPO."""

import dataclasses
import math
from typing import Literal

from jax_rlhf.hub.model_config import ModelConfig
from jax_rlhf.optim.microbatches import BatchPlan, plan_batch
from jax_rlhf.optim.optimizer import OptimizerConfig
from jax_rlhf.parallel import Layout
from jax_rlhf.sampling import Sampling


@dataclasses.dataclass(frozen=True, kw_only=True)
class CriticConfig(ModelConfig):
    """The critic.

    Attributes:
      zero_head: its values start at 0, and only its trunk is what `path` (or the reward model) says. A reward model
        learned from whole answers; what its head says of unfinished ones can be a worse baseline than none.

    Source of the zero head: Ziegler et al. 2019, "Fine-tuning language models from human preferences", their code.
    """

    zero_head: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrozenConfig(ModelConfig):
    """Reference or reward model.

    Attributes:
      offload: its parameters wait in the host's memory and come to the devices to score; what it shares with the actor
        or the critic stays there.
    """

    offload: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class PPOConfig:
    """Everything that `PPOTrainer` can be told.

    Sampling:
      max_new_tokens: R, response slots, in tokens.
      min_new_tokens: before so many tokens EOS is not sampled.
      temperature: τ of sampling and of every log-prob.
      top_k, top_p: filters of the sampler, off by default: log-probs are of the unfiltered softmax, so that with them
        PPO's ratios are of a distribution that was not sampled from; `val/kept_mass` says how far off.
      eos_ids: end a response; None = the tokenizer's and those of the checkpoint's generation_config.
      pad_id: stands after the end; None = the tokenizer's pad, or else 0.
      seed: of everything random.

    Rewards:
      kl_coef: β of the KL penalty in the reward, reward units per nat; the first one where it adapts.
      kl_kind: its estimate, "k1", "k2", "k3" or "abs".
      kl_reduction: "sum", or "mean": each response's penalty divided by its length, so that short ones do not pay less.
      kl_target: nats per response that an adaptive β steers to; None = β is fixed.
      kl_horizon: episodes over which it adapts.
      reward_clip: scores are clipped to ± this; None = not.
      missing_eos_penalty: subtracted from the (clipped) score of a response without EOS.
      reward_timeout: seconds that a call of a reward function may take; None = for ever.
      reward_isolation: "process": each reward and evaluation function runs in a process of its own, which is killed
        after `reward_timeout` and started again where it ends; "none": in the run's.
      reward_memory_gb: with isolation, address space of each such process, in GB; None = no limit.
      reward_retries: how often a call is repeated that raised an exception, took too long, or did not return a finite
        number for each response.
      on_reward_failure: and then: "fatal", or "penalize": its responses without a score get `reward_failure_score`.
      reward_failure_score: the score of those, instead of all functions' sum.
      truncation: a response without EOS is "terminal", or its end is "bootstrap"ped with the critic's value there.
      whiten_rewards: divides the rewards by their spread, keeping the mean.

    Advantages:
      gamma, lam: discount and λ of GAE.
      whiten_advantages: to mean 0 and variance 1 over the batch's tokens.

    Updates:
      ppo_epochs: passes over the experience.
      num_minibatches: optimizer steps a pass; rows are reshuffled each pass.
      microbatch_size: rows whose activations exist at once, in scoring and in updates, on all devices together; None
        chooses (`microbatch_rows`). It changes memory and speed, not the gradient.
      policy_loss: "clip" (PPO-clip) or "penalty" (PPO-penalty).
      clip_range: ε of PPO-clip, below 1, and above where `clip_range_high` is None.
      dual_clip: c, the cap c |A| on the loss where A < 0; None = none.
      penalty_coef, penalty_target: PPO-penalty's first β, and the nats per token that it adapts to.
      value_clip_range: ε of the value loss, in reward units.
      entropy_coef: entropy bonus, per nat.
      entropy_target: nats per token; where the last minibatch had more entropy, there is no bonus, so that it holds the
        entropy up and does not drive it on; None = always a bonus.
      ptx_coef: weight of the pretraining loss (mean nats per token) where `train_rlhf` is given pretraining rows.
      critic_warmup_iterations: iterations in which only the critic learns; the coefficients that adapt rest.
      target_kl: the rest of an iteration's updates, of actor and critic, is left out once the approximate KL of a
        minibatch exceeds this, in nats per token; None = never.
      kl_limit: nats per response; a mean KL over it is a fault. None = no limit.
      ratio_limit: the same for the largest probability ratio of an iteration's updates, 2 or more.
      on_limit: past a limit the run of `python -m jax_rlhf` "stop"s, its last good checkpoint kept; or each such
        iteration multiplies the actor's learning rate from then on by `limit_lr_factor` ("lower_lr").
      ema_decay: of the actor's moving average, a step an iteration; None = none is kept.
      actor_optimizer, critic_optimizer: see `OptimizerConfig`.
      logprob_chunk: positions whose logits exist at once; None chooses.
      time_phases: sample and score as two programs and wait for each, for the metrics time/generate, time/score and
        time/train.

    The loop of `python -m jax_rlhf`, which `PPOTrainer` does not read:
      iterations: each samples config.data.ppo_batch_size prompts and updates.
      eval_every: iterations between evaluations on held-out prompts; 0 = only before the first and after the last.
      eval_rows: held-out prompts to answer, at most; None = config.data.eval_rows, which says how many are drawn.
      reward_functions: "package.module:function" each, f(prompts, responses, **columns) → scores, added to the reward
        model's.
      eval_functions: the same, only reported.
      sample_rows: of each iteration's responses, how many go to samples.jsonl; evaluations write all.
    """

    max_new_tokens: int = 128
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    eos_ids: tuple[int, ...] | None = None
    pad_id: int | None = None
    seed: int = 0

    kl_coef: float = 0.05
    kl_kind: Literal["k1", "k2", "k3", "abs"] = "k1"
    kl_reduction: Literal["sum", "mean"] = "sum"
    kl_target: float | None = None
    kl_horizon: float = 10_000.0
    reward_clip: float | None = None
    missing_eos_penalty: float = 0.0
    reward_timeout: float | None = 600.0
    reward_isolation: Literal["none", "process"] = "none"
    reward_memory_gb: float | None = None
    reward_retries: int = 2
    on_reward_failure: Literal["fatal", "penalize"] = "fatal"
    reward_failure_score: float = -1.0
    truncation: Literal["terminal", "bootstrap"] = "terminal"
    whiten_rewards: bool = False

    gamma: float = 1.0
    lam: float = 0.95
    whiten_advantages: bool = True

    ppo_epochs: int = 4
    num_minibatches: int = 1
    microbatch_size: int | None = None
    policy_loss: Literal["clip", "penalty"] = "clip"
    clip_range: float = 0.2
    clip_range_high: float | None = None
    dual_clip: float | None = None
    penalty_coef: float = 1.0
    penalty_target: float = 0.01
    value_clip_range: float = 0.2
    entropy_coef: float = 0.0
    entropy_target: float | None = None
    ptx_coef: float = 0.0
    critic_warmup_iterations: int = 0
    target_kl: float | None = None
    kl_limit: float | None = None
    ratio_limit: float | None = None
    on_limit: Literal["stop", "lower_lr"] = "stop"
    limit_lr_factor: float = 0.5
    ema_decay: float | None = None
    actor_optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    critic_optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    logprob_chunk: int | None = None
    time_phases: bool = False

    iterations: int = 100
    eval_every: int = 0
    eval_rows: int | None = None
    reward_functions: tuple[str, ...] = ()
    eval_functions: tuple[str, ...] = ()
    sample_rows: int = 4

    def __post_init__(self) -> None:
        _at_least(self, 1, "ppo_epochs", "num_minibatches", "max_new_tokens", "microbatch_size", "logprob_chunk")
        _at_least(self, 1, "iterations", "eval_rows")
        _at_least(self, 0, "eval_every", "sample_rows", "reward_retries")
        _at_least(self, 0, "clip_range", "clip_range_high", "value_clip_range", "reward_clip", "ptx_coef")
        _at_least(self, 0, "critic_warmup_iterations", "kl_coef")
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must lie within 0 and 1.")
        positive = ("kl_target", "kl_horizon", "target_kl", "penalty_coef", "penalty_target", "entropy_target")
        for name in (*positive, "kl_limit", "reward_timeout", "reward_memory_gb"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0.")
        if self.kl_target is not None and not self.kl_coef > 0:
            raise ValueError(f"kl_target={self.kl_target} adapts kl_coef by factors: start it above 0, not at 0.")
        if self.entropy_target is not None and not self.entropy_coef:
            raise ValueError(f"entropy_target={self.entropy_target} steers the bonus: set entropy_coef above 0.")
        _at_least(self, 2, "ratio_limit")
        if not 0 < self.limit_lr_factor < 1:
            raise ValueError(f"limit_lr_factor={self.limit_lr_factor} must lie between 0 and 1.")
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay={self.ema_decay} must lie in [0, 1).")
        if self.dual_clip is not None and self.dual_clip <= 1:
            raise ValueError(f"dual_clip={self.dual_clip} must be above 1.")

    @property
    def sampler(self) -> Sampling:
        """The sampler's settings, once `eos_ids` and `pad_id` are known."""
        return Sampling(
            max_new_tokens=self.max_new_tokens,
            min_new_tokens=self.min_new_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            eos_ids=self.eos_ids or (),
            pad_id=self.pad_id or 0,
        )

    @property
    def clip_ranges(self) -> tuple[float, float]:
        """ε below and above 1; infinite where nothing is clipped."""
        if self.policy_loss == "penalty":
            return math.inf, math.inf
        return self.clip_range, self.clip_range if self.clip_range_high is None else self.clip_range_high

    def batch_plan(self, rows: int, prompt_tokens: int, layout: Layout | None, platform: str) -> BatchPlan:
        """How the rows of an iteration are cut.

        Args:
          rows: of the iteration, of all processes.
          prompt_tokens: P.
          layout: the mesh; None = one device.
          platform: "cpu", "gpu" or "tpu".

        Returns:
          The plan.

        Raises:
          ValueError: the rows do not divide; the message says how many would.
        """
        return plan_batch(
            rows,
            self.microbatch_size,
            layout,
            where="config.ppo",
            num_minibatches=self.num_minibatches,
            tokens_per_row=prompt_tokens + self.max_new_tokens,
            platform=platform,
        )


def _at_least(config: PPOConfig, bound: int, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and not value >= bound:
            raise ValueError(f"{name}={value} must be {bound} or more.")
