"""A reward model from preferences.

    python -m jax_rlhf --config=configs/reward.py --workdir=runs/reward \
        --config.model.path=HuggingFaceTB/SmolLM2-135M --config.sft_model_path=runs/sft/sft/model \
        --config.data.paths=preferences.jsonl

Rows are {"prompt", "chosen", "rejected"}, texts or chats. The result is runs/reward/reward/model: a sequence classifier
whose score, in torch too, is logits + config.reward_bias. The fields of `data`: configs/sft.py. Scores are
normalized on responses to PPO's prompts, sampled by `ppo.sampling`.
"""

from ml_collections import ConfigDict

from jax_rlhf.config import default_config


def get_config() -> ConfigDict:
    """The settings."""
    config = default_config()  # has every field, so that flags can set any
    config.phases = ("reward",)  # The phases to run: one or more of "sft", "reward" and "ppo", in this order.
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
    # reward.start_revision = None  # The revision of `start_from`, if it is a hub id.
    # reward.num_layers = None  # The number of its layers to keep, counted from the bottom; None = all.
    # The number of layers that are trained, counted from the top; None = all parameters.
    # reward.trainable_layers = None
    reward.epochs = 1.0  # Passes over the data, if `steps` is None. A second pass overfits.
    # reward.steps = None  # Optimizer steps; None = as many as `epochs` takes.
    # Pairs per forward and backward pass, summed over all devices; None = the whole batch.
    # reward.microbatch_size = None
    reward.eval_every = 0  # Steps between evaluations on held-out pairs; 0 = only after the last step.
    # The ranking loss: "bradley_terry" on the scores of whole answers, or "token", DeepSpeed-Chat's loss on the value
    # of each token.
    reward.loss = "bradley_terry"
    # The comparisons: "pairs" compares each chosen answer with its own rejected one; "all" with every rejected answer
    # of the batch, for texts with labels.
    reward.compare = "pairs"
    # reward.head_learning_rate = None  # The learning rate of the scalar head; None = `optimizer.learning_rate`.
    # The number of responses of the SFT policy on which scores are normalized to mean 0 and standard deviation 1; 0 =
    # no normalization.
    reward.normalize_rows = 256
    _reward_optimizer(reward.optimizer)


def _reward_optimizer(optimizer: ConfigDict) -> None:
    """The optimizer."""
    optimizer.learning_rate = 1e-05  # The peak learning rate.
    # The learning rate after the warm-up: "constant", or a "linear" or "cosine" decay to `final_fraction`.
    optimizer.schedule = "linear"
    # Optimizer steps of linear warm-up. The first step has the rate learning_rate / warmup_steps, not 0.
    optimizer.warmup_steps = 10
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
