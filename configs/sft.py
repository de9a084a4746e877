"""Supervised fine-tuning of any causal language model on any data in TRL's formats.

    python -m jax_rlhf --config=configs/sft.py --workdir=runs/sft \
        --config.model.path=HuggingFaceTB/SmolLM2-135M --config.data.paths=my.jsonl

Rows are {"prompt", "completion"}, {"messages"} or {"text"}. The result is runs/sft/sft/model, a Hugging Face folder.
Every field of `data` and `model` is explained here; docs/data.md shows the formats.
"""

from ml_collections import ConfigDict

from jax_rlhf.config import default_config


def get_config() -> ConfigDict:
    """The settings."""
    config = default_config()  # has every field, so that flags can set any
    config.phases = ("sft",)  # The phases to run, any of "sft", "reward" and "ppo", in this order.
    config.seed = 0  # The seed of all random numbers.
    # The run stops after this many steps (PPO: iterations) in a row whose update was not finite and was skipped.
    config.max_bad_steps = 5
    # Stops at the first NaN, at the first implicit transfer between host and devices, and at an invalid experience;
    # writes checkpoints synchronously. Slower.
    config.debug = False
    _checkpoint(config.checkpoint)
    _watchdog(config.watchdog)
    _log(config.log)
    _mesh(config.mesh)
    _rollout_mesh(config.rollout_mesh)
    _model(config.model)
    _data(config.data)
    _sft(config.sft)
    return config


def _checkpoint(checkpoint: ConfigDict) -> None:
    """When checkpoints are written, and which are kept."""
    checkpoint.every = 0  # Steps (PPO: iterations) between checkpoints; 0 = only by time.
    # Minutes between checkpoints; None = only by steps. The end of a phase and a requested stop always write one.
    checkpoint.minutes = 15.0
    checkpoint.keep = 2  # How many of the latest checkpoints are kept.
    checkpoint.keep_every = 0  # Checkpoints of steps that are multiples of this are kept too; 0 = none.
    # An evaluation metric, such as "eval/score": the checkpoint with its best value is kept too; None = none.
    # checkpoint.best = None
    # Whether the highest ("max") or the lowest ("min") value is best; None = "min" for metrics named loss or
    # perplexity, "max" for others.
    # checkpoint.best_mode = None


def _watchdog(watchdog: ConfigDict) -> None:
    """When a run counts as stuck, and what happens then."""
    # A run counts as stuck after this many times the median duration of the phase's latest steps.
    watchdog.factor = 20.0
    # The least time without activity, in minutes. The first step of each batch width compiles, which takes long.
    watchdog.minutes = 30.0
    # "exit": exit with code 75, after which launch scripts restart the run; "warn": warn and wait; "off".
    watchdog.action = "exit"


def _log(log: ConfigDict) -> None:
    """Where metrics are logged, besides metrics.jsonl."""
    log.tensorboard = True  # Write TensorBoard files to <workdir>/<phase>/tensorboard.
    # log.wandb_project = None  # The project in Weights & Biases, which must be installed; None = not logged there.
    log.table_rows = 4  # Held-out prompts whose responses before and after PPO are printed at the end.


def _mesh(mesh: ConfigDict) -> None:
    """The number of devices along each mesh axis."""
    mesh.data = 1  # Replicas of the model, each with its own rows. Each of several TPU slices has replicas of its own.
    mesh.fsdp = -1  # Shards of the rows, and of parameters along the model width.
    mesh.tensor = 1  # Shards of heads, MLP width and vocabulary.
    mesh.rules = ()  # Overrides of the table in `parallel/layout.py`, each "logical=mesh+mesh".


def _rollout_mesh(rollout_mesh: ConfigDict) -> None:
    """The mesh for sampling, on the same devices; by default chosen from the model's sizes."""
    # rollout_mesh.data = None  # As in `MeshConfig`; None = 1 if another size is set.
    # rollout_mesh.fsdp = None  # As in `MeshConfig`; None = 1 if another size is set.
    # rollout_mesh.tensor = None  # As in `MeshConfig`; None = 1 if another size is set.


def _model(model: ConfigDict) -> None:
    """The policy. The SFT phase starts from `path`; the reward phase and the checks use its tokenizer."""
    # The checkpoint: a folder, a .gguf file or a hub id; None = the checkpoint of another model, or no model.
    model.path = "HuggingFaceTB/SmolLM2-135M"
    # model.revision = None  # The revision of a hub id.
    # The number of layers that are trained, counted from the top; None = all parameters. `model.trainable_layers` is
    # that of SFT and of the actor in PPO, `critic.trainable_layers` is that of the critic. The reference and the reward
    # model are frozen, so theirs must be None.
    # model.trainable_layers = None
    # "float32" or "bfloat16", the dtype of computation and of saved models; None = bfloat16 on GPU and TPU, float32 on
    # CPU.
    # model.dtype = None
    # What the backward pass recomputes: "none", "full" or "dots"; None = "dots" on CPU, where it is as fast as "none"
    # and needs less memory, and "full" elsewhere.
    # model.remat = None
    # "xla", or "flash" on GPU (cuDNN) and TPU (splash attention), which stores no T × T scores; None = "xla".
    # model.attention = None


def _data(data: ConfigDict) -> None:
    """The data of all phases."""
    # Each is a .jsonl, .json, .csv or .tsv file (also with .gz), or a .parquet or .arrow file; a Hugging Face data set
    # ("org/name" or "org/name:configuration"), or a folder that `datasets` can load or has saved; or a reader,
    # "FILE.py:function" or "package.module:function": f(phase=…, split="train" | "eval") → rows as dicts.
    data.paths = ()
    # Texts for the pretraining loss in PPO (`ppo.loss.ptx_coef`); empty = the texts of the SFT phase from `paths`.
    data.ptx_paths = ()
    data.weights = ()  # The weight of each path in the mixture; empty = the number of its rows.
    # Held-out rows; empty = the rows that a reader returns for "eval", and `eval_rows` rows of every other path. No
    # held-out prompt is trained on, in any phase (docs/data.md says what a prompt is).
    data.eval_paths = ()
    data.split = "train"  # The split of a Hugging Face data set, for `paths`.
    data.eval_split = "test"  # The same for `eval_paths`.
    # data.revision = None  # The revision of a Hugging Face data set.
    # Shares of each path for SFT, reward and PPO, such as "2,4,4". The seed assigns each prompt to one phase; "" = each
    # phase gets all rows.
    data.data_split = ""
    # The largest number of held-out rows per path and phase. From `paths` whole prompts are held out, at most a tenth
    # of the rows and of the prompts in the phase's share.
    data.eval_rows = 256
    data.prompt_column = "prompt"  # The name of the column with prompts.
    data.completion_column = "completion"  # The column of completions.
    data.chosen_column = "chosen"  # The column of the preferred answers.
    data.rejected_column = "rejected"  # The column of the dispreferred answers.
    data.text_column = "text"  # The column of plain texts.
    data.messages_column = "messages"  # The column of chats.
    data.margin_column = "margin"  # The column of margins, by how much the chosen answer is better (in reward units).
    data.label_column = "label"  # The column of labels; a completion with a false label is not learned.
    data.tools_column = "tools"  # The column of the tools that the assistant may call, for the chat template.
    data.max_prompt_tokens = 256  # The longest prompt of the PPO phase, in tokens.
    data.max_tokens = 512  # The longest prompt + completion of the SFT and reward phases, in tokens.
    # Longer rows are left out and counted ("filter"), or cut ("truncate"): prompts on the left, completions on the
    # right.
    data.too_long = "filter"
    # A row with an empty completion, with equal chosen and rejected answers, or with an answer of which the chat
    # template omits a part, raises an "error", or is left out and counted ("drop").
    data.on_bad_row = "error"
    # Plain-text prompts and answers become messages of the user and the assistant, and are rendered with the
    # tokenizer's chat template.
    data.as_chat = False
    # The text of a special token in a row, such as <|im_end|>, is tokenized as that token; set this for data that a
    # chat template has already rendered. Otherwise it is tokenized as text, and cannot open or end a turn.
    data.parse_special_tokens = False
    # Prompts of the PPO phase are the first so many tokens of `text` (or of `prompt`); None = whole prompts. Shorter
    # ones are left out and counted. In all phases, rows with the same first tokens have the same prompt.
    # data.prompt_tokens = None
    # Of equal rows one is kept; rows of `paths` are not trained on if their prompt is in `eval_paths` or in a reader's
    # "eval" rows.
    data.deduplicate = True
    # The pad token for a tokenizer that has none; any token will do, since masks are made from lengths.
    # data.pad_token = None
    data.sft_batch_size = 16  # Rows per step (packed rows, with packing), over all devices.
    data.reward_batch_size = 16  # Pairs per step (packed rows, with packing), over all devices.
    data.ppo_batch_size = 64  # Prompts per iteration, over all devices.
    # Several SFT texts share a row of max_tokens, and several reward pairs a row of 2 · max_tokens; they do not attend
    # to each other. The reward phase's token loss uses unpacked pairs regardless.
    data.packing = False
    # Widths to which batches are padded, in tokens; empty = a quarter, a half and all of the longest allowed.
    data.length_buckets = ()
    data.prefetch = 2  # Batches that are made ahead of their use.


def _sft(sft: ConfigDict) -> None:
    """The SFT phase."""
    sft.epochs = 1.0  # Passes over the data, if `steps` is None.
    # sft.steps = None  # Optimizer steps; None = as many as `epochs` takes.
    sft.loss_on = "completion"  # The tokens in the loss: those of the "completion", or "all", prompts included.
    # Rows that are differentiated at once, on all devices in total; None = the whole batch.
    # sft.microbatch_size = None
    sft.eval_every = 0  # Steps between evaluations on held-out rows; 0 = only before the first and after the last step.
    sft.sample_rows = 8  # Held-out prompts to which the trained model writes responses, for samples.jsonl; 0 = none.
    sft.sample_tokens = 64  # The longest of these responses, in tokens.
    _sft_optimizer(sft.optimizer)


def _sft_optimizer(optimizer: ConfigDict) -> None:
    """The optimizer."""
    optimizer.learning_rate = 2e-05  # The peak learning rate.
    # The learning rate after warm-up: "constant", or a "linear" or "cosine" decay to `final_fraction`.
    optimizer.schedule = "cosine"
    # Optimizer steps of linear warm-up. The first has rate learning_rate / warmup_steps, so no step has rate 0.
    optimizer.warmup_steps = 10
    # The step (iterations × epochs × minibatches) at which "linear" and "cosine" end; None = the phase's last step, for
    # phases of `python -m jax_rlhf`. Skipped steps (not finite, or beyond `target_kl`) count too. The actor's steps are
    # counted from the end of the critic's warm-up.
    # optimizer.total_steps = None
    optimizer.final_fraction = 0.1  # The final learning rate, as a fraction of `learning_rate`.
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
