"""A reward model from preferences.

    python -m jax_rlhf --config=configs/reward.py --workdir=runs/reward \
        --config.model.path=HuggingFaceTB/SmolLM2-135M --config.sft_model_path=runs/sft/sft/model \
        --config.data.paths=preferences.jsonl

Rows are {"prompt", "chosen", "rejected"}, texts or chats. The result is runs/reward/reward/model: a sequence classifier
whose score, in torch too, is logits + config.reward_bias. The fields of `data`: configs/sft.py. PPO's prompts and
lengths are those of the responses on which scores are normalised.
"""

from ml_collections import ConfigDict

from jax_rlhf.config import default_config


def get_config() -> ConfigDict:
    """The settings."""
    config = default_config()  # has every field, so that flags can set any
    config.phases = ("reward",)  # The phases to run, of "sft", "reward" and "ppo", in that order.
    # The checkpoint: a folder, a .gguf file or a hub id; None = the checkpoint of another model, or no model.
    config.model.path = "HuggingFaceTB/SmolLM2-135M"
    # The SFT policy, which the reward and PPO phases start from; None = <workdir>/sft/model.
    # config.sft_model_path = None
    # Each is a .jsonl, .json, .parquet or .csv file; a Hugging Face data set ("org/name" or "org/name:configuration"),
    # or a folder that `datasets` can load or has saved; or a reader, "FILE.py:function" or "package.module:function":
    # f(phase=…, split="train" | "eval") → rows as dicts.
    config.data.paths = ()
    config.data.reward_batch_size = 16  # Pairs per step (packed rows, with packing), over all devices.
    config.data.max_tokens = 512  # The longest prompt + completion of the SFT and reward phases, in tokens.
    # Several SFT texts share a row of max_tokens, and several reward pairs a row of 2 · max_tokens; they do not attend
    # to each other. The reward phase's token loss uses unpacked pairs regardless.
    config.data.packing = False
    _reward(config.reward)
    _ppo_sampling(config.ppo.sampling)
    return config


def _reward(reward: ConfigDict) -> None:
    """The reward phase."""
    # reward.start_from = None  # The checkpoint that the reward model starts from; None = the SFT phase's model.
    # reward.start_revision = None  # The revision of a hub id.
    # reward.num_layers = None  # How many of its layers to keep, from the bottom; None = all.
    # reward.trainable_layers = None  # How many layers train, counted from the top; None = all parameters train.
    reward.epochs = 1.0  # Passes over the data, where `steps` is None; a second one overfits.
    # reward.steps = None  # Optimizer steps; None = `epochs`.
    # Pairs whose activations exist at once, on all devices together; None = the whole batch.
    # reward.microbatch_size = None
    reward.eval_every = 0  # Steps between evaluations on held-out pairs; 0 = only after the last.
    reward.loss = "bradley_terry"  # "bradley_terry", on the scores of whole answers, or "token", DeepSpeed-Chat's.
    reward.compare = "pairs"  # "pairs", or "all": each chosen with every rejected of the batch, for texts with labels.
    # reward.head_learning_rate = None  # The learning rate of the scalar head; None = that of all parameters.
    # Responses of the SFT policy on which scores are brought to mean 0 and deviation 1; 0 = not.
    reward.normalize_rows = 256
    _reward_optimizer(reward.optimizer)


def _reward_optimizer(optimizer: ConfigDict) -> None:
    """The optimizer."""
    optimizer.learning_rate = 1e-05  # The highest learning rate of the schedule.
    # The learning rate after the warm-up: "constant", or down to `final_fraction` "linear" or as a "cosine".
    optimizer.schedule = "linear"
    # Optimizer steps over which the rate rises from learning_rate / warmup_steps; no step has rate 0.
    optimizer.warmup_steps = 10
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
