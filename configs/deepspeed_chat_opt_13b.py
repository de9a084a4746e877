"""DeepSpeed-Chat's main result: OPT-13B actor and OPT-350M reward model on 8 GPUs of 80 GB.

    python -m jax_rlhf.plan --config=configs/deepspeed_chat_opt_13b.py --topology=h100:8
    python -m jax_rlhf --config=configs/deepspeed_chat_opt_13b.py --workdir=runs/opt-13b

Its blog reports 9 hours for all three steps on 8 × A100-80. This config was not run yet. docs/plan.md has the
compiler's memory figures. This file sets only the differences from configs/deepspeed_chat_opt.py, which also says how
to convert the checkpoints. DeepSpeed-Chat's run_13b.sh trains LoRA matrices of rank 128, with a learning rate of 5e-4.
Here all parameters train, with the learning rate of its smaller models.
"""

from ml_collections import ConfigDict

from jax_rlhf.cli.packaged import packaged_config


def get_config() -> ConfigDict:
    """The settings."""
    config = packaged_config("deepspeed_chat_opt")
    config.model.path = "opt-13b"
    config.data.sft_batch_size = 128
    config.sft.microbatch_size = 32
    config.data.ppo_batch_size = 128  # 16 per GPU
    config.ppo.microbatch_size = 32
    return config
