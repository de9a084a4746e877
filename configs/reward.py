"""A reward model from preferences.

    python -m jax_rlhf --config=configs/reward.py --workdir=runs/reward \
        --config.model.path=HuggingFaceTB/SmolLM2-135M --config.sft_model_path=runs/sft/sft/model \
        --config.data.paths=preferences.jsonl

Rows are {"prompt", "chosen", "rejected"}, texts or chats. The result is runs/reward/reward/model: a sequence classifier
whose score, in torch too, is logits + config.reward_bias. The fields of `data` and of optimizers: configs/sft.py.
"""

from ml_collections import ConfigDict

from jax_rlhf.config import default_config


def get_config() -> ConfigDict:
    """The settings."""
    config = default_config()
    config.phases = ("reward",)  # of "sft", "reward", "ppo"
    config.model.path = "HuggingFaceTB/SmolLM2-135M"  # whose tokenizer is used
    # config.sft_model_path = "runs/sft/sft/model"  # default: <workdir>/sft/model
    config.data.paths = ()
    config.data.reward_batch_size = 16  # pairs a step, of all devices together
    config.data.max_tokens = 512  # longest prompt + answer
    config.data.packing = False  # several pairs share a row of 2 · max_tokens, without seeing each other

    reward = config.reward
    # reward_model.path = "HuggingFaceTB/SmolLM2-135M"  # starts as this; default: the SFT policy
    # reward_model.revision = "main"  # of a hub id
    # reward.num_layers = 8  # keep so many of its layers, from the bottom; default: all
    # reward.trainable_layers = 4  # from the top; default: all parameters train
    reward.epochs = 1.0  # passes over the data; a second one overfits
    # reward.steps = 1000  # optimizer steps, instead
    # reward.microbatch_size = 4  # pairs whose activations exist at once; changes memory, not the result
    reward.eval_every = 0  # steps between evaluations; 0: after the last only
    reward.loss = "bradley_terry"  # on whole answers; or "token": DeepSpeed-Chat's, from where the two differ
    reward.compare = "pairs"  # or "all": each chosen with every rejected of a batch, for texts with labels
    # reward.head_learning_rate = 1e-4  # of the new head; default: as all else
    reward.normalize_rows = 256  # SFT responses on which scores are brought to mean 0, deviation 1; 0: not

    reward.optimizer.learning_rate = 1e-5
    reward.optimizer.schedule = "linear"
    reward.optimizer.warmup_steps = 10
    # What those responses are: PPO's prompts and lengths.
    config.ppo.sampling.max_new_tokens = 128  # longest
    config.ppo.sampling.temperature = 1.0  # of sampling
    return config
