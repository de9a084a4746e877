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
    config = default_config()  # has every field, so that flags can set any: --config.sft.epochs=3
    config.phases = ("sft",)  # of "sft", "reward", "ppo"
    config.seed = 0  # of everything random: data order, new heads, samples
    config.checkpoint.minutes = 15.0  # after so long comes the next one; None: by steps alone
    config.checkpoint.every = 0  # steps (PPO: iterations) between checkpoints; 0: by time alone
    config.checkpoint.keep = 2  # the last so many
    config.checkpoint.keep_every = 0  # those of steps that this divides stay as well
    # config.checkpoint.best = "eval/loss"  # the one where this was best is saved, and stays as well; needs eval_every
    # config.checkpoint.best_mode = "min"  # the lowest is best, or "max"; default: of a loss or perplexity the lowest
    config.watchdog.factor = 20.0  # a run stands still if nothing is done for so many times a step's time (the median),
    config.watchdog.minutes = 30.0  # and for so long; then all threads' stacks are written, and
    config.watchdog.action = "exit"  # it ends with code 75, to be started again; or "warn", "off"
    config.max_bad_steps = 5  # steps in a row that are not finite, and left out, before the run stops
    config.debug = False  # stop at the first NaN and say where; slower

    config.log.tensorboard = True  # files under <workdir>/sft/tensorboard
    # config.log.wandb_project = "my-project"  # Weights & Biases too, if it is installed
    config.log.table_rows = 4  # samples shown on the screen

    mesh = config.mesh  # how many devices lie along each axis; one of them may be -1, the rest
    mesh.data = 1  # copies of everything (with -1, what pmap did)
    mesh.fsdp = -1  # rows, and parameters cut along their width
    mesh.tensor = 1  # heads, MLP width, vocabulary
    mesh.rules = ()  # lines of the table in jax_rlhf/parallel/layout.py that differ: "mlp=tensor+fsdp", "embed="
    # config.rollout_mesh.tensor = 8  # another form to sample in, with .data and .fsdp; default: chosen by the model

    model = config.model  # the policy
    model.path = "HuggingFaceTB/SmolLM2-135M"  # folder, .gguf file or hub id
    # model.revision = "main"  # of a hub id
    # model.trainable_layers = 10  # from the top, the rest is frozen and shared; default: all parameters train
    # model.dtype = "bfloat16"  # of computing and saved models; default: bfloat16 on GPU and TPU, float32 on CPU
    # model.remat = "full"  # what the backward pass computes again: "none", "dots", "full"; default: by the device
    # model.attention = "flash"  # holds no scores: cuDNN on GPU, splash on TPU; for long texts; default: "xla"

    data = config.data
    data.paths = ()  # .jsonl, .json, .parquet, .csv files, data set ids, "package.module:function" readers
    data.ptx_paths = ()  # texts of PPO's pretraining loss (ppo.loss.ptx_coef); empty: what the SFT phase learns
    data.weights = ()  # the share of each path in the mixture; empty: by size
    data.eval_paths = ()  # held-out rows; empty: eval_rows of each path's (a reader gives its own)
    data.eval_rows = 256  # held out at most: whole prompts, never more than a tenth of each path
    data.split = "train"  # of a Hugging Face data set, for paths
    data.eval_split = "test"  # the same for eval_paths
    # data.revision = "main"  # of a Hugging Face data set
    data.data_split = ""  # "2,4,4": shares of each path for SFT, reward and PPO, no prompt in two; empty: all to each
    data.prompt_column = "prompt"  # columns, as they are called in the data
    data.completion_column = "completion"
    data.chosen_column = "chosen"
    data.rejected_column = "rejected"
    data.text_column = "text"
    data.messages_column = "messages"
    data.margin_column = "margin"
    data.label_column = "label"  # a completion whose label is false is not learned
    data.tools_column = "tools"  # what the assistant may call, for the chat template
    data.max_tokens = 512  # longest prompt + completion
    data.max_prompt_tokens = 256  # longest prompt of PPO, and what truncation leaves of one
    data.too_long = "filter"  # leave longer rows out and count them, or "truncate": prompts left, completions right
    data.on_bad_row = "error"  # at an empty answer, chosen = rejected, an answer that the template cuts; or "drop" them
    data.as_chat = False  # write plain prompts and answers with the tokenizer's chat template
    data.parse_special_tokens = False  # read <|im_end|> and its like in rows as tokens: for data templated beforehand
    # data.prompt_tokens = 8  # PPO's prompts are the first so many tokens of a text
    data.deduplicate = True  # of rows that are alike, one stays; prompts of eval_paths are not trained on
    # data.pad_token = "<|endoftext|>"  # for a tokenizer without one; any will do
    data.sft_batch_size = 16  # rows per step, of all devices together
    data.packing = False  # several texts share a row, without seeing each other
    data.length_buckets = ()  # widths that batches are padded to; empty: quarter, half, whole of max_tokens
    data.prefetch = 2  # batches made ahead

    sft = config.sft
    sft.epochs = 1.0  # passes over the data
    # sft.steps = 1000  # optimizer steps, instead
    sft.loss_on = "completion"  # or "all": prompts too
    # sft.microbatch_size = 4  # rows whose activations exist at once; changes memory, not the result
    sft.eval_every = 0  # steps between evaluations; 0: before and after only
    sft.sample_rows = 8  # held-out prompts that the result answers, into samples.jsonl
    sft.sample_tokens = 64  # longest of those answers

    optimizer = sft.optimizer  # AdamW
    optimizer.learning_rate = 2e-5  # the highest
    optimizer.schedule = "cosine"  # then down to final_fraction: "cosine", "linear"; or "constant"
    optimizer.warmup_steps = 10  # up to it; no step has rate 0
    # optimizer.total_steps = 1000  # where the schedule ends; default: with the phase
    optimizer.final_fraction = 0.1  # of learning_rate, at the end
    optimizer.beta1 = 0.9
    optimizer.beta2 = 0.95
    optimizer.eps = 1e-8
    optimizer.eps_form = "pytorch"  # or "tensorflow": ε outside the bias correction
    optimizer.weight_decay = 0.0  # of matrices, decoupled
    optimizer.max_grad_norm = 1.0  # clips the gradient's global norm
    optimizer.first_moment_dtype = "float32"  # "bfloat16" saves 2 bytes per parameter
    return config
