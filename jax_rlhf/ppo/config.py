"""The settings of PPO: every field with its type, its default and what it means."""

import dataclasses
import math
from typing import Any, Literal

from jax_rlhf.hub.config import ModelConfig
from jax_rlhf.optim.config import OptimizerConfig
from jax_rlhf.sampling.config import Sampling


@dataclasses.dataclass(frozen=True, kw_only=True)
class CriticConfig(ModelConfig):
    """The critic: where it comes from, and how it runs. Without a path it starts as the reward model."""

    zero_head: bool = False
    """Its values start at 0, and only its trunk is what `path` (or the reward model) says. A reward model learned from
    whole answers; what its head says of unfinished ones can be a worse baseline than none (Ziegler et al. 2019)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrozenConfig(ModelConfig):
    """A model that PPO does not train: the reference, or the reward model."""

    offload: bool = False
    """Its parameters wait in the host's memory and come to the devices to score. What it shares with the actor or the
    critic stays on the devices."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class KLConfig:
    """The KL penalty in the reward: r_t = −coef · kl_t at every token."""

    coef: float = 0.05
    """β, reward units per nat of KL to the reference; the first one where it adapts."""
    kind: Literal["k1", "k2", "k3", "abs"] = "k1"
    """The estimate of kl_t from a sample; "k1" is the log-ratio."""
    reduction: Literal["sum", "mean"] = "sum"
    """"sum" over a response, or "mean": each response's penalty is divided by its length, so that short responses do
    not pay less."""
    target: float | None = None
    """Nats per response that an adaptive β steers to; None = β is fixed."""
    horizon: float = 10_000.0
    """Episodes over which β adapts."""

    def __post_init__(self) -> None:
        _check(self, "config.ppo.kl", at_least_0=("coef",), above_0=("target", "horizon"))
        if self.target is not None and not self.coef > 0:
            raise ValueError(
                f"config.ppo.kl.target={self.target} adapts config.ppo.kl.coef by factors: start it above 0, not at 0."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardSourceConfig:
    """Where scores come from beside the reward model, and what becomes of them."""

    functions: tuple[str, ...] = ()
    """"FILE.py:function" or "package.module:function" each, f(prompts, responses, **columns) → scores, added to the
    reward model's."""
    clip: float | None = None
    """Scores are clipped to ± this, in reward units; None = not."""
    missing_eos_penalty: float = 0.0
    """Subtracted from the (clipped) score of a response without EOS."""
    truncation: Literal["terminal", "bootstrap"] = "terminal"
    """A response without EOS is "terminal", or its end is "bootstrap"ped with the critic's value there."""
    whiten: bool = False
    """Divides the rewards by their spread, keeping the mean."""
    timeout: float | None = 600.0
    """Seconds that a call of a reward function may take; None = for ever."""
    isolation: Literal["none", "process"] = "none"
    """"process": each reward and evaluation function runs in a process of its own, which is killed after `timeout` and
    started again where it ends; "none": in the run's process."""
    memory_gb: float | None = None
    """With isolation, address space of each such process, in GB; None = no limit."""
    retries: int = 2
    """How often a call is repeated that raised an exception, took too long, or did not return a finite number for each
    response."""
    on_failure: Literal["fatal", "penalize"] = "fatal"
    """After the last retry "fatal" ends the run; with "penalize" responses without a score get `failure_score`."""
    failure_score: float = -1.0
    """The score of those responses, instead of all functions' sum."""

    def __post_init__(self) -> None:
        _check(self, "config.ppo.reward", at_least_0=("clip", "retries"), above_0=("timeout", "memory_gb"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The losses of actor and critic."""

    policy: Literal["clip", "penalty"] = "clip"
    """"clip" (PPO-clip) or "penalty" (PPO-penalty)."""
    clip_range: float = 0.2
    """ε of PPO-clip, below 1, and above where `clip_range_high` is None."""
    clip_range_high: float | None = None
    """ε above 1, where it differs."""
    dual_clip: float | None = None
    """c, the cap c |A| on the loss where A < 0; None = none."""
    penalty_coef: float = 1.0
    """PPO-penalty's first β."""
    penalty_target: float = 0.01
    """Nats per token that PPO-penalty's β adapts to."""
    value_clip_range: float = 0.2
    """ε of the value loss, in reward units."""
    entropy_coef: float = 0.0
    """Entropy bonus, per nat."""
    entropy_target: float | None = None
    """Nats per token. Where the last minibatch had more entropy, there is no bonus, so that it holds the entropy up and
    does not drive it on; None = always a bonus."""
    ptx_coef: float = 0.0
    """Weight of the pretraining loss (PPO-ptx), mean nats per token of the texts of `data.ptx_paths`, or of the SFT
    data."""

    def __post_init__(self) -> None:
        _check(
            self,
            "config.ppo.loss",
            at_least_0=("clip_range", "clip_range_high", "value_clip_range", "ptx_coef"),
            above_0=("penalty_coef", "penalty_target", "entropy_target"),
        )
        if self.entropy_target is not None and not self.entropy_coef:
            raise ValueError(
                f"config.ppo.loss.entropy_target={self.entropy_target} steers the bonus: set entropy_coef above 0."
            )
        if self.dual_clip is not None and self.dual_clip <= 1:
            raise ValueError(f"config.ppo.loss.dual_clip={self.dual_clip} must be above 1.")

    @property
    def clip_ranges(self) -> tuple[float, float]:
        """ε below and above 1; infinite where nothing is clipped."""
        if self.policy == "penalty":
            return math.inf, math.inf
        return self.clip_range, self.clip_range if self.clip_range_high is None else self.clip_range_high


@dataclasses.dataclass(frozen=True, kw_only=True)
class ActorTrainingConfig:
    """How the actor trains."""

    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    """The actor's optimizer."""
    ema_decay: float | None = None
    """Of the actor's moving average, one step per iteration, saved in <workdir>/ppo/model_ema; None = none is kept."""

    def __post_init__(self) -> None:
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ValueError(f"config.ppo.actor.ema_decay={self.ema_decay} must lie in [0, 1).")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CriticTrainingConfig:
    """How the critic trains."""

    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    """The critic's optimizer."""
    warmup_iterations: int = 0
    """Iterations in which only the critic learns; the coefficients that adapt rest."""

    def __post_init__(self) -> None:
        _check(self, "config.ppo.critic", at_least_0=("warmup_iterations",))


@dataclasses.dataclass(frozen=True, kw_only=True)
class LimitsConfig:
    """When updates end early, and when a run has gone wrong."""

    target_kl: float | None = None
    """Nats per token. The rest of an iteration's updates, of actor and critic, is left out once the approximate KL of a
    minibatch exceeds this; None = never."""
    kl: float | None = None
    """Nats per response; a mean KL over it is a fault. None = no limit."""
    ratio: float | None = None
    """The same for the largest probability ratio of an iteration's updates, 2 or more."""
    action: Literal["stop", "lower_lr"] = "stop"
    """Past `kl` or `ratio` the run "stop"s, its last good checkpoint kept; or each such iteration multiplies the
    actor's learning rate from then on by `lr_factor` ("lower_lr")."""
    lr_factor: float = 0.5
    """What `action="lower_lr"` multiplies the learning rate by."""

    def __post_init__(self) -> None:
        _check(self, "config.ppo.limits", above_0=("target_kl", "kl"))
        if self.ratio is not None and not self.ratio >= 2:
            raise ValueError(f"config.ppo.limits.ratio={self.ratio} must be 2 or more.")
        if not 0 < self.lr_factor < 1:
            raise ValueError(f"config.ppo.limits.lr_factor={self.lr_factor} must lie between 0 and 1.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PPOConfig:
    """The PPO phase. `PPOTrainer` reads all but `iterations`, `eval_…`, `sample_rows` and `reward.functions`."""

    iterations: int = 100
    """Each samples `data.ppo_batch_size` prompts and updates."""
    eval_every: int = 0
    """Iterations between evaluations on held-out prompts; 0 = only before the first and after the last."""
    eval_rows: int | None = None
    """Held-out prompts to answer, at most; None = `data.eval_rows`, which says how many are drawn."""
    eval_functions: tuple[str, ...] = ()
    """As `reward.functions`, but only reported."""
    sample_rows: int = 4
    """Of each iteration's responses, how many go to samples.jsonl; evaluations write all."""
    seed: int = 0
    """Of the samples and the row orders; the run's seed where that is set."""
    time_phases: bool = False
    """Sample and score as two programs and wait for each, for the metrics time/generate, time/score and time/train."""

    ppo_epochs: int = 4
    """Passes over the experience of an iteration."""
    num_minibatches: int = 1
    """Optimizer steps per pass; rows are reshuffled in each pass."""
    microbatch_size: int | None = None
    """Rows whose activations exist at once, in scoring and in updates, on all devices together; None = chosen by the
    device. It changes memory and speed, not the gradient."""
    logprob_chunk: int | None = None
    """Positions whose logits exist at once; None = chosen by vocabulary and device."""
    gamma: float = 1.0
    """The discount factor of future rewards."""
    lam: float = 0.95
    """λ of GAE."""
    whiten_advantages: bool = True
    """To mean 0 and variance 1 over the batch's tokens."""

    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    """How responses are sampled."""
    reward: RewardSourceConfig = dataclasses.field(default_factory=RewardSourceConfig)
    """Where scores come from beside the reward model, and what becomes of them."""
    kl: KLConfig = dataclasses.field(default_factory=KLConfig)
    """The KL penalty in the reward."""
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    """The losses of actor and critic."""
    actor: ActorTrainingConfig = dataclasses.field(default_factory=ActorTrainingConfig)
    """How the actor trains."""
    critic: CriticTrainingConfig = dataclasses.field(default_factory=CriticTrainingConfig)
    """How the critic trains."""
    limits: LimitsConfig = dataclasses.field(default_factory=LimitsConfig)
    """When updates end early, and when a run has gone wrong."""

    def __post_init__(self) -> None:
        at_least_1 = ("ppo_epochs", "num_minibatches", "microbatch_size", "logprob_chunk", "iterations", "eval_rows")
        _check(self, "config.ppo", at_least_1=at_least_1, at_least_0=("eval_every", "sample_rows"))
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"config.ppo.{name}={getattr(self, name)} must lie within 0 and 1.")

    def with_schedule_ends(self) -> "PPOConfig":
        """The settings, whose learning rates' schedules end with the run where they do not say when.

        Raises:
          ValueError: the critic's warm-up leaves the actor no iteration.
        """
        per_iteration, learning = self.ppo_epochs * self.num_minibatches, self.iterations
        learning -= self.critic.warmup_iterations
        if learning < 1:
            raise ValueError(
                f"config.ppo.critic.warmup_iterations={self.critic.warmup_iterations} leaves the actor none of "
                f"config.ppo.iterations={self.iterations}; make it smaller, or have more iterations."
            )
        actor = self.actor.optimizer.with_end(learning * per_iteration)
        critic = self.critic.optimizer.with_end(self.iterations * per_iteration)
        return dataclasses.replace(
            self,
            actor=dataclasses.replace(self.actor, optimizer=actor),
            critic=dataclasses.replace(self.critic, optimizer=critic),
        )


def _check(
    config: Any,
    where: str,
    *,
    at_least_0: tuple[str, ...] = (),
    at_least_1: tuple[str, ...] = (),
    above_0: tuple[str, ...] = (),
) -> None:
    """Raises where a field that is not None is out of range."""
    for names, wrong, wanted in (
        (at_least_0, lambda value: not value >= 0, "0 or more"),
        (at_least_1, lambda value: not value >= 1, "1 or more"),
        (above_0, lambda value: not value > 0, "above 0"),
    ):
        for name in names:
            value = getattr(config, name)
            if value is not None and wrong(value):
                raise ValueError(f"{where}.{name}={value} must be {wanted}.")
