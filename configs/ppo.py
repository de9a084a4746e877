"""PPO from an SFT policy and a reward model, or with Python functions as rewards.

    python -m jax_rlhf --config=configs/ppo.py --workdir=runs/ppo --config.data.paths=prompts.jsonl \
        --config.model.path=HuggingFaceTB/SmolLM2-135M --config.sft_model_path=runs/sft/sft/model \
        --config.reward_model.path=runs/reward/reward/model

Rows are {"prompt"}; their other columns go to reward functions. The results are runs/ppo/ppo/model and
runs/ppo/ppo/critic. The fields of `data`: configs/sft.py; what PPO computes: docs/ppo.md.
"""

from ml_collections import ConfigDict

from jax_rlhf.config import default_config


def get_config() -> ConfigDict:
    """The settings."""
    config = default_config()  # has every field, so that flags can set any
    config.phases = ("ppo",)  # The phases to run, any of "sft", "reward" and "ppo", in this order.
    # The checkpoint: a folder, a .gguf file or a hub id; None = the checkpoint of another model, or no model.
    config.model.path = "HuggingFaceTB/SmolLM2-135M"
    # The number of layers that are trained, counted from the top; None = all parameters. `model.trainable_layers` is
    # that of SFT and of the actor in PPO, `critic.trainable_layers` is that of the critic. The reference and the reward
    # model are frozen, so theirs must be None.
    # config.model.trainable_layers = None
    # The SFT policy, from which the reward and PPO phases start; None = <workdir>/sft/model.
    # config.sft_model_path = None
    # Each is a .jsonl, .json, .csv or .tsv file (also with .gz), or a .parquet or .arrow file; a Hugging Face data set
    # ("org/name" or "org/name:configuration"), or a folder that `datasets` can load or has saved; or a reader,
    # "FILE.py:function" or "package.module:function": f(phase=…, split="train" | "eval") → rows as dicts.
    config.data.paths = ()
    # Texts for the pretraining loss in PPO (`ppo.loss.ptx_coef`); empty = the texts of the SFT phase from `paths`.
    config.data.ptx_paths = ()
    config.data.ppo_batch_size = 64  # Prompts per iteration, over all devices.
    config.data.max_prompt_tokens = 256  # The longest prompt of the PPO phase, in tokens.
    _reward_model(config.reward_model)
    _critic(config.critic)
    _reference(config.reference)
    _ppo(config.ppo)
    return config


def _reward_model(reward_model: ConfigDict) -> None:
    """The reward model of PPO; without `path`, <workdir>/reward/model, or only `ppo.reward.functions`."""
    # The checkpoint: a folder, a .gguf file or a hub id; None = the checkpoint of another model, or no model.
    # reward_model.path = None
    # reward_model.revision = None  # The revision of a hub id.
    # The number of layers that are trained, counted from the top; None = all parameters. `model.trainable_layers` is
    # that of SFT and of the actor in PPO, `critic.trainable_layers` is that of the critic. The reference and the reward
    # model are frozen, so theirs must be None.
    # reward_model.trainable_layers = None
    # "float32" or "bfloat16", the dtype of computation and of saved models; None = bfloat16 on GPU and TPU, float32 on
    # CPU.
    # reward_model.dtype = None
    # What the backward pass recomputes: "none", "full" or "dots"; None = "dots" on CPU, where it is as fast as "none"
    # and needs less memory, and "full" elsewhere.
    # reward_model.remat = None
    # "xla", or "flash" on GPU (cuDNN) and TPU (splash attention), which stores no T × T scores; None = "xla".
    # reward_model.attention = None
    # Stores its parameters in host memory and copies them to the devices for scoring. Layers shared with the actor or
    # the critic stay on the devices.
    reward_model.offload = False


def _critic(critic: ConfigDict) -> None:
    """The critic of PPO; without `path`, it starts as the reward model."""
    # The checkpoint: a folder, a .gguf file or a hub id; None = the checkpoint of another model, or no model.
    # critic.path = None
    # critic.revision = None  # The revision of a hub id.
    # The number of layers that are trained, counted from the top; None = all parameters. `model.trainable_layers` is
    # that of SFT and of the actor in PPO, `critic.trainable_layers` is that of the critic. The reference and the reward
    # model are frozen, so theirs must be None.
    # critic.trainable_layers = None
    # "float32" or "bfloat16", the dtype of computation and of saved models; None = bfloat16 on GPU and TPU, float32 on
    # CPU.
    # critic.dtype = None
    # What the backward pass recomputes: "none", "full" or "dots"; None = "dots" on CPU, where it is as fast as "none"
    # and needs less memory, and "full" elsewhere.
    # critic.remat = None
    # "xla", or "flash" on GPU (cuDNN) and TPU (splash attention), which stores no T × T scores; None = "xla".
    # critic.attention = None
    # The value head starts at 0, and only the trunk comes from `path` or the reward model. A reward model is trained on
    # complete answers; on unfinished ones its head can be a worse baseline than 0 (Ziegler et al. 2019).
    critic.zero_head = False


def _reference(reference: ConfigDict) -> None:
    """The reference of PPO; without `path`, the SFT policy."""
    # The checkpoint: a folder, a .gguf file or a hub id; None = the checkpoint of another model, or no model.
    # reference.path = None
    # reference.revision = None  # The revision of a hub id.
    # The number of layers that are trained, counted from the top; None = all parameters. `model.trainable_layers` is
    # that of SFT and of the actor in PPO, `critic.trainable_layers` is that of the critic. The reference and the reward
    # model are frozen, so theirs must be None.
    # reference.trainable_layers = None
    # "float32" or "bfloat16", the dtype of computation and of saved models; None = bfloat16 on GPU and TPU, float32 on
    # CPU.
    # reference.dtype = None
    # What the backward pass recomputes: "none", "full" or "dots"; None = "dots" on CPU, where it is as fast as "none"
    # and needs less memory, and "full" elsewhere.
    # reference.remat = None
    # "xla", or "flash" on GPU (cuDNN) and TPU (splash attention), which stores no T × T scores; None = "xla".
    # reference.attention = None
    # Stores its parameters in host memory and copies them to the devices for scoring. Layers shared with the actor or
    # the critic stay on the devices.
    reference.offload = False


def _ppo(ppo: ConfigDict) -> None:
    """The PPO phase."""
    # Iterations; each samples responses to `data.ppo_batch_size` prompts and updates actor and critic.
    ppo.iterations = 100
    # Iterations between evaluations on held-out prompts; 0 = only before the first and after the last.
    ppo.eval_every = 0
    # ppo.eval_rows = None  # The most held-out prompts per evaluation; None = `data.eval_rows`.
    ppo.eval_functions = ()  # Functions like `reward.functions` whose scores are only reported, in evaluations.
    ppo.sample_rows = 4  # Responses per iteration that are written to samples.jsonl; evaluations write all.
    ppo.seed = 0  # The seed of sampling and of the order of rows; it follows the run's seed unless it is set.
    # Runs sampling and scoring as two programs and waits for each, for the metrics time/generate, time/score and
    # time/train.
    ppo.time_phases = True
    ppo.ppo_epochs = 4  # Passes over the experience of each iteration.
    ppo.num_minibatches = 4  # Optimizer steps per pass; rows are reshuffled for each pass.
    # Rows that are scored, or differentiated, at once, on all devices in total; None = chosen for the device. It
    # changes memory and speed, not the gradient.
    # ppo.microbatch_size = None
    # Token positions whose logits are computed at once; None = chosen from vocabulary size and device.
    # ppo.logprob_chunk = None
    ppo.gamma = 1.0  # The discount factor of future rewards.
    ppo.lam = 0.95  # λ of GAE.
    ppo.whiten_advantages = True  # Normalises advantages to mean 0 and variance 1 over the tokens of the batch.
    _ppo_sampling(ppo.sampling)
    _ppo_reward(ppo.reward)
    _ppo_kl(ppo.kl)
    _ppo_loss(ppo.loss)
    _ppo_actor(ppo.actor)
    _ppo_critic(ppo.critic)
    _ppo_limits(ppo.limits)


def _ppo_sampling(sampling: ConfigDict) -> None:
    """How responses are sampled."""
    sampling.max_new_tokens = 128  # The longest response, in tokens.
    sampling.min_new_tokens = 0  # EOS is not drawn before a response has this many tokens.
    sampling.temperature = 1.0  # τ > 0, by which logits are divided, in sampling and in every log-prob.
    # Draws from the k most likely tokens; 0 = all, 1 = greedy. Leave it off in PPO: log-probs are of the unfiltered
    # softmax, so ratios would refer to another distribution than the sampled one. `val/kept_mass` measures the gap.
    sampling.top_k = 0
    # Draws from the smallest set of most likely tokens with at least this probability; 1 = all. Leave it off in PPO,
    # like `top_k`.
    sampling.top_p = 1.0
    # Ids of tokens that end a response; None = those of the tokenizer and of the checkpoint's generation_config
    # (`jax_rlhf.sample`: none).
    # sampling.eos_ids = None
    # The id after the end of a response; None = the tokenizer's pad token, or else an EOS (`jax_rlhf.sample`: 0).
    # sampling.pad_id = None


def _ppo_reward(reward: ConfigDict) -> None:
    """Reward functions besides the reward model, and how scores become rewards."""
    # Python functions f(prompts, responses, **columns) → scores, each "FILE.py:function" or "package.module:function".
    # Their scores are added to the reward model's.
    reward.functions = ()
    # reward.clip = None  # Clips scores to ± this value, in reward units; None = no clipping.
    reward.missing_eos_penalty = 0.0  # Subtracted from the (clipped) score of a response without EOS, in reward units.
    # How a response without EOS ends: "terminal", value 0 after the end; or "bootstrap", the critic's value there.
    reward.truncation = "terminal"
    reward.whiten = False  # Divides rewards by their standard deviation and keeps the mean.
    reward.timeout = 600.0  # The longest call of a reward function, in seconds; None = no limit.
    # "process": each reward and evaluation function runs in a separate process, which is killed after `timeout` and
    # restarted when it ends; "none": in the run's process.
    reward.isolation = "none"
    # reward.memory_gb = None  # With isolation, the largest address space of each such process, in GB; None = no limit.
    # How often a call is repeated after an exception, a timeout, or a result without a finite number per response.
    reward.retries = 2
    # After the last retry: "fatal" ends the run; "penalize" gives responses without a score `failure_score`.
    reward.on_failure = "fatal"
    reward.failure_score = -1.0  # The score of those responses, in place of the sum of all functions.


def _ppo_kl(kl: ConfigDict) -> None:
    """The KL penalty in the rewards."""
    kl.coef = 0.05  # β, reward units per nat of KL to the reference; with `target`, its initial value.
    kl.kind = "k1"  # The estimator of kl_t from a sampled token; "k1" is the log-ratio.
    # "sum": a response's penalty is the sum over its tokens; "mean": that sum divided by its length, so that short
    # responses have no advantage.
    kl.reduction = "sum"
    # kl.target = None  # The KL per response, in nats, to which β adapts; None = β is fixed.
    kl.horizon = 10000.0  # The time constant of the adaptation, in episodes.


def _ppo_loss(loss: ConfigDict) -> None:
    """The losses of the actor and the critic."""
    loss.policy = "clip"  # The policy loss: "clip" (PPO-clip) or "penalty" (PPO-penalty).
    loss.clip_range = 0.2  # ε of PPO-clip: the ratio is clipped to 1 − ε and 1 + ε.
    # loss.clip_range_high = None  # The upper ε, if it differs from `clip_range`; None = `clip_range`.
    # loss.dual_clip = None  # c of dual-clip PPO: the loss of tokens with A < 0 is at most c |A|; None = no such bound.
    loss.penalty_coef = 1.0  # The initial β of PPO-penalty.
    loss.penalty_target = 0.01  # The KL per token, in nats, to which the β of PPO-penalty adapts.
    # ε of the clipped value loss, in reward units: how far a value may move from the one at the rollout.
    loss.value_clip_range = 0.2
    loss.entropy_coef = 0.0  # The weight of the entropy bonus, per nat.
    # Switches the bonus off while the last minibatch had more entropy than this, in nats per token, so that the bonus
    # prevents a collapse but does not raise entropy further; None = the bonus is always on.
    # loss.entropy_target = None
    # The weight of the pretraining loss (PPO-ptx): mean nats per token on the texts of `data.ptx_paths`, or on the SFT
    # data.
    loss.ptx_coef = 0.0


def _ppo_actor(actor: ConfigDict) -> None:
    """The training of the actor."""
    # Decay per iteration of the actor's moving average, saved in <workdir>/ppo/model_ema; None = no average.
    # actor.ema_decay = None
    _ppo_actor_optimizer(actor.optimizer)


def _ppo_actor_optimizer(optimizer: ConfigDict) -> None:
    """The actor's optimizer."""
    optimizer.learning_rate = 1e-06  # The peak learning rate.
    # The learning rate after warm-up: "constant", or a "linear" or "cosine" decay to `final_fraction`.
    optimizer.schedule = "constant"
    # Optimizer steps of linear warm-up. The first has rate learning_rate / warmup_steps, so no step has rate 0.
    optimizer.warmup_steps = 0
    # The step (iterations × epochs × minibatches) at which "linear" and "cosine" end; None = the phase's last step, for
    # phases of `python -m jax_rlhf`. Skipped steps (not finite, or beyond `target_kl`) count too. The actor's steps are
    # counted from the end of the critic's warm-up.
    # optimizer.total_steps = None
    optimizer.final_fraction = 0.0  # The final learning rate, as a fraction of `learning_rate`.
    optimizer.beta1 = 0.9  # Decay of Adam's first moment.
    optimizer.beta2 = 0.95  # Decay of Adam's second moment.
    optimizer.eps = 1e-08  # Adam's ε.
    # "pytorch": m̂ / (√v̂ + ε); "tensorflow": ε outside the bias correction, m̂ / (√v̂ + ε / √(1 − β₂ᵗ)), with smaller
    # first steps if gradients are tiny.
    optimizer.eps_form = "pytorch"
    optimizer.weight_decay = 0.0  # Decoupled weight decay of matrices; norms and biases have none.
    optimizer.max_grad_norm = 1.0  # Clips the global norm of the gradient to this; None = no clipping.
    # The dtype of Adam's first moment; "bfloat16" saves 2 bytes per parameter.
    optimizer.first_moment_dtype = "float32"


def _ppo_critic(critic: ConfigDict) -> None:
    """The training of the critic."""
    # Iterations at the start in which only the critic is trained. Adaptive coefficients do not change meanwhile.
    critic.warmup_iterations = 0
    _ppo_critic_optimizer(critic.optimizer)


def _ppo_critic_optimizer(optimizer: ConfigDict) -> None:
    """The critic's optimizer."""
    optimizer.learning_rate = 5e-06  # The peak learning rate.
    # The learning rate after warm-up: "constant", or a "linear" or "cosine" decay to `final_fraction`.
    optimizer.schedule = "constant"
    # Optimizer steps of linear warm-up. The first has rate learning_rate / warmup_steps, so no step has rate 0.
    optimizer.warmup_steps = 0
    # The step (iterations × epochs × minibatches) at which "linear" and "cosine" end; None = the phase's last step, for
    # phases of `python -m jax_rlhf`. Skipped steps (not finite, or beyond `target_kl`) count too. The actor's steps are
    # counted from the end of the critic's warm-up.
    # optimizer.total_steps = None
    optimizer.final_fraction = 0.0  # The final learning rate, as a fraction of `learning_rate`.
    optimizer.beta1 = 0.9  # Decay of Adam's first moment.
    optimizer.beta2 = 0.95  # Decay of Adam's second moment.
    optimizer.eps = 1e-08  # Adam's ε.
    # "pytorch": m̂ / (√v̂ + ε); "tensorflow": ε outside the bias correction, m̂ / (√v̂ + ε / √(1 − β₂ᵗ)), with smaller
    # first steps if gradients are tiny.
    optimizer.eps_form = "pytorch"
    optimizer.weight_decay = 0.0  # Decoupled weight decay of matrices; norms and biases have none.
    optimizer.max_grad_norm = 1.0  # Clips the global norm of the gradient to this; None = no clipping.
    # The dtype of Adam's first moment; "bfloat16" saves 2 bytes per parameter.
    optimizer.first_moment_dtype = "float32"


def _ppo_limits(limits: ConfigDict) -> None:
    """Early stopping of an iteration's updates, and limits beyond which a run counts as failed."""
    # Skips the remaining updates of an iteration, of actor and critic, once the approximate KL of a minibatch exceeds
    # this, in nats per token; None = never.
    # limits.target_kl = None
    # limits.kl = None  # The largest mean KL to the reference, in nats per response; None = no limit.
    # limits.ratio = None  # The largest probability ratio in an iteration's updates, 2 or more; None = no limit.
    # Beyond `kl` or `ratio`: "stop" ends the run and keeps the last good checkpoint; "lower_lr" multiplies the actor's
    # learning rate by `lr_factor`, once per such iteration.
    limits.action = "stop"
    limits.lr_factor = 0.5  # The factor of `action="lower_lr"`.
