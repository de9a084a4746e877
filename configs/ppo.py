"""PPO of an SFT policy against a reward model, or a Python function.

    python -m jax_rlhf --config=configs/ppo.py --workdir=runs/ppo \
        --config.model.path=HuggingFaceTB/SmolLM2-135M --config.sft_model_path=runs/sft/sft/model \
        --config.reward_model.path=runs/reward/reward/model --config.data.paths=prompts.jsonl

Rows are {"prompt"}, a text or a chat; other columns go to reward functions. The results are runs/ppo/ppo/model and
runs/ppo/ppo/critic. The fields of `data` and of optimizers: configs/sft.py; what PPO computes: docs/ppo.md.
"""

from ml_collections import ConfigDict

from jax_rlhf.config import default_config


def get_config() -> ConfigDict:
    """The settings."""
    config = default_config()
    config.phases = ("ppo",)  # of "sft", "reward", "ppo"
    config.model.path = "HuggingFaceTB/SmolLM2-135M"  # whose tokenizer is used
    # config.model.trainable_layers = 10  # of the actor; what is frozen is shared with the reference
    # config.sft_model_path = "runs/sft/sft/model"  # actor and reference start as this; default: <workdir>/sft/model
    # config.reward_model.path = "runs/reward/reward/model"  # default: <workdir>/reward/model, or functions alone
    # config.critic.path = …  # default: the reward model
    # config.critic.trainable_layers = 4  # what is frozen is shared with the reward model
    # config.critic.zero_head = True  # values start at 0, not with what the reward model says of unfinished responses
    # config.reference.path = …  # default: the SFT policy
    # config.reference.offload = True  # waits in host memory between uses; so can config.reward_model

    config.data.paths = ()
    config.data.ppo_batch_size = 64  # prompts an iteration, of all devices together
    config.data.max_prompt_tokens = 256  # longer prompts are left out and counted

    ppo = config.ppo
    ppo.iterations = 100  # each samples a batch of prompts and updates
    ppo.eval_every = 0  # iterations between evaluations on held-out prompts; 0: before and after only
    # ppo.eval_rows = 64  # of the held-out prompts, how many to answer, at most; default: data.eval_rows
    ppo.reward.functions = ()  # "package.module:function": f(prompts, responses, **columns) → scores, added
    ppo.eval_functions = ()  # the same, only reported
    ppo.sample_rows = 4  # of each iteration's responses into samples.jsonl
    ppo.time_phases = True  # report the time of sampling, scoring and training apart

    # Sampling.
    ppo.sampling.max_new_tokens = 128  # longest response
    ppo.sampling.min_new_tokens = 0  # no EOS before
    ppo.sampling.temperature = 1.0  # of sampling and of every log-prob
    ppo.sampling.top_k = (
        0  # leave top-k and top-p off in PPO: they sample from another distribution than log-probs are of
    )
    ppo.sampling.top_p = 1.0
    # ppo.sampling.eos_ids = (2,)  # end a response; default: the tokenizer's and the checkpoint's
    # ppo.sampling.pad_id = 0  # stands after the end; default: the tokenizer's

    # Rewards.
    ppo.kl.coef = 0.05  # β: reward units per nat of KL to the reference
    ppo.kl.kind = "k1"  # log-ratio; "k2", "k3", "abs"
    ppo.kl.reduction = "sum"  # over a response; "mean": short responses do not pay less
    # ppo.kl.target = 6.0  # nats per response; β adapts to it
    ppo.kl.horizon = 10_000.0  # episodes over which it does
    # ppo.reward.clip = 5.0  # scores beyond ± this are clipped
    ppo.reward.missing_eos_penalty = 0.0  # subtracted from responses that do not end
    ppo.reward.timeout = 600.0  # seconds that a call of a reward function may take
    ppo.reward.isolation = "none"  # "process": functions run in processes of their own, which cannot harm the run
    # ppo.reward.memory_gb = 8.0  # address space of each of these
    ppo.reward.retries = 2  # how often a call that failed, hung, or gave no numbers is repeated
    ppo.reward.on_failure = "fatal"  # and then; or "penalize": its responses get
    ppo.reward.failure_score = -1.0  # this, instead of a score
    ppo.reward.truncation = "terminal"  # of a response without EOS; or "bootstrap" with the critic's value
    ppo.reward.whiten = False  # rewards by their spread

    # Advantages.
    ppo.gamma = 1.0  # discount
    ppo.lam = 0.95  # λ of GAE
    ppo.whiten_advantages = True  # to mean 0, variance 1

    # Updates.
    ppo.ppo_epochs = 4  # passes over the experience
    ppo.num_minibatches = 4  # optimizer steps a pass
    # ppo.microbatch_size = 4  # rows whose activations exist at once, to score and to update; default: by the device
    ppo.loss.policy = "clip"  # PPO-clip; or "penalty"
    ppo.loss.clip_range = 0.2  # ε below 1, and above
    # ppo.loss.clip_range_high = 0.28  # ε above, where it differs
    # ppo.loss.dual_clip = 3.0  # caps the loss of bad actions
    ppo.loss.penalty_coef = 1.0  # first β of PPO-penalty
    ppo.loss.penalty_target = 0.01  # nats per token it adapts to
    ppo.loss.value_clip_range = 0.2  # ε of the value loss, in reward units
    ppo.loss.entropy_coef = 0.0  # bonus per nat of entropy
    # ppo.loss.entropy_target = 2.0  # nats per token, above which there is no bonus
    ppo.loss.ptx_coef = 0.0  # weight of the loss of data.ptx_paths' texts or the SFT data (PPO-ptx), per nat per token
    ppo.critic.warmup_iterations = 0  # in which only the critic learns
    # ppo.limits.target_kl = 0.1  # nats per token; ends an iteration's updates, the critic's too
    # ppo.limits.kl = 50.0  # nats per response, past which the run stops
    # ppo.limits.ratio = 100.0  # the same for the largest probability ratio of an iteration
    ppo.limits.action = "stop"  # or "lower_lr": multiply the actor's learning rate each time by
    ppo.limits.lr_factor = 0.5  # this
    # ppo.actor.ema_decay = 0.992  # keeps a moving average of the actor, in <workdir>/ppo/model_ema
    # ppo.logprob_chunk = 64  # positions whose logits exist at once; default: by vocabulary and device

    ppo.actor.optimizer.learning_rate = 1e-6
    ppo.critic.optimizer.learning_rate = 5e-6
    return config
