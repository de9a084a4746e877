"""Llama-3-70B with a reward model cut from Llama-3-8B: SFT, reward model, PPO.

    python -m jax_rlhf --config=configs/llama3_70b.py --workdir=runs/llama3-70b

For a pod slice of 128 TPU v5p chips: at most 27 of 95.7 GiB per device, says `python -m jax_rlhf.plan
--config=configs/llama3_70b.py --topology=v5p:4x4x8` (docs/plan.md). The command is the same on every machine, which
launch/tpu_vm.sh and launch/gke_jobset.yaml see to; the workdir must be on a file system that all share. Not run here:
the machine that this was written on has no accelerator. What differs from configs/llama3_8b.py is set here.
"""

from ml_collections import ConfigDict

from jax_rlhf.cli.packaged import packaged_config


def get_config() -> ConfigDict:
    """The settings."""
    config = packaged_config("llama3_8b")
    config.model.path = "meta-llama/Meta-Llama-3-70B-Instruct"
    config.reward.start_from = "meta-llama/Meta-Llama-3-8B-Instruct"  # of the same tokenizer
    config.mesh.tensor = 8
    config.data.sft_batch_size = 128
    config.data.ppo_batch_size = 256
    config.sft.microbatch_size = 32
    config.sft.optimizer.learning_rate = 5e-6
    config.ppo.actor.optimizer.learning_rate = 5e-7
    return config
