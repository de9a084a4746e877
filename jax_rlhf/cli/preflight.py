"""Checks of settings, data, checkpoints and workdir for all phases, before the first one starts."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, cast

import jax
from transformers import PreTrainedTokenizerBase

from jax_rlhf.cli.model_paths import check_exported, inputs_of, reward_model
from jax_rlhf.config import RunConfig
from jax_rlhf.data import DataError, Datasets, create_datasets
from jax_rlhf.data.config import PHASES
from jax_rlhf.data.datasets import Phase
from jax_rlhf.hub import Description, describe_pretrained, other_ids, response_end_ids, tokenizer_of
from jax_rlhf.io.paths import local_path
from jax_rlhf.models.config import DecoderConfig
from jax_rlhf.optim.optimizer import learning_rate_schedule
from jax_rlhf.parallel import create_layout
from jax_rlhf.ppo.engine import check_roles, headless
from jax_rlhf.ppo.resolve import resolve
from jax_rlhf.ppo.train import eval_functions, ptx_data, reward_functions
from jax_rlhf.reward import train as reward
from jax_rlhf.runtime.manifest import ManifestError, check_unused
from jax_rlhf.runtime.workdir import WorkdirError, check_overwrite, status
from jax_rlhf.sft import train as sft


def check_run(config: RunConfig, workdir: Path, *, overwrite: bool, accept_changes: bool = False) -> list[str]:
    """Stops a run that would fail later.

    Args:
      config: the settings of the run.
      workdir: its folder.
      overwrite: whether earlier results of the phases in the workdir will be deleted.
      accept_changes: accept models that have changed since a phase exported them.

    Returns:
      Lines to print: for each phase that is not finished, how many rows are used and left out, and an example row.

    Raises:
      ValueError, FileNotFoundError, CheckpointError, DataError, WorkdirError: the run cannot work; the message names
        the field or file, and how to fix it.
    """
    phases = [phase for phase in config.phases if overwrite or status(workdir, phase) != "finished"]
    for phase in phases if not overwrite else ():
        state = status(workdir, phase)
        try:
            if state == "new":
                check_unused(workdir / phase)
        except ManifestError as error:
            raise WorkdirError(f"{error}. Move it away, or take another --workdir.") from error
        if state == "partial":
            raise WorkdirError(
                f"{workdir / phase} has a {phase} phase that did not finish, without a checkpoint. --overwrite "
                f"--config.phases={','.join(config.phases[config.phases.index(phase) :])} repeats it from its start; "
                "another --workdir keeps it."
            )
    if not phases:
        return []
    if overwrite:
        _check_overwrite(config, workdir)
    check_roles({role: getattr(config, role) for role in ("model", "reference", "critic", "reward_model")})
    path = config.model.required_path()
    inputs = inputs_of(config, workdir, phases)
    policy = describe_pretrained(path, revision=config.model.revision)
    if policy.tokenizer is None:
        raise DataError(f"config.model.path={config.model.path} has no tokenizer; add its files to the folder.")
    others = {
        field: describe_pretrained(path, revision=revision) for field, path, revision in _checkpoints(config) if path
    }
    if "sft_model_path" in others and others["sft_model_path"].tokenizer is None:
        raise DataError(f"config.sft_model_path={config.sft_model_path} has no tokenizer; add its files to the folder.")
    _check_layers(config, policy.config, phases, workdir)
    _check_vocabularies(config, policy.tokenizer, others)
    _check_positions(config, policy.config, phases, others)
    _check_batches(config, phases)
    _check_schedules(config, phases)
    for function in (*reward_functions(config.ppo), *eval_functions(config.ppo)):
        function.asks_for_special_tokens()  # with isolation, this finds functions that cannot be imported
    checked = _check_data(config, policy, phases, others)
    if jax.process_index() == 0:  # accepted changes are printed when a phase starts
        check_exported([checkpoint.path for checkpoint in inputs], workdir, accept_changes=accept_changes)
    for checkpoint in inputs:  # last, since it downloads the weights of hub ids
        _check_tensors(*checkpoint)
    return [line for datasets in checked for line in (datasets.report, *datasets.notes, datasets.example)]


def _check_data(
    config: RunConfig, policy: Description, phases: list[str], others: Mapping[str, Description]
) -> list[Datasets]:
    """Reads and tokenizes the data of each phase."""
    if config.data.ptx_paths and not config.ppo.loss.ptx_coef:
        raise ValueError(
            "config.data.ptx_paths is set, but unused with config.ppo.loss.ptx_coef=0: set a coefficient above 0."
        )
    ends = response_end_ids(policy, config.ppo.sampling.eos_ids)
    invalid = [index for index in ends if not 0 <= index < policy.config.vocab_size]
    if invalid:
        raise ValueError(
            f"the id {invalid[0]} ends a response according to config.ppo.sampling.eos_ids, generation_config.json or "
            f"the tokenizer, but the model's embedding has {policy.config.vocab_size} rows; set other ids with "
            "--config.ppo.sampling.eos_ids=…"
        )
    needed, checked = dict.fromkeys(phases), []
    if "reward" in phases and config.reward.normalize_rows:
        needed["ppo"] = None  # scores are normalised on responses to its prompts
    for phase in needed:
        models = [policy] if phase == "sft" else [policy, *others.values()]
        keywords = {"seed": config.seed, "eos_ids": ends, "eval_rows": config.eval_rows_of(phase)}
        keywords["vocab_size"] = min(description.config.vocab_size for description in models)
        checked.append(create_datasets(config.data_of(phase), tokenizer_of(policy), cast(Phase, phase), **keywords))
        if phase == "ppo" in phases and config.ppo.loss.ptx_coef:
            checked.append(create_datasets(ptx_data(config.data), tokenizer_of(policy), "sft", **keywords))
    return checked


def _check_overwrite(config: RunConfig, workdir: Path) -> None:
    """Checks that --overwrite deletes no input of this run, no input of a phase that is kept, and no foreign files."""
    check_overwrite(workdir, config.phases)
    inputs = [("model.path", config.model.path), *((name, path) for name, path, _ in _checkpoints(config))]
    data = config.data
    inputs += [(f"data.{name}", path) for name in ("paths", "eval_paths", "ptx_paths") for path in getattr(data, name)]
    for phase in config.phases:
        folder = (workdir / phase).resolve()
        for field, path in inputs:
            if path is not None and local_path(path).resolve().is_relative_to(folder):
                raise WorkdirError(
                    f"config.{field}={path} is in {folder}, which --overwrite deletes; take another --workdir."
                )
    later = PHASES[PHASES.index(config.phases[0]) :]
    dependent = [phase for phase in later if phase not in config.phases and status(workdir, phase) != "new"]
    if dependent:
        again = ",".join(phase for phase in later if phase in dependent or phase in config.phases)
        raise WorkdirError(
            f"{workdir / dependent[0]} was trained from a model that --overwrite deletes. --config.phases={again} "
            "repeats it too; another --workdir keeps both."
        )


def _checkpoints(config: RunConfig) -> list[tuple[str, str | None, str | None]]:
    """The settings that name models other than config.model: (field, path or hub id, revision)."""
    return [
        ("reward_model.path", config.reward_model.path, config.reward_model.revision),
        ("critic.path", config.critic.path, config.critic.revision),
        ("reference.path", config.reference.path, config.reference.revision),
        ("reward.start_from", config.reward.start_from, config.reward.start_revision),
        ("sft_model_path", config.sft_model_path, config.model.revision),
    ]


def _check_tensors(path: str, revision: str | None, head: Literal["lm", "scalar"], use: str) -> None:
    """Checks that a checkpoint has all tensors, and a reward model its head."""
    description = describe_pretrained(path, revision=revision, head=head, new_head=use == "start")
    if use == "reward" and description.scalar_head is None:
        raise ValueError(headless(path))


def _check_layers(config: RunConfig, policy: DecoderConfig, phases: list[str], workdir: Path) -> None:
    """Checks numbers of layers against the models."""
    training = config.reward
    start = (
        policy
        if training.start_from is None
        else describe_pretrained(training.start_from, revision=training.start_revision).config
    )
    kept = training.num_layers or start.num_layers
    checked = [
        ("model.trainable_layers", config.model.trainable_layers, policy.num_layers),
        ("reward.num_layers", training.num_layers, start.num_layers),
        ("reward.trainable_layers", training.trainable_layers, kept),
    ]
    if "ppo" in phases:
        reward = config.reward_model
        if reward.path is None and "reward" not in phases:
            reward = dataclasses.replace(reward, path=reward_model(config, workdir))
        initial = next((model for model in (config.critic, reward) if model.path is not None), None)
        layers = (
            kept if "reward" in phases else policy.num_layers
        )  # without a reward model the critic gets the actor's trunk
        if initial is not None and initial.path is not None:
            layers = describe_pretrained(initial.path, revision=initial.revision).config.num_layers
        checked.append(("critic.trainable_layers", config.critic.trainable_layers, layers))
    for field, value, layers in checked:
        if value is not None and not 1 <= value <= layers:
            raise ValueError(f"config.{field}={value} must lie between 1 and the model's {layers} layers.")


def _check_vocabularies(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, others: Mapping[str, Description]
) -> None:
    """Checks that all models share one vocabulary, since they get the token ids of the policy's tokenizer."""
    for field, path, _ in _checkpoints(config):
        if path is None or path == config.model.path:
            continue
        rows, other = others[field].config.vocab_size, others[field].tokenizer
        differ = other_ids(tokenizer, other) if other is not None else None
        if rows < len(tokenizer):
            differ = f"{rows:,} rows in its embedding, {len(tokenizer):,} tokens here"
        if differ:
            raise ValueError(
                f"config.{field}={path} has another vocabulary than config.model.path={config.model.path} ({differ}), "
                "but gets the same token ids. Take a model with the same tokenizer (it may have more tokens). A model "
                "with another tokenizer can score texts in a reward function: config.ppo.reward.functions."
            )


def _check_positions(
    config: RunConfig, policy: DecoderConfig, phases: list[str], others: Mapping[str, Description]
) -> None:
    """Checks that no row is longer than a learned table of positions, beyond which a model's outputs are NaN."""
    data, response = config.data, config.ppo.sampling.max_new_tokens
    wanted = {"sft": ("data.max_tokens", data.max_tokens), "reward": ("data.max_tokens", data.max_tokens)}
    wanted["ppo"] = ("data.max_prompt_tokens + config.ppo.sampling.max_new_tokens", data.prompt_width + response)
    normalizing = "reward" in phases and config.reward.normalize_rows > 0  # on responses to PPO's prompts
    models = [("model.path", policy, list(dict.fromkeys([*phases, "ppo"])) if normalizing else phases)]
    for field, described in others.items():
        phase = "reward" if field == "reward.start_from" else "ppo"
        models.append((field, described.config, [phase] if phase in phases else []))
    for field, decoder, which in models:
        for phase in which:
            name, tokens = wanted[phase]
            if decoder.position_kind == "learned" and tokens > decoder.max_positions:
                raise ValueError(
                    f"config.{name}={tokens} tokens is more than the {decoder.max_positions} positions of "
                    f"config.{field}; the {phase} phase needs shorter rows, or a model with more positions."
                )


def _check_batches(config: RunConfig, phases: list[str]) -> None:
    layout = create_layout(config.mesh, config.rollout_mesh)
    if "sft" in phases:
        sft.microbatches(config.sft, config.data.sft_batch_size, layout)
    if "reward" in phases:
        reward.microbatches(config.reward, config.data.reward_batch_size, layout)
    if "ppo" in phases:
        resolve(config.ppo, config.data, layout)


def _check_schedules(config: RunConfig, phases: list[str]) -> None:
    """Checks that schedules end after their warm-up, if the number of steps does not depend on the data."""
    ppo = config.ppo.with_schedule_ends() if "ppo" in phases else config.ppo
    for phase, field, steps, optimizer in (
        ("sft", "sft.optimizer", config.sft.steps, config.sft.optimizer),
        ("reward", "reward.optimizer", config.reward.steps, config.reward.optimizer),
        ("ppo", "ppo.actor.optimizer", ppo.actor.optimizer.total_steps, ppo.actor.optimizer),
        ("ppo", "ppo.critic.optimizer", ppo.critic.optimizer.total_steps, ppo.critic.optimizer),
    ):
        if phase in phases and steps is not None:
            try:
                learning_rate_schedule(optimizer.with_end(steps))
            except ValueError as error:
                raise ValueError(f"config.{field}: {error}") from error
