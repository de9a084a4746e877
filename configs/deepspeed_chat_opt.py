r"""DeepSpeed-Chat's OPT-1.3B actor and OPT-350M reward model, with its hyper-parameters.

    python -m jax_rlhf --config=configs/deepspeed_chat_opt.py --workdir=runs/opt --config.data.paths=Dahoas/rm-static

facebook/opt-1.3b and opt-350m exist only as pickled weights, which this package never reads. Convert each once, with
torch:

    python -c "import transformers as t; name, folder = 'facebook/opt-1.3b', 'opt-1.3b'; \
        t.AutoModelForCausalLM.from_pretrained(name).save_pretrained(folder); \
        t.AutoTokenizer.from_pretrained(name).save_pretrained(folder)"

and the same for opt-350m. This config was not run here, because it needs accelerators. DeepSpeed-Chat reports SFT
perplexity 2.02 after epoch 1, reward-model accuracy 0.49 → 0.70, and PPO reward 0.05 → 4.4 over 477 steps. The values
are those of its scripts for one node of 8 GPUs (run_1.3b.sh, run_350m.sh, run_1.3b.sh of steps 1 to 3). A comment marks
each value that differs.
"""

from ml_collections import ConfigDict

from jax_rlhf.config import default_config


def get_config() -> ConfigDict:
    """The settings."""
    config = default_config()
    config.model.path = "opt-1.3b"
    config.data.paths = ("Dahoas/rm-static",)  # DeepSpeed-Chat's steps 1 and 2 also use other data sets
    config.data.data_split = "2,4,4"
    config.data.max_prompt_tokens = 256
    config.data.max_tokens = 512
    config.data.on_bad_row = "drop"  # the data set has some empty and some identical answers
    config.data.sft_batch_size = 64
    config.data.reward_batch_size = 64
    config.data.ppo_batch_size = 64

    config.sft.epochs = 16.0
    config.sft.loss_on = "all"  # as in DeepSpeed-Chat: the labels are the whole text
    config.sft.microbatch_size = 16
    config.sft.optimizer.learning_rate = 9.65e-6
    config.sft.optimizer.schedule = "cosine"

    config.reward.start_from = "opt-350m"
    config.reward.loss = "token"
    config.reward.epochs = 1.0
    config.reward.microbatch_size = 16
    config.reward.optimizer.learning_rate = 5e-5
    config.reward.optimizer.schedule = "cosine"
    config.reward.optimizer.weight_decay = 0.1
    config.reward.normalize_rows = 0  # DeepSpeed-Chat clips scores instead of normalising them

    ppo = config.ppo
    ppo.iterations = 477  # of 64 prompts: one epoch
    ppo.sampling.max_new_tokens = 256
    ppo.kl.coef = 0.1
    ppo.reward.clip = 5.0
    ppo.lam = 0.95
    ppo.ppo_epochs = 1  # as DeepSpeed-Chat's README recommends
    ppo.num_minibatches = 1
    ppo.microbatch_size = 16
    ppo.whiten_advantages = False  # DeepSpeed-Chat does not whiten
    ppo.actor.optimizer.learning_rate = 9.65e-6
    ppo.actor.optimizer.schedule = "cosine"
    ppo.actor.optimizer.warmup_steps = 100
    ppo.critic.optimizer.learning_rate = 5e-6
    ppo.critic.optimizer.schedule = "cosine"
    ppo.critic.optimizer.warmup_steps = 100
    ppo.actor.ema_decay = 0.992
    # ppo.loss.ptx_coef = 27.8  # DeepSpeed-Chat's --unsup_coef, which its README calls unstable
    return config
