"""Llama-3-70B with a reward model cut from Llama-3-8B: SFT, reward model, PPO.

    python -m jax_rlhf --config=configs/llama3_70b.py --workdir=runs/llama3-70b

For a pod slice of 128 TPU v5p chips. It takes at most 27 of 95.7 GiB per device, according to `python -m jax_rlhf.plan
--config=configs/llama3_70b.py --topology=v5p:4x4x8` (docs/plan.md). Every machine runs the same command, which
launch/tpu_vm.sh and launch/gke_jobset.yaml start. The workdir must be on a file system that all machines share. This
config was not run yet. This file sets only the differences from configs/llama3_8b.py.
"""

from ml_collections import ConfigDict

from jax_rlhf.cli.packaged import packaged_config


def get_config() -> ConfigDict:
    """The settings."""
    config = packaged_config("llama3_8b")
    config.model.path = "meta-llama/Meta-Llama-3-70B-Instruct"
    config.reward.start_from = "meta-llama/Meta-Llama-3-8B-Instruct"  # has the same tokenizer
    config.mesh.tensor = 8
    config.data.sft_batch_size = 128
    config.data.ppo_batch_size = 256
    config.sft.microbatch_size = 32
    config.sft.optimizer.learning_rate = 5e-6
    config.ppo.actor.optimizer.learning_rate = 5e-7
    return config
