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
    config.phases = ("ppo",)  # The phases to run: one or more of "sft", "reward" and "ppo", in this order.
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
    """The reward model of PPO; without a `path`, <workdir>/reward/model, or reward functions only if there is none."""
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
    # Keep the parameters in host memory, and copy them to the devices for scoring. Parameters shared with the actor or
    # the critic stay on the devices.
    reward_model.offload = False


def _critic(critic: ConfigDict) -> None:
    """The critic of PPO; without a `path` it starts from the reward model."""
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
    # Start with a value head of zeros, so that all values are 0; only the trunk is taken from `path` (or the reward
    # model). A reward model is trained on whole answers, and its scores of unfinished ones can be a worse baseline than
    # none (Ziegler et al. 2019).
    critic.zero_head = False


def _reference(reference: ConfigDict) -> None:
    """The reference of PPO; without a `path`, the SFT policy."""
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
    # Keep the parameters in host memory, and copy them to the devices for scoring. Parameters shared with the actor or
    # the critic stay on the devices.
    reference.offload = False


def _ppo(ppo: ConfigDict) -> None:
    """The PPO phase."""
    ppo.iterations = 100  # Iterations; each samples responses to `data.ppo_batch_size` prompts and trains on them.
    # Iterations between evaluations on held-out prompts; 0 = only before the first and after the last.
    ppo.eval_every = 0
    # The largest number of held-out prompts per path and evaluation; None = `data.eval_rows`, which decides how many
    # are held out.
    # ppo.eval_rows = None
    ppo.eval_functions = ()  # Functions like those of `reward.functions`, whose results are only reported.
    ppo.sample_rows = 4  # Responses per iteration that are written to samples.jsonl; evaluations write all of theirs.
    ppo.seed = 0  # The seed of sampling and of shuffling rows; in a run it follows `config.seed` unless it is set.
    # Run sampling and scoring as two programs and wait for each, to measure time/generate, time/score and time/train.
    ppo.time_phases = True
    ppo.ppo_epochs = 4  # Passes over the experience of each iteration.
    ppo.num_minibatches = 4  # Optimizer steps per pass; rows are reshuffled in each pass.
    # Rows per forward and backward pass, in scoring and in updates, summed over all devices; None = chosen by the
    # device. It changes memory and speed, not the gradient.
    # ppo.microbatch_size = None
    # Token positions whose logits are in memory at once; None = chosen by vocabulary size and device.
    # ppo.logprob_chunk = None
    ppo.gamma = 1.0  # The discount factor of future rewards.
    ppo.lam = 0.95  # λ of GAE.
    ppo.whiten_advantages = True  # Normalize advantages to mean 0 and variance 1 over the tokens of the batch.
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
    sampling.min_new_tokens = 0  # The shortest response, in tokens: EOS is not sampled earlier.
    sampling.temperature = 1.0  # τ > 0; logits are divided by it, in sampling and in all log-probs.
    # Sample from the k most likely tokens; 0 = all, 1 = greedy. Leave it at 0 in PPO: log-probs are those of the
    # unfiltered softmax, so ratios would be of a distribution that was not sampled from; `val/kept_mass` shows by how
    # much.
    sampling.top_k = 0
    # Sample from the smallest set of tokens with at least this total probability; 1 = all. Leave it at 1 in PPO, for
    # the same reason.
    sampling.top_p = 1.0
    # Token ids that end a response; None = those of the tokenizer and of the checkpoint's generation_config (in
    # `jax_rlhf.sample`: none).
    # sampling.eos_ids = None
    # The token id after the end of a response; None = the tokenizer's pad, or an EOS if it has none (in
    # `jax_rlhf.sample`: 0).
    # sampling.pad_id = None


def _ppo_reward(reward: ConfigDict) -> None:
    """The reward functions, and how scores become rewards."""
    # Reward functions, each "FILE.py:function" or "package.module:function": f(prompts, responses, **columns) → one
    # score per response. Their scores are added to the reward model's.
    reward.functions = ()
    # reward.clip = None  # Clip scores to [−clip, clip], in reward units; None = no clipping.
    # Subtracted from the score of a response without EOS, after clipping; in reward units.
    reward.missing_eos_penalty = 0.0
    # How a response without EOS ends. "terminal": the value after its last token is 0, as after EOS. "bootstrap": it is
    # the critic's value there.
    reward.truncation = "terminal"
    reward.whiten = False  # Divide the rewards by their standard deviation; the mean is kept.
    reward.timeout = 600.0  # Time limit of one call of a reward function, in seconds; None = no limit.
    # "none": reward and evaluation functions run in the training process. "process": each runs in its own process,
    # which is killed after `timeout` and restarted if it has exited.
    reward.isolation = "none"
    # With isolation="process", the limit on the address space of each process, in GB; None = no limit.
    # reward.memory_gb = None
    # The number of retries of a call that raised an exception, timed out, or did not return one finite number per
    # response.
    reward.retries = 2
    # After the last retry, "fatal" ends the run; "penalize" gives `failure_score` to the responses without a score.
    reward.on_failure = "fatal"
    reward.failure_score = -1.0  # The score of those responses, in place of the sum of all functions.


def _ppo_kl(kl: ConfigDict) -> None:
    """The KL penalty in the rewards."""
    kl.coef = 0.05  # β, in reward units per nat of KL to the reference. With `target` it is the initial value.
    kl.kind = "k1"  # The estimator of kl_t from a sampled token; "k1" is the log-ratio.
    # "sum": a response's penalty is the sum over its tokens. "mean": the penalty is divided by the response's length,
    # so that short responses are not penalized less.
    kl.reduction = "sum"
    # kl.target = None  # The KL, in nats per response, that an adaptive β aims at; None = β is fixed.
    kl.horizon = 10000.0  # The time scale of the adaptive β, in episodes; larger = slower.


def _ppo_loss(loss: ConfigDict) -> None:
    """The losses of the actor and the critic."""
    loss.policy = "clip"  # The policy loss: "clip" (PPO-clip) or "penalty" (PPO-penalty).
    loss.clip_range = 0.2  # ε of PPO-clip: ratios are clipped to [1 − clip_range, 1 + clip_range_high].
    # loss.clip_range_high = None  # The upper ε, if it differs from `clip_range`; None = `clip_range`.
    # c of dual-clip PPO: the loss of a token with advantage A < 0 is at most c |A|; None = no cap.
    # loss.dual_clip = None
    loss.penalty_coef = 1.0  # The initial β of PPO-penalty.
    loss.penalty_target = 0.01  # The KL to the old policy, in nats per token, that PPO-penalty's adaptive β aims at.
    # ε of the clipped value loss, in reward units: how far a value may move from the one at the rollout.
    loss.value_clip_range = 0.2
    loss.entropy_coef = 0.0  # The coefficient of the entropy bonus, per nat.
    # Entropy in nats per token above which there is no bonus. The bonus then keeps entropy from collapsing without
    # pushing it ever higher. The entropy of the last minibatch decides; None = the bonus always applies.
    # loss.entropy_target = None
    # The coefficient of the pretraining loss (PPO-ptx): mean nats per token on the texts of `data.ptx_paths`, or on the
    # SFT data without them.
    loss.ptx_coef = 0.0


def _ppo_actor(actor: ConfigDict) -> None:
    """How the actor trains."""
    # The decay per iteration of an exponential moving average of the actor, saved in <workdir>/ppo/model_ema; None = no
    # average.
    # actor.ema_decay = None
    _ppo_actor_optimizer(actor.optimizer)


def _ppo_actor_optimizer(optimizer: ConfigDict) -> None:
    """The actor's optimizer."""
    optimizer.learning_rate = 1e-06  # The peak learning rate.
    # The learning rate after the warm-up: "constant", or a "linear" or "cosine" decay to `final_fraction`.
    optimizer.schedule = "constant"
    # Optimizer steps of linear warm-up. The first step has the rate learning_rate / warmup_steps, not 0.
    optimizer.warmup_steps = 0
    # Optimizer steps (in PPO iterations × epochs × minibatches) after which "linear" and "cosine" end; None = the last
    # step of the phase, in runs of `python -m jax_rlhf`. Skipped steps (non-finite, or after `target_kl`) count too.
    # The actor's steps are counted from the end of the critic's warm-up.
    # optimizer.total_steps = None
    optimizer.final_fraction = 0.0  # The final learning rate, as a fraction of `learning_rate`.
    optimizer.beta1 = 0.9  # Decay of Adam's first moment.
    optimizer.beta2 = 0.95  # Decay of Adam's second moment.
    optimizer.eps = 1e-08  # Adam's ε.
    # "pytorch": m̂ / (√v̂ + ε); "tensorflow": ε outside the bias correction, m̂ / (√v̂ + ε / √(1 − β₂ᵗ)), which takes
    # smaller first steps where gradients are tiny.
    optimizer.eps_form = "pytorch"
    optimizer.weight_decay = 0.0  # Decoupled weight decay, applied to matrices only, not to norms and biases.
    optimizer.max_grad_norm = 1.0  # Clip the global norm of the gradient to this; None = no clipping.
    # The dtype of Adam's first moment; "bfloat16" saves 2 bytes per parameter.
    optimizer.first_moment_dtype = "float32"


def _ppo_critic(critic: ConfigDict) -> None:
    """How the critic trains."""
    # The first iterations, in which only the critic is trained and adaptive coefficients do not change.
    critic.warmup_iterations = 0
    _ppo_critic_optimizer(critic.optimizer)


def _ppo_critic_optimizer(optimizer: ConfigDict) -> None:
    """The critic's optimizer."""
    optimizer.learning_rate = 5e-06  # The peak learning rate.
    # The learning rate after the warm-up: "constant", or a "linear" or "cosine" decay to `final_fraction`.
    optimizer.schedule = "constant"
    # Optimizer steps of linear warm-up. The first step has the rate learning_rate / warmup_steps, not 0.
    optimizer.warmup_steps = 0
    # Optimizer steps (in PPO iterations × epochs × minibatches) after which "linear" and "cosine" end; None = the last
    # step of the phase, in runs of `python -m jax_rlhf`. Skipped steps (non-finite, or after `target_kl`) count too.
    # The actor's steps are counted from the end of the critic's warm-up.
    # optimizer.total_steps = None
    optimizer.final_fraction = 0.0  # The final learning rate, as a fraction of `learning_rate`.
    optimizer.beta1 = 0.9  # Decay of Adam's first moment.
    optimizer.beta2 = 0.95  # Decay of Adam's second moment.
    optimizer.eps = 1e-08  # Adam's ε.
    # "pytorch": m̂ / (√v̂ + ε); "tensorflow": ε outside the bias correction, m̂ / (√v̂ + ε / √(1 − β₂ᵗ)), which takes
    # smaller first steps where gradients are tiny.
    optimizer.eps_form = "pytorch"
    optimizer.weight_decay = 0.0  # Decoupled weight decay, applied to matrices only, not to norms and biases.
    optimizer.max_grad_norm = 1.0  # Clip the global norm of the gradient to this; None = no clipping.
    # The dtype of Adam's first moment; "bfloat16" saves 2 bytes per parameter.
    optimizer.first_moment_dtype = "float32"


def _ppo_limits(limits: ConfigDict) -> None:
    """When an iteration's updates end early, and when a run counts as diverged."""
    # Skip the rest of an iteration's updates, of actor and critic, once the approximate KL to the old policy in a
    # minibatch exceeds this, in nats per token; None = never.
    # limits.target_kl = None
    # The limit on the mean KL to the reference, in nats per response; None = no limit. `action` says what follows.
    # limits.kl = None
    # The limit on the largest probability ratio of an iteration's updates, 2 or more; None = no limit.
    # limits.ratio = None
    # When `kl` or `ratio` is exceeded: "stop" ends the run, and keeps the last good checkpoint; "lower_lr" multiplies
    # the actor's learning rate by `lr_factor`, for all later iterations, and again each time it happens.
    limits.action = "stop"
    limits.lr_factor = 0.5  # The factor of action="lower_lr", between 0 and 1.
