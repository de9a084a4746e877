"""A reward model from preferences.

    python -m jax_rlhf --config=configs/reward.py --workdir=runs/reward \
        --config.model.path=HuggingFaceTB/SmolLM2-135M --config.sft_model_path=runs/sft/sft/model \
        --config.data.paths=preferences.jsonl

Rows are {"prompt", "chosen", "rejected"}, texts or chats. The result is runs/reward/reward/model: a sequence classifier
whose score, in torch too, is logits + model.config.reward_bias. The fields of `data`: configs/sft.py. Scores are
normalized on responses to PPO's prompts, sampled by `ppo.sampling`.
"""

from ml_collections import ConfigDict

from jax_rlhf.config import default_config


def get_config() -> ConfigDict:
    """The settings."""
    config = default_config()  # has every field, so that flags can set any
    config.phases = ("reward",)  # The phases to run, any of "sft", "reward" and "ppo", in this order.
    # The checkpoint: a folder, a .gguf file or a hub id; None = the checkpoint of another model, or no model.
    config.model.path = "HuggingFaceTB/SmolLM2-135M"
    # The SFT policy, from which the reward and PPO phases start; None = <workdir>/sft/model.
    # config.sft_model_path = None
    # Each is a .jsonl, .json, .csv or .tsv file (also with .gz), or a .parquet or .arrow file; a Hugging Face data set
    # ("org/name" or "org/name:configuration"), or a folder that `datasets` can load or has saved; or a reader,
    # "FILE.py:function" or "package.module:function": f(phase=…, split="train" | "eval") → rows as dicts.
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
    # reward.start_from = None  # The checkpoint from which the reward model starts; None = the SFT phase's model.
    # reward.start_revision = None  # The revision of `start_from`, if it is a hub id.
    # reward.num_layers = None  # The number of layers to keep, counted from the bottom; None = all.
    # The number of layers that are trained, counted from the top; None = all parameters.
    # reward.trainable_layers = None
    reward.epochs = 1.0  # Passes over the data, if `steps` is None; a second pass overfits.
    # reward.steps = None  # Optimizer steps; None = as many as `epochs` takes.
    # Pairs that are differentiated at once, on all devices in total; None = the whole batch.
    # reward.microbatch_size = None
    reward.eval_every = 0  # Steps between evaluations on held-out pairs; 0 = only after the last step.
    # "bradley_terry", on the scores of complete answers; or "token", DeepSpeed-Chat's loss per token.
    reward.loss = "bradley_terry"
    # "pairs": the two answers of a pair; "all": each chosen answer with every rejected one of the batch, for labelled
    # texts.
    reward.compare = "pairs"
    # reward.head_learning_rate = None  # The learning rate of the scalar head; None = that of the other parameters.
    # Responses of the SFT policy on which scores are normalised to mean 0 and standard deviation 1; 0 = no
    # normalisation.
    reward.normalize_rows = 256
    _reward_optimizer(reward.optimizer)


def _reward_optimizer(optimizer: ConfigDict) -> None:
    """The optimizer."""
    optimizer.learning_rate = 1e-05  # The peak learning rate.
    # The learning rate after warm-up: "constant", or a "linear" or "cosine" decay to `final_fraction`.
    optimizer.schedule = "linear"
    # Optimizer steps of linear warm-up. The first has rate learning_rate / warmup_steps, so no step has rate 0.
    optimizer.warmup_steps = 10
    # The step (iterations × epochs × minibatches) at which "linear" and "cosine" end; None = the phase's last step, for
    # phases of `python -m jax_rlhf`. Skipped steps (not finite, or beyond `target_kl`) count too. The actor's steps are
    # counted from the end of the critic's warm-up.
    # optimizer.total_steps = None
    optimizer.final_fraction = 0.0  # The final learning rate, as a fraction of `learning_rate`.
    optimizer.beta1 = 0.9  # Decay of Adam's first moment.
    optimizer.beta2 = 0.95  # Decay of Adam's second moment.
    optimizer.eps = 1e-08  # Adam's ε.
    # "pytorch": m̂ / (√v̂ + ε); "tensorflow": ε outside the bias correction, m̂ / (√v̂ + ε / √(1 − β₂ᵗ)), with smaller
    # first steps if gradients are tiny.
    optimizer.eps_form = "pytorch"
    optimizer.weight_decay = 0.0  # Decoupled weight decay of matrices; norms and biases have none.
    optimizer.max_grad_norm = 1.0  # Clips the global norm of the gradient to this; None = no clipping.
    # The dtype of Adam's first moment; "bfloat16" saves 2 bytes per parameter.
    optimizer.first_moment_dtype = "float32"


def _ppo_sampling(sampling: ConfigDict) -> None:
    """How responses are sampled."""
    sampling.max_new_tokens = 128  # The longest response, in tokens.
    sampling.min_new_tokens = 0  # EOS is not drawn before a response has this many tokens.
    sampling.temperature = 1.0  # τ > 0, by which logits are divided, in sampling and in every log-prob.
    # Draws from the k most likely tokens; 0 = all, 1 = greedy. Leave it off in PPO: log-probs are of the unfiltered
    # softmax, so ratios would refer to another distribution than the sampled one. `val/kept_mass` measures the gap.
    sampling.top_k = 0
    # Draws from the smallest set of most likely tokens with at least this probability; 1 = all. Leave it off in PPO,
    # like `top_k`.
    sampling.top_p = 1.0
    # Ids of tokens that end a response; None = those of the tokenizer and of the checkpoint's generation_config
    # (`jax_rlhf.sample`: none).
    # sampling.eos_ids = None
    # The id after the end of a response; None = the tokenizer's pad token, or else an EOS (`jax_rlhf.sample`: 0).
    # sampling.pad_id = None
