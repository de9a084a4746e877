"""Llama-3-8B: SFT, an 8B reward model, PPO.

    python -m jax_rlhf --config=configs/llama3_8b.py --workdir=runs/llama3-8b

For 8 GPUs of 80 GB (launch/gpu.sh) or 8 TPU v5p chips (launch/tpu_vm.sh). It takes at most 40 of 72.8 GiB or 42 of 95.7
GiB per device, according to `python -m jax_rlhf.plan --config=configs/llama3_8b.py --topology=h100:8` (or v5p:2x2x2;
docs/plan.md). This config was not run yet. The data set's rows are chats, which the Instruct checkpoint's template
turns into texts.
"""

from ml_collections import ConfigDict

from jax_rlhf.config import default_config


def get_config() -> ConfigDict:
    """The settings."""
    config = default_config()
    config.model.path = "meta-llama/Meta-Llama-3-8B-Instruct"
    config.data.paths = ("trl-lib/ultrafeedback_binarized",)
    config.data.pad_token = "<|end_of_text|>"  # Llama 3 has no pad token
    config.data.data_split = "2,4,4"
    config.data.max_prompt_tokens = 512
    config.data.max_tokens = 1024
    config.data.on_bad_row = "drop"
    config.data.sft_batch_size = 64
    config.data.reward_batch_size = 64
    config.data.ppo_batch_size = 128
    config.data.packing = True

    config.sft.microbatch_size = 16
    config.sft.optimizer.learning_rate = 1e-5
    config.sft.optimizer.schedule = "cosine"
    config.sft.optimizer.warmup_steps = 20

    config.reward.microbatch_size = 16
    config.reward.optimizer.learning_rate = 5e-6
    config.reward.optimizer.schedule = "linear"
    config.reward.optimizer.warmup_steps = 20

    ppo = config.ppo
    ppo.iterations = 300
    ppo.sampling.max_new_tokens = 512
    ppo.sampling.temperature = 1.0
    ppo.kl.coef = 0.05
    ppo.reward.missing_eos_penalty = 1.0
    ppo.ppo_epochs = 2
    ppo.num_minibatches = 4
    ppo.actor.optimizer.learning_rate = 1e-6
    ppo.actor.optimizer.warmup_steps = 10
    ppo.critic.optimizer.learning_rate = 5e-6
    ppo.critic.optimizer.warmup_steps = 10
    return config
