"""PPO of an SFT policy against a reward model, or a Python function.

    python -m jax_rlhf --config=configs/ppo.py --workdir=runs/ppo \
        --config.model.path=HuggingFaceTB/SmolLM2-135M --config.sft_model_path=runs/sft/sft/model \
        --config.reward.path=runs/reward/reward/model --config.data.paths=prompts.jsonl

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
    # config.reward.path = "runs/reward/reward/model"  # default: <workdir>/reward/model, or functions alone
    # config.critic.path = …  # default: the reward model
    # config.critic.trainable_layers = 4  # what is frozen is shared with the reward model
    # config.critic.zero_head = True  # values start at 0, not with what the reward model says of unfinished responses
    # config.reference.path = …  # default: the SFT policy
    # config.reference.offload = True  # waits in host memory between uses; so can config.reward

    config.data.paths = ()
    config.data.ppo_batch_size = 64  # prompts an iteration, of all devices together
    config.data.max_prompt_tokens = 256  # longer prompts are left out and counted

    ppo = config.ppo
    ppo.iterations = 100  # each samples a batch of prompts and updates
    ppo.eval_every = 0  # iterations between evaluations on held-out prompts; 0: before and after only
    # ppo.eval_rows = 64  # of the held-out prompts, how many to answer, at most; default: data.eval_rows
    ppo.reward_functions = ()  # "package.module:function": f(prompts, responses, **columns) → scores, added
    ppo.eval_functions = ()  # the same, only reported
    ppo.sample_rows = 4  # of each iteration's responses into samples.jsonl
    ppo.time_phases = True  # report the time of sampling, scoring and training apart

    # Sampling.
    ppo.max_new_tokens = 128  # longest response
    ppo.min_new_tokens = 0  # no EOS before
    ppo.temperature = 1.0  # of sampling and of every log-prob
    ppo.top_k = 0  # leave top-k and top-p off in PPO: they sample from another distribution than log-probs are of
    ppo.top_p = 1.0
    # ppo.eos_ids = (2,)  # end a response; default: the tokenizer's and the checkpoint's
    # ppo.pad_id = 0  # stands after the end; default: the tokenizer's

    # Rewards.
    ppo.kl_coef = 0.05  # β: reward units per nat of KL to the reference
    ppo.kl_kind = "k1"  # log-ratio; "k2", "k3", "abs"
    ppo.kl_reduction = "sum"  # over a response; "mean": short responses do not pay less
    # ppo.kl_target = 6.0  # nats per response; β adapts to it
    ppo.kl_horizon = 10_000.0  # episodes over which it does
    # ppo.reward_clip = 5.0  # scores beyond ± this are clipped
    ppo.missing_eos_penalty = 0.0  # subtracted from responses that do not end
    ppo.reward_timeout = 600.0  # seconds that a call of a reward function may take
    ppo.reward_isolation = "none"  # "process": functions run in processes of their own, which cannot harm the run
    # ppo.reward_memory_gb = 8.0  # address space of each of these
    ppo.reward_retries = 2  # how often a call that failed, hung, or gave no numbers is repeated
    ppo.on_reward_failure = "fatal"  # and then; or "penalize": its responses get
    ppo.reward_failure_score = -1.0  # this, instead of a score
    ppo.truncation = "terminal"  # of a response without EOS; or "bootstrap" with the critic's value
    ppo.whiten_rewards = False  # rewards by their spread

    # Advantages.
    ppo.gamma = 1.0  # discount
    ppo.lam = 0.95  # λ of GAE
    ppo.whiten_advantages = True  # to mean 0, variance 1

    # Updates.
    ppo.ppo_epochs = 4  # passes over the experience
    ppo.num_minibatches = 4  # optimizer steps a pass
    # ppo.microbatch_size = 4  # rows whose activations exist at once, to score and to update; default: by the device
    ppo.policy_loss = "clip"  # PPO-clip; or "penalty"
    ppo.clip_range = 0.2  # ε below 1, and above
    # ppo.clip_range_high = 0.28  # ε above, where it differs
    # ppo.dual_clip = 3.0  # caps the loss of bad actions
    ppo.penalty_coef = 1.0  # first β of PPO-penalty
    ppo.penalty_target = 0.01  # nats per token it adapts to
    ppo.value_clip_range = 0.2  # ε of the value loss, in reward units
    ppo.entropy_coef = 0.0  # bonus per nat of entropy
    # ppo.entropy_target = 2.0  # nats per token, above which there is no bonus
    ppo.ptx_coef = 0.0  # weight of the loss of data.ptx_paths' texts or the SFT data (PPO-ptx), per nat per token
    ppo.critic_warmup_iterations = 0  # in which only the critic learns
    # ppo.target_kl = 0.1  # nats per token; ends an iteration's updates, the critic's too
    # ppo.kl_limit = 50.0  # nats per response, past which the run stops
    # ppo.ratio_limit = 100.0  # the same for the largest probability ratio of an iteration
    ppo.on_limit = "stop"  # or "lower_lr": multiply the actor's learning rate each time by
    ppo.limit_lr_factor = 0.5  # this
    # ppo.ema_decay = 0.992  # keeps a moving average of the actor, in <workdir>/ppo/model_ema
    # ppo.logprob_chunk = 64  # positions whose logits exist at once; default: by vocabulary and device

    ppo.actor_optimizer.learning_rate = 1e-6
    ppo.critic_optimizer.learning_rate = 5e-6
    return config
