"""What can be known to fail before anything runs: settings, data, checkpoints and the workdir of every phase."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple, cast

import jax
from transformers import PreTrainedTokenizerBase

from jax_rlhf.cli.model_paths import check_exported, reward_model, sft_model
from jax_rlhf.config import RunConfig
from jax_rlhf.data import DataError, Datasets, create_datasets
from jax_rlhf.data.config import PHASES
from jax_rlhf.data.datasets import Phase
from jax_rlhf.hub import Description, describe_pretrained, other_ids, response_end_ids, tokenizer_of
from jax_rlhf.io.paths import local_path
from jax_rlhf.models.config import DecoderConfig
from jax_rlhf.optim.microbatches import plan_batch
from jax_rlhf.optim.optimizer import learning_rate_schedule
from jax_rlhf.parallel import create_layout
from jax_rlhf.ppo.engine import check_roles, headless
from jax_rlhf.ppo.resolve import resolve
from jax_rlhf.ppo.train import named_functions, ptx_data
from jax_rlhf.runtime.manifest import ManifestError, check_unused
from jax_rlhf.runtime.workdir import WorkdirError, check_overwrite, status


def check_run(config: RunConfig, workdir: Path, *, overwrite: bool, accept_changes: bool = False) -> list[str]:
    """Stops a run that would fail later.

    Args:
      config: the run's settings.
      workdir: its folder.
      overwrite: what the phases left in the workdir will be deleted.
      accept_changes: models need not be as a phase exported them.

    Returns:
      What there is to see: of each phase that is left, what becomes of its rows, and one of them.

    Raises:
      ValueError, FileNotFoundError, CheckpointError, DataError, WorkdirError: says what, where, and how to mend it.
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
                f"{workdir / phase} holds a {phase} phase that did not finish, without a checkpoint. --overwrite "
                f"--config.phases={','.join(config.phases[config.phases.index(phase) :])} repeats it from its start; "
                "another --workdir leaves it as it is."
            )
    if not phases:
        return []
    if overwrite:
        _check_overwrite(config, workdir)
    check_roles({role: getattr(config, role) for role in ("model", "reference", "critic", "reward_model")})
    if config.model.path is None:
        raise ValueError("config.model.path is not set; it names the checkpoint: --config.model.path=FOLDER_OR_HUB_ID")
    inputs = _inputs(config, workdir, phases)
    policy = describe_pretrained(config.model.path, revision=config.model.revision)
    if policy.tokenizer is None:
        raise DataError(f"{config.model.path} came without a tokenizer; put its files into the same folder.")
    others = {
        field: describe_pretrained(path, revision=revision) for field, path, revision in _checkpoints(config) if path
    }
    _check_layers(config, policy.config, phases, workdir)
    _check_vocabularies(config, policy.tokenizer, others)
    _check_positions(config, policy.config, phases, others)
    _check_batches(config, phases)
    _check_schedules(config, phases)
    for function in named_functions((*config.ppo.reward.functions, *config.ppo.eval_functions), config.ppo):
        function.asks_for_special_tokens()  # with isolation, what cannot be imported is known then
    seen = _check_data(config, policy, phases, others)
    if jax.process_index() == 0:  # a phase says what it accepts as it begins
        check_exported([found.path for found in inputs], workdir, accept_changes=accept_changes)
    for described in inputs:  # last: of hub ids the weights are downloaded for it
        _check_tensors(*described)
    return [line for datasets in seen for line in (datasets.report, *datasets.notes, datasets.example)]


def _check_data(
    config: RunConfig, policy: Description, phases: list[str], others: Mapping[str, Description]
) -> list[Datasets]:
    """Reads and tokenizes what each phase will."""
    if config.data.ptx_paths and not config.ppo.loss.ptx_coef:
        raise ValueError("config.data.ptx_paths is given, and config.ppo.loss.ptx_coef=0: nothing would use it.")
    ends = response_end_ids(policy, config.ppo.sampling.eos_ids)
    past = [index for index in ends if not 0 <= index < policy.config.vocab_size]
    if past:
        raise ValueError(
            f"the id {past[0]} ends an answer (so config.ppo.sampling.eos_ids, generation_config.json or the "
            f"tokenizer), and the model's embedding has {policy.config.vocab_size} rows; "
            "--config.ppo.sampling.eos_ids=… names others."
        )
    needed, seen = dict.fromkeys(phases), []
    if "reward" in phases and config.reward.normalize_rows:
        needed["ppo"] = None  # its prompts are answered, to normalise scores
    for phase in needed:
        models = [policy] if phase == "sft" else [policy, *others.values()]
        keywords = {"seed": config.seed, "eos_ids": ends, "eval_rows": config.eval_rows_of(phase)}
        keywords["vocab_size"] = min(described.config.vocab_size for described in models)
        seen.append(create_datasets(config.data_of(phase), tokenizer_of(policy), cast(Phase, phase), **keywords))
        if phase == "ppo" in phases and config.ppo.loss.ptx_coef:
            seen.append(create_datasets(ptx_data(config.data), tokenizer_of(policy), "sft", **keywords))
    return seen


def _check_overwrite(config: RunConfig, workdir: Path) -> None:
    """What is deleted is neither this run's input, nor what a phase that stays was made from, nor somebody else's."""
    check_overwrite(workdir, config.phases)
    inputs = [("model.path", config.model.path), *((name, path) for name, path, _ in _checkpoints(config))]
    data = config.data
    inputs += [(f"data.{name}", path) for name in ("paths", "eval_paths", "ptx_paths") for path in getattr(data, name)]
    for phase in config.phases:
        folder = (workdir / phase).resolve()
        for field, path in inputs:
            if path is not None and local_path(path).resolve().is_relative_to(folder):
                raise WorkdirError(
                    f"config.{field}={path} lies in {folder}, which --overwrite deletes; take another --workdir."
                )
    later = PHASES[PHASES.index(config.phases[0]) :]
    made = [phase for phase in later if phase not in config.phases and status(workdir, phase) != "new"]
    if made:
        again = ",".join(phase for phase in later if phase in made or phase in config.phases)
        raise WorkdirError(
            f"{workdir / made[0]} was made from what --overwrite deletes. --config.phases={again} repeats it too; "
            "another --workdir leaves both as they are."
        )


def _checkpoints(config: RunConfig) -> list[tuple[str, str | None, str | None]]:
    """Models beside config.model: (field, path or hub id, revision)."""
    return [
        ("reward_model.path", config.reward_model.path, config.reward_model.revision),
        ("critic.path", config.critic.path, config.critic.revision),
        ("reference.path", config.reference.path, config.reference.revision),
        ("reward.start_from", config.reward.start_from, config.reward.start_revision),
        ("sft_model_path", config.sft_model_path, config.model.revision),
    ]


class _Input(NamedTuple):
    """A checkpoint that a phase starts from, and the head that it is loaded with."""

    path: str
    revision: str | None
    head: Literal["lm", "scalar"]
    use: str


def _inputs(config: RunConfig, workdir: Path, phases: list[str]) -> list[_Input]:
    """What the phases start from: a path, or a former phase's result, which must be there."""
    training, policy, found = config.reward, config.model.revision, []
    if "sft" in phases:
        found.append(_Input(config.model.path or "", policy, "lm", "policy"))
    elif "ppo" in phases or ("reward" in phases and (not training.start_from or training.normalize_rows > 0)):
        found.append(_Input(sft_model(config, workdir), policy, "lm", "policy"))
    if "reward" in phases and training.start_from:
        found.append(_Input(training.start_from, training.start_revision, "scalar", "start"))
    if "ppo" not in phases:
        return found
    path = config.reward_model.path if "reward" in phases else reward_model(config, workdir)
    if path:
        found.append(_Input(path, config.reward_model.revision, "scalar", "reward"))
    if config.critic.path:
        found.append(_Input(config.critic.path, config.critic.revision, "scalar", "critic"))
    if config.reference.path:
        found.append(_Input(config.reference.path, config.reference.revision, "lm", "reference"))
    return found


def _check_tensors(path: str, revision: str | None, head: Literal["lm", "scalar"], use: str) -> None:
    described = describe_pretrained(path, revision=revision, head=head, new_head=use == "start")
    if use == "reward" and described.scalar_head is None:
        raise ValueError(headless(path))


def _check_layers(config: RunConfig, policy: DecoderConfig, phases: list[str], workdir: Path) -> None:
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
        begins = next((model for model in (config.critic, reward) if model.path is not None), None)
        layers = kept if "reward" in phases else policy.num_layers  # without a reward model it is the actor's trunk
        if begins is not None and begins.path is not None:
            layers = describe_pretrained(begins.path, revision=begins.revision).config.num_layers
        checked.append(("critic.trainable_layers", config.critic.trainable_layers, layers))
    for field, value, layers in checked:
        if value is not None and not 1 <= value <= layers:
            raise ValueError(f"config.{field}={value} must lie between 1 and the model's {layers} layers.")


def _check_vocabularies(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, others: Mapping[str, Description]
) -> None:
    """Token ids go from the policy to the reward model and the critic: they must mean the same there."""
    for field, path, _ in _checkpoints(config):
        if path is None or path == config.model.path:
            continue
        rows, other = others[field].config.vocab_size, others[field].tokenizer
        differ = other_ids(tokenizer, other) if other is not None else None
        if rows < len(tokenizer):
            differ = f"{rows:,} rows in its embedding, {len(tokenizer):,} tokens here"
        if differ:
            raise ValueError(
                f"config.{field}={path} has another vocabulary than config.model.path={config.model.path} ({differ}): "
                "token ids are carried from one to the other. Take a model of the same tokenizer (it may have more "
                "tokens); a model of another one can score texts as a function: config.ppo.reward.functions."
            )


def _check_positions(
    config: RunConfig, policy: DecoderConfig, phases: list[str], others: Mapping[str, Description]
) -> None:
    """No row is longer than a learned table of positions, past which a model's outputs are NaN."""
    data, response = config.data, config.ppo.sampling.max_new_tokens
    prompt = data.max_prompt_tokens if data.prompt_tokens is None else data.prompt_tokens
    wanted = {"sft": ("data.max_tokens", data.max_tokens), "reward": ("data.max_tokens", data.max_tokens)}
    wanted["ppo"] = ("data.max_prompt_tokens + config.ppo.sampling.max_new_tokens", prompt + response)
    normalizing = "reward" in phases and config.reward.normalize_rows > 0  # by responses to PPO's prompts
    models = [("model.path", policy, list(dict.fromkeys([*phases, "ppo"])) if normalizing else phases)]
    for field, described in others.items():
        phase = "reward" if field == "reward.start_from" else "ppo"
        models.append((field, described.config, [phase] if phase in phases else []))
    for field, decoder, which in models:
        for phase in which:
            name, tokens = wanted[phase]
            if decoder.position_kind == "learned" and tokens > decoder.max_positions:
                raise ValueError(
                    f"config.{name}={tokens} tokens is more than the {decoder.max_positions} positions that "
                    f"config.{field} has; the {phase} phase needs shorter rows, or a model with more positions."
                )


def _check_batches(config: RunConfig, phases: list[str]) -> None:
    layout = create_layout(config.mesh, config.rollout_mesh)
    if "sft" in phases:
        plan_batch(config.data.sft_batch_size, config.sft.microbatch_size, layout, where="config.sft")
    if "reward" in phases:
        training = config.reward
        plan = plan_batch(config.data.reward_batch_size, training.microbatch_size, layout, where="config.reward")
        if training.compare == "all" and plan.microbatches > 1:
            raise ValueError('config.reward.compare="all" compares within a whole batch: leave microbatch_size out.')
    if "ppo" in phases:
        resolve(config.ppo, config.data, layout)


def _check_schedules(config: RunConfig, phases: list[str]) -> None:
    """Schedules end after their warm-up (where the number of steps is known before the data is)."""
    sft, reward = config.sft, config.reward
    ppo = config.ppo.with_schedule_ends() if "ppo" in phases else config.ppo
    for phase, field, steps, optimizer in (
        ("sft", "sft.optimizer", sft.steps, sft.optimizer),
        ("reward", "reward.optimizer", reward.steps, reward.optimizer),
        ("ppo", "ppo.actor.optimizer", ppo.actor.optimizer.total_steps, ppo.actor.optimizer),
        ("ppo", "ppo.critic.optimizer", ppo.critic.optimizer.total_steps, ppo.critic.optimizer),
    ):
        if phase in phases and steps is not None:
            try:
                learning_rate_schedule(optimizer.with_end(steps))
            except ValueError as error:
                raise ValueError(f"config.{field}: {error}") from error
