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
    config.phases = ("ppo",)  # The phases to run, of "sft", "reward" and "ppo", in that order.
    # The checkpoint: a folder, a .gguf file or a hub id; None = the checkpoint of another model, or no model.
    config.model.path = "HuggingFaceTB/SmolLM2-135M"
    # The number of layers that are trained, counted from the top; None = all parameters. It applies to the actor and
    # the critic; reference and reward model are frozen.
    # config.model.trainable_layers = None
    # The SFT policy, which the reward and PPO phases start from; None = <workdir>/sft/model.
    # config.sft_model_path = None
    # Each is a .jsonl, .json, .parquet or .csv file; a Hugging Face data set ("org/name" or "org/name:configuration"),
    # or a folder that `datasets` can load or has saved; or a reader, "FILE.py:function" or "package.module:function":
    # f(phase=…, split="train" | "eval") → rows as dicts.
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
    """The reward model of PPO; `path` None = <workdir>/reward/model, or `ppo.reward.functions` alone."""
    # The checkpoint: a folder, a .gguf file or a hub id; None = the checkpoint of another model, or no model.
    # reward_model.path = None
    # reward_model.revision = None  # The revision of a hub id.
    # The number of layers that are trained, counted from the top; None = all parameters. It applies to the actor and
    # the critic; reference and reward model are frozen.
    # reward_model.trainable_layers = None
    # "float32" or "bfloat16", the dtype of computation and of saved models; None = bfloat16 on GPU and TPU, float32 on
    # CPU.
    # reward_model.dtype = None
    # What the backward pass recomputes: "none", "full" or "dots"; None = "dots" on CPU, where it is as fast as "none"
    # and needs less memory, and "full" elsewhere.
    # reward_model.remat = None
    # "xla", or "flash" on GPU (cuDNN) and TPU (splash attention), which stores no T × T scores; None = "xla".
    # reward_model.attention = None
    # Its parameters wait in the host's memory and come to the devices to score. What it shares with the actor or the
    # critic stays on the devices.
    reward_model.offload = False


def _critic(critic: ConfigDict) -> None:
    """The critic of PPO; `path` None = the reward model."""
    # The checkpoint: a folder, a .gguf file or a hub id; None = the checkpoint of another model, or no model.
    # critic.path = None
    # critic.revision = None  # The revision of a hub id.
    # The number of layers that are trained, counted from the top; None = all parameters. It applies to the actor and
    # the critic; reference and reward model are frozen.
    # critic.trainable_layers = None
    # "float32" or "bfloat16", the dtype of computation and of saved models; None = bfloat16 on GPU and TPU, float32 on
    # CPU.
    # critic.dtype = None
    # What the backward pass recomputes: "none", "full" or "dots"; None = "dots" on CPU, where it is as fast as "none"
    # and needs less memory, and "full" elsewhere.
    # critic.remat = None
    # "xla", or "flash" on GPU (cuDNN) and TPU (splash attention), which stores no T × T scores; None = "xla".
    # critic.attention = None
    # Its values start at 0, and only its trunk is what `path` (or the reward model) says. A reward model learned from
    # whole answers; what its head says of unfinished ones can be a worse baseline than none (Ziegler et al. 2019).
    critic.zero_head = False


def _reference(reference: ConfigDict) -> None:
    """The reference of PPO; `path` None = the SFT policy."""
    # The checkpoint: a folder, a .gguf file or a hub id; None = the checkpoint of another model, or no model.
    # reference.path = None
    # reference.revision = None  # The revision of a hub id.
    # The number of layers that are trained, counted from the top; None = all parameters. It applies to the actor and
    # the critic; reference and reward model are frozen.
    # reference.trainable_layers = None
    # "float32" or "bfloat16", the dtype of computation and of saved models; None = bfloat16 on GPU and TPU, float32 on
    # CPU.
    # reference.dtype = None
    # What the backward pass recomputes: "none", "full" or "dots"; None = "dots" on CPU, where it is as fast as "none"
    # and needs less memory, and "full" elsewhere.
    # reference.remat = None
    # "xla", or "flash" on GPU (cuDNN) and TPU (splash attention), which stores no T × T scores; None = "xla".
    # reference.attention = None
    # Its parameters wait in the host's memory and come to the devices to score. What it shares with the actor or the
    # critic stays on the devices.
    reference.offload = False


def _ppo(ppo: ConfigDict) -> None:
    """The PPO phase."""
    ppo.iterations = 100  # Each samples `data.ppo_batch_size` prompts and updates.
    # Iterations between evaluations on held-out prompts; 0 = only before the first and after the last.
    ppo.eval_every = 0
    # Held-out prompts to answer, at most; None = `data.eval_rows`, which says how many are drawn.
    # ppo.eval_rows = None
    ppo.eval_functions = ()  # As `reward.functions`, but only reported.
    ppo.sample_rows = 4  # Of each iteration's responses, how many go to samples.jsonl; evaluations write all.
    ppo.seed = 0  # Of the samples and the row orders; the run's seed where that is set.
    # Sample and score as two programs and wait for each, for the metrics time/generate, time/score and time/train.
    ppo.time_phases = True
    ppo.ppo_epochs = 4  # Passes over the experience of an iteration.
    ppo.num_minibatches = 4  # Optimizer steps per pass; rows are reshuffled in each pass.
    # Rows whose activations exist at once, in scoring and in updates, on all devices together; None = chosen by the
    # device. It changes memory and speed, not the gradient.
    # ppo.microbatch_size = None
    # ppo.logprob_chunk = None  # Positions whose logits exist at once; None = chosen by vocabulary and device.
    ppo.gamma = 1.0  # The discount factor of future rewards.
    ppo.lam = 0.95  # λ of GAE.
    ppo.whiten_advantages = True  # To mean 0 and variance 1 over the batch's tokens.
    _ppo_sampling(ppo.sampling)
    _ppo_reward(ppo.reward)
    _ppo_kl(ppo.kl)
    _ppo_loss(ppo.loss)
    _ppo_actor(ppo.actor)
    _ppo_critic(ppo.critic)
    _ppo_limits(ppo.limits)


def _ppo_sampling(sampling: ConfigDict) -> None:
    """How responses are sampled."""
    sampling.max_new_tokens = 128  # R, the longest response, in tokens.
    sampling.min_new_tokens = 0  # Before so many tokens EOS is not drawn.
    sampling.temperature = 1.0  # τ > 0, what logits are divided by, in sampling and in every log-prob.
    # Draw among the k likeliest tokens; 0 = all, 1 = greedy. Leave it off in PPO: log-probs are of the unfiltered
    # softmax, so that ratios would be of a distribution that was not sampled from; `val/kept_mass` says how far off.
    sampling.top_k = 0
    # Draw among the fewest tokens that hold this probability; 1 = all. Leave it off in PPO, as `top_k`.
    sampling.top_p = 1.0
    # Any of these ids ends a response; None = those of the tokenizer and of the checkpoint's generation_config (of
    # `jax_rlhf.sample`: none).
    # sampling.eos_ids = None
    # Stands after the end of a response; None = the tokenizer's pad, else an EOS (of `jax_rlhf.sample`: 0).
    # sampling.pad_id = None


def _ppo_reward(reward: ConfigDict) -> None:
    """Where scores come from beside the reward model, and what becomes of them."""
    # "FILE.py:function" or "package.module:function" each, f(prompts, responses, **columns) → scores, added to the
    # reward model's.
    reward.functions = ()
    # reward.clip = None  # Scores are clipped to ± this, in reward units; None = not.
    reward.missing_eos_penalty = 0.0  # Subtracted from the (clipped) score of a response without EOS.
    # A response without EOS is "terminal", or its end is "bootstrap"ped with the critic's value there.
    reward.truncation = "terminal"
    reward.whiten = False  # Divides the rewards by their spread, keeping the mean.
    reward.timeout = 600.0  # Seconds that a call of a reward function may take; None = for ever.
    # "process": each reward and evaluation function runs in a process of its own, which is killed after `timeout` and
    # started again where it ends; "none": in the run's process.
    reward.isolation = "none"
    # reward.memory_gb = None  # With isolation, address space of each such process, in GB; None = no limit.
    # How often a call is repeated that raised an exception, took too long, or did not return a finite number for each
    # response.
    reward.retries = 2
    # After the last retry "fatal" ends the run; with "penalize" responses without a score get `failure_score`.
    reward.on_failure = "fatal"
    reward.failure_score = -1.0  # The score of those responses, instead of all functions' sum.


def _ppo_kl(kl: ConfigDict) -> None:
    """The KL penalty in the reward."""
    kl.coef = 0.05  # β, reward units per nat of KL to the reference; the first one where it adapts.
    kl.kind = "k1"  # The estimate of kl_t from a sample; "k1" is the log-ratio.
    # "sum" over a response, or "mean": each response's penalty is divided by its length, so that short responses do not
    # pay less.
    kl.reduction = "sum"
    # kl.target = None  # Nats per response that an adaptive β steers to; None = β is fixed.
    kl.horizon = 10000.0  # Episodes over which β adapts.


def _ppo_loss(loss: ConfigDict) -> None:
    """The losses of actor and critic."""
    loss.policy = "clip"  # "clip" (PPO-clip) or "penalty" (PPO-penalty).
    loss.clip_range = 0.2  # ε of PPO-clip, below 1, and above where `clip_range_high` is None.
    # loss.clip_range_high = None  # ε above 1, where it differs.
    # loss.dual_clip = None  # c, the cap c |A| on the loss where A < 0; None = none.
    loss.penalty_coef = 1.0  # PPO-penalty's first β.
    loss.penalty_target = 0.01  # Nats per token that PPO-penalty's β adapts to.
    loss.value_clip_range = 0.2  # ε of the value loss, in reward units.
    loss.entropy_coef = 0.0  # Entropy bonus, per nat.
    # Nats per token. Where the last minibatch had more entropy, there is no bonus, so that it holds the entropy up and
    # does not drive it on; None = always a bonus.
    # loss.entropy_target = None
    # Weight of the pretraining loss (PPO-ptx), mean nats per token of the texts of `data.ptx_paths`, or of the SFT
    # data.
    loss.ptx_coef = 0.0


def _ppo_actor(actor: ConfigDict) -> None:
    """How the actor trains."""
    # Of the actor's moving average, one step per iteration, saved in <workdir>/ppo/model_ema; None = none is kept.
    # actor.ema_decay = None
    _ppo_actor_optimizer(actor.optimizer)


def _ppo_actor_optimizer(optimizer: ConfigDict) -> None:
    """The actor's optimizer."""
    optimizer.learning_rate = 1e-06  # The highest learning rate of the schedule.
    # The learning rate after the warm-up: "constant", or down to `final_fraction` "linear" or as a "cosine".
    optimizer.schedule = "constant"
    # Optimizer steps over which the rate rises from learning_rate / warmup_steps; no step has rate 0.
    optimizer.warmup_steps = 0
    # Steps (iterations × epochs × minibatches) at which "linear" and "cosine" end; None = the phase's last one, where
    # `python -m jax_rlhf` trains. Steps that are left out (not finite, past `target_kl`) count too. The actor's are
    # counted from the end of the critic's warm-up.
    # optimizer.total_steps = None
    optimizer.final_fraction = 0.0  # Where the schedule ends, as a fraction of `learning_rate`.
    optimizer.beta1 = 0.9  # Decay of Adam's first moment.
    optimizer.beta2 = 0.95  # Decay of Adam's second moment.
    optimizer.eps = 1e-08  # Adam's ε.
    # "pytorch": m̂ / (√v̂ + ε); "tensorflow": ε outside the bias correction, m̂ / (√v̂ + ε / √(1 − β₂ᵗ)), which takes
    # smaller first steps where gradients are tiny.
    optimizer.eps_form = "pytorch"
    optimizer.weight_decay = 0.0  # Decoupled weight decay, on matrices only (not norms and biases).
    optimizer.max_grad_norm = 1.0  # Clips the gradient's global norm; None = never.
    # The dtype of Adam's first moment; "bfloat16" saves 2 bytes per parameter.
    optimizer.first_moment_dtype = "float32"


def _ppo_critic(critic: ConfigDict) -> None:
    """How the critic trains."""
    critic.warmup_iterations = 0  # Iterations in which only the critic learns; the coefficients that adapt rest.
    _ppo_critic_optimizer(critic.optimizer)


def _ppo_critic_optimizer(optimizer: ConfigDict) -> None:
    """The critic's optimizer."""
    optimizer.learning_rate = 5e-06  # The highest learning rate of the schedule.
    # The learning rate after the warm-up: "constant", or down to `final_fraction` "linear" or as a "cosine".
    optimizer.schedule = "constant"
    # Optimizer steps over which the rate rises from learning_rate / warmup_steps; no step has rate 0.
    optimizer.warmup_steps = 0
    # Steps (iterations × epochs × minibatches) at which "linear" and "cosine" end; None = the phase's last one, where
    # `python -m jax_rlhf` trains. Steps that are left out (not finite, past `target_kl`) count too. The actor's are
    # counted from the end of the critic's warm-up.
    # optimizer.total_steps = None
    optimizer.final_fraction = 0.0  # Where the schedule ends, as a fraction of `learning_rate`.
    optimizer.beta1 = 0.9  # Decay of Adam's first moment.
    optimizer.beta2 = 0.95  # Decay of Adam's second moment.
    optimizer.eps = 1e-08  # Adam's ε.
    # "pytorch": m̂ / (√v̂ + ε); "tensorflow": ε outside the bias correction, m̂ / (√v̂ + ε / √(1 − β₂ᵗ)), which takes
    # smaller first steps where gradients are tiny.
    optimizer.eps_form = "pytorch"
    optimizer.weight_decay = 0.0  # Decoupled weight decay, on matrices only (not norms and biases).
    optimizer.max_grad_norm = 1.0  # Clips the gradient's global norm; None = never.
    # The dtype of Adam's first moment; "bfloat16" saves 2 bytes per parameter.
    optimizer.first_moment_dtype = "float32"


def _ppo_limits(limits: ConfigDict) -> None:
    """When updates end early, and when a run has gone wrong."""
    # Nats per token. The rest of an iteration's updates, of actor and critic, is left out once the approximate KL of a
    # minibatch exceeds this; None = never.
    # limits.target_kl = None
    # limits.kl = None  # Nats per response; a mean KL over it is a fault. None = no limit.
    # limits.ratio = None  # The same for the largest probability ratio of an iteration's updates, 2 or more.
    # Past `kl` or `ratio` the run "stop"s, its last good checkpoint kept; or each such iteration multiplies the actor's
    # learning rate from then on by `lr_factor` ("lower_lr").
    limits.action = "stop"
    limits.lr_factor = 0.5  # What `action="lower_lr"` multiplies the learning rate by.
