"""What can be known to fail before anything runs: settings, data, checkpoints and the workdir of every phase."""

from pathlib import Path

from jax_rlhf.data import DataError, create_datasets, imported
from jax_rlhf.hub import describe_pretrained
from jax_rlhf.models.config import DecoderConfig
from jax_rlhf.parallel import create_mesh, row_shards
from jax_rlhf.phases.config import RunConfig
from jax_rlhf.phases.supervised import microbatches
from jax_rlhf.phases.workdir import WorkdirError, reward_model, sft_model, status


def check_run(config: RunConfig, workdir: Path, *, overwrite: bool) -> None:
    """Stops a run that would fail later.

    Args:
      config: the run's settings.
      workdir: its folder.
      overwrite: what the phases left in the workdir will be deleted.

    Raises:
      ValueError, FileNotFoundError, CheckpointError, DataError, WorkdirError: says what, where, and how to mend it.
    """
    phases = [phase for phase in config.phases if overwrite or status(workdir, phase) != "finished"]
    for phase in phases:
        if not overwrite and status(workdir, phase) == "interrupted":
            raise WorkdirError(
                f"{workdir / phase} holds a {phase} phase that did not finish. --overwrite repeats it from its start; "
                "another --workdir leaves it as it is."
            )
    if not phases:
        return
    if config.model.path is None:
        raise ValueError("config.model.path is not set; it names the checkpoint: --config.model.path=FOLDER_OR_HUB_ID")
    _check_inputs(config, workdir, phases)
    decoder, tokenizer = describe_pretrained(config.model.path, revision=config.model.revision)
    if tokenizer is None:
        raise DataError(f"{config.model.path} came without a tokenizer; put its files into the same folder.")
    _check_layers(config, decoder)
    _check_vocabularies(config, tokenizer)
    _check_batches(config, phases)
    for name in (*config.ppo.reward_functions, *config.ppo.eval_functions):
        imported(name, "config.ppo.reward_functions or eval_functions")
    needed = dict.fromkeys(phases)
    if "reward" in phases and config.reward_training.normalize_rows:
        needed["ppo"] = None  # its prompts are answered, to normalise scores
    for phase in list(needed)[1:]:  # the first one's own start does it
        create_datasets(config.data_of(phase), tokenizer, phase, seed=config.seed)


def _check_inputs(config: RunConfig, workdir: Path, phases: list[str]) -> None:
    """A phase's input is another phase's result, or a path."""
    reads_policy = {"reward": not config.reward_training.path or config.reward_training.normalize_rows > 0, "ppo": True}
    if "sft" not in phases and any(reads_policy[phase] for phase in phases):
        describe_pretrained(sft_model(config, workdir))
    if "ppo" in phases and "reward" not in phases:
        path = reward_model(config, workdir)
        if path is not None:
            describe_pretrained(path, revision=config.reward.revision)


def _check_layers(config: RunConfig, decoder: DecoderConfig) -> None:
    kept = config.reward_training.num_layers
    for field, value, layers in (
        ("model.trainable_layers", config.model.trainable_layers, decoder.num_layers),
        ("reward_training.num_layers", kept, decoder.num_layers),
        ("reward_training.trainable_layers", config.reward_training.trainable_layers, kept or decoder.num_layers),
    ):
        if value is not None and not 1 <= value <= layers:
            raise ValueError(f"config.{field}={value} must lie within 1 and the model's {layers} layers.")


def _check_vocabularies(config: RunConfig, tokenizer: object) -> None:
    """Token ids go from the policy to the reward model and the critic: they must mean the same there."""
    paths = {
        "reward.path": config.reward.path,
        "critic.path": config.critic.path,
        "reference.path": config.reference.path,
        "reward_training.path": config.reward_training.path,
        "sft_model_path": config.sft_model_path,
    }
    for field, path in paths.items():
        if path is None or path == config.model.path:
            continue
        decoder, other = describe_pretrained(path)
        if decoder.vocab_size < len(tokenizer) or (other is not None and other.get_vocab() != tokenizer.get_vocab()):
            raise ValueError(
                f"config.{field}={path} has another vocabulary than config.model.path={config.model.path}: token ids "
                "are carried from one to the other. Take a model of the same tokenizer; a model of another one can "
                "score texts as a function: config.ppo.reward_functions."
            )


def _check_batches(config: RunConfig, phases: list[str]) -> None:
    mesh = create_mesh(config.mesh)
    if "sft" in phases:
        microbatches(config.data.sft_batch_size, config.sft.microbatch_size, mesh, "sft")
    if "reward" in phases:
        training = config.reward_training
        parts = microbatches(config.data.reward_batch_size, training.microbatch_size, mesh, "reward_training")
        if training.compare == "all" and parts > 1:
            raise ValueError(
                'config.reward_training.compare="all" compares within a whole batch: leave microbatch_size out.'
            )
    if "ppo" in phases:
        shards, count = row_shards(mesh), config.ppo.num_minibatches
        if config.data.ppo_batch_size % (count * shards):
            raise ValueError(
                f"config.data.ppo_batch_size={config.data.ppo_batch_size} is no multiple of config.ppo.num_minibatches="
                f"{count} × the mesh's {shards} row shards; take {count * shards} or a multiple of it."
            )
