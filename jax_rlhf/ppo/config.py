"""The settings of PPO."""

import dataclasses
import math
from typing import Literal

from jax_rlhf.hub.config import ModelConfig
from jax_rlhf.optim.config import OptimizerConfig
from jax_rlhf.sampling.config import Sampling
from jax_rlhf.settings import check_ranges


@dataclasses.dataclass(frozen=True, kw_only=True)
class CriticConfig(ModelConfig):
    """The critic: its checkpoint, and how it runs. Without a path it starts as a copy of the reward model."""

    zero_head: bool = False
    """The value head starts at 0, and only the trunk comes from `path` or the reward model. A reward model is trained
    on complete answers; on unfinished ones its head can be a worse baseline than 0 (Ziegler et al. 2019)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrozenConfig(ModelConfig):
    """A model that PPO does not train: the reference or the reward model."""

    offload: bool = False
    """Stores its parameters in host memory and copies them to the devices for scoring. Layers shared with the actor or
    the critic stay on the devices."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class KLConfig:
    """The KL penalty in the rewards: −coef · kl_t at every token t."""

    coef: float = 0.05
    """β, reward units per nat of KL to the reference; with `target`, its initial value."""
    kind: Literal["k1", "k2", "k3", "abs"] = "k1"
    """The estimator of kl_t from a sampled token; "k1" is the log-ratio."""
    reduction: Literal["sum", "mean"] = "sum"
    """"sum": a response's penalty is the sum over its tokens; "mean": that sum divided by its length, so that short
    responses have no advantage."""
    target: float | None = None
    """The KL per response, in nats, to which β adapts; None = β is fixed."""
    horizon: float = 10_000.0
    """The time constant of the adaptation, in episodes."""

    def __post_init__(self) -> None:
        check_ranges(self, at_least_0=("coef",), above_0=("target", "horizon"))
        if self.target is not None and not self.coef > 0:
            raise ValueError(
                f"config.ppo.kl.target={self.target} multiplies config.ppo.kl.coef by factors: start it above 0."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardSourceConfig:
    """Reward functions besides the reward model, and how scores become rewards."""

    functions: tuple[str, ...] = ()
    """Python functions f(prompts, responses, **columns) → scores, each "FILE.py:function" or "package.module:function".
    Their scores are added to the reward model's."""
    clip: float | None = None
    """Clips scores to ± this value, in reward units; None = no clipping."""
    missing_eos_penalty: float = 0.0
    """Subtracted from the (clipped) score of a response without EOS, in reward units."""
    truncation: Literal["terminal", "bootstrap"] = "terminal"
    """How a response without EOS ends: "terminal", value 0 after the end; or "bootstrap", the critic's value there."""
    whiten: bool = False
    """Divides rewards by their standard deviation and keeps the mean."""
    timeout: float | None = 600.0
    """The longest call of a reward function, in seconds; None = no limit."""
    isolation: Literal["none", "process"] = "none"
    """"process": each reward and evaluation function runs in a separate process, which is killed after `timeout` and
    restarted when it ends; "none": in the run's process."""
    memory_gb: float | None = None
    """With isolation, the largest address space of each such process, in GB; None = no limit."""
    retries: int = 2
    """How often a call is repeated after an exception, a timeout, or a result without a finite number per response."""
    on_failure: Literal["fatal", "penalize"] = "fatal"
    """After the last retry: "fatal" ends the run; "penalize" gives responses without a score `failure_score`."""
    failure_score: float = -1.0
    """The score of those responses, in place of the sum of all functions."""

    def __post_init__(self) -> None:
        check_ranges(self, at_least_0=("clip", "retries"), above_0=("timeout", "memory_gb"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The losses of the actor and the critic."""

    policy: Literal["clip", "penalty"] = "clip"
    """The policy loss: "clip" (PPO-clip) or "penalty" (PPO-penalty)."""
    clip_range: float = 0.2
    """ε of PPO-clip: the ratio is clipped to 1 − ε and 1 + ε."""
    clip_range_high: float | None = None
    """The upper ε, if it differs from `clip_range`; None = `clip_range`."""
    dual_clip: float | None = None
    """c of dual-clip PPO: the loss of tokens with A < 0 is at most c |A|; None = no such bound."""
    penalty_coef: float = 1.0
    """The initial β of PPO-penalty."""
    penalty_target: float = 0.01
    """The KL per token, in nats, to which the β of PPO-penalty adapts."""
    value_clip_range: float = 0.2
    """ε of the clipped value loss, in reward units: how far a value may move from the one at the rollout."""
    entropy_coef: float = 0.0
    """The weight of the entropy bonus, per nat."""
    entropy_target: float | None = None
    """Switches the bonus off while the last minibatch had more entropy than this, in nats per token, so that the bonus
    prevents a collapse but does not raise entropy further; None = the bonus is always on."""
    ptx_coef: float = 0.0
    """The weight of the pretraining loss (PPO-ptx): mean nats per token on the texts of `data.ptx_paths`, or on the SFT
    data."""

    def __post_init__(self) -> None:
        check_ranges(
            self,
            at_least_0=("clip_range", "clip_range_high", "value_clip_range", "ptx_coef"),
            above_0=("penalty_coef", "penalty_target", "entropy_target"),
        )
        if self.entropy_target is not None and not self.entropy_coef:
            raise ValueError(
                f"config.ppo.loss.entropy_target={self.entropy_target} switches the bonus: set entropy_coef above 0."
            )
        if self.dual_clip is not None and self.dual_clip <= 1:
            raise ValueError(f"config.ppo.loss.dual_clip={self.dual_clip} must be above 1.")

    @property
    def clip_ranges(self) -> tuple[float, float]:
        """The lower and the upper ε; infinite for PPO-penalty, which does not clip."""
        if self.policy == "penalty":
            return math.inf, math.inf
        return self.clip_range, self.clip_range if self.clip_range_high is None else self.clip_range_high


@dataclasses.dataclass(frozen=True, kw_only=True)
class ActorTrainingConfig:
    """The training of the actor."""

    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    """The actor's optimizer."""
    ema_decay: float | None = None
    """Decay per iteration of the actor's moving average, saved in <workdir>/ppo/model_ema; None = no average."""

    def __post_init__(self) -> None:
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ValueError(f"config.ppo.actor.ema_decay={self.ema_decay} must lie in [0, 1).")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CriticTrainingConfig:
    """The training of the critic."""

    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    """The critic's optimizer."""
    warmup_iterations: int = 0
    """Iterations at the start in which only the critic is trained. Adaptive coefficients do not change meanwhile."""

    def __post_init__(self) -> None:
        check_ranges(self, at_least_0=("warmup_iterations",))


@dataclasses.dataclass(frozen=True, kw_only=True)
class LimitsConfig:
    """Early stopping of an iteration's updates, and limits beyond which a run counts as failed."""

    target_kl: float | None = None
    """Skips the remaining updates of an iteration, of actor and critic, once the approximate KL of a minibatch exceeds
    this, in nats per token; None = never."""
    kl: float | None = None
    """The largest mean KL to the reference, in nats per response; None = no limit."""
    ratio: float | None = None
    """The largest probability ratio in an iteration's updates, 2 or more; None = no limit."""
    action: Literal["stop", "lower_lr"] = "stop"
    """Beyond `kl` or `ratio`: "stop" ends the run and keeps the last good checkpoint; "lower_lr" multiplies the actor's
    learning rate by `lr_factor`, once per such iteration."""
    lr_factor: float = 0.5
    """The factor of `action="lower_lr"`."""

    def __post_init__(self) -> None:
        check_ranges(self, above_0=("target_kl", "kl"))
        if self.ratio is not None and not self.ratio >= 2:
            raise ValueError(f"config.ppo.limits.ratio={self.ratio} must be 2 or more.")
        if not 0 < self.lr_factor < 1:
            raise ValueError(f"config.ppo.limits.lr_factor={self.lr_factor} must lie between 0 and 1.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PPOConfig:
    """The PPO phase. `PPOTrainer` ignores `iterations`, `eval_…` and `sample_rows`, and takes functions as an argument
    instead of `reward.functions`."""

    iterations: int = 100
    """Iterations; each samples responses to `data.ppo_batch_size` prompts and updates actor and critic."""
    eval_every: int = 0
    """Iterations between evaluations on held-out prompts; 0 = only before the first and after the last."""
    eval_rows: int | None = None
    """The most held-out prompts per evaluation; None = `data.eval_rows`."""
    eval_functions: tuple[str, ...] = ()
    """Functions like `reward.functions` whose scores are only reported, in evaluations."""
    sample_rows: int = 4
    """Responses per iteration that are written to samples.jsonl; evaluations write all."""
    seed: int = 0
    """The seed of sampling and of the order of rows; it follows the run's seed unless it is set."""
    time_phases: bool = False
    """Runs sampling and scoring as two programs and waits for each, for the metrics time/generate, time/score and
    time/train."""

    ppo_epochs: int = 4
    """Passes over the experience of each iteration."""
    num_minibatches: int = 1
    """Optimizer steps per pass; rows are reshuffled for each pass."""
    microbatch_size: int | None = None
    """Rows that are scored, or differentiated, at once, on all devices in total; None = chosen for the device. It
    changes memory and speed, not the gradient."""
    logprob_chunk: int | None = None
    """Token positions whose logits are computed at once; None = chosen from vocabulary size and device."""
    gamma: float = 1.0
    """The discount factor of future rewards."""
    lam: float = 0.95
    """λ of GAE."""
    whiten_advantages: bool = True
    """Normalises advantages to mean 0 and variance 1 over the tokens of the batch."""

    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    """How responses are sampled."""
    reward: RewardSourceConfig = dataclasses.field(default_factory=RewardSourceConfig)
    """Reward functions besides the reward model, and how scores become rewards."""
    kl: KLConfig = dataclasses.field(default_factory=KLConfig)
    """The KL penalty in the rewards."""
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    """The losses of the actor and the critic."""
    actor: ActorTrainingConfig = dataclasses.field(default_factory=ActorTrainingConfig)
    """The training of the actor."""
    critic: CriticTrainingConfig = dataclasses.field(default_factory=CriticTrainingConfig)
    """The training of the critic."""
    limits: LimitsConfig = dataclasses.field(default_factory=LimitsConfig)
    """Early stopping of an iteration's updates, and limits beyond which a run counts as failed."""

    def __post_init__(self) -> None:
        at_least_1 = ("ppo_epochs", "num_minibatches", "microbatch_size", "logprob_chunk", "iterations", "eval_rows")
        check_ranges(self, at_least_1=at_least_1, at_least_0=("eval_every", "sample_rows"))
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"config.ppo.{name}={getattr(self, name)} must lie between 0 and 1.")

    def with_schedule_ends(self) -> "PPOConfig":
        """The settings, with learning-rate schedules that end with the run unless `total_steps` is set.

        Raises:
          ValueError: the critic's warm-up is as long as the run.
        """
        per_iteration, learning = self.ppo_epochs * self.num_minibatches, self.iterations
        learning -= self.critic.warmup_iterations
        if learning < 1:
            raise ValueError(
                f"config.ppo.critic.warmup_iterations={self.critic.warmup_iterations} leaves the actor none of "
                f"config.ppo.iterations={self.iterations}; reduce it, or run more iterations."
            )
        actor = self.actor.optimizer.with_end(learning * per_iteration)
        critic = self.critic.optimizer.with_end(self.iterations * per_iteration)
        return dataclasses.replace(
            self,
            actor=dataclasses.replace(self.actor, optimizer=actor),
            critic=dataclasses.replace(self.critic, optimizer=critic),
        )
