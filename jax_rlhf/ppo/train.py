"""PPO: the policy learns to answer so that the reward model (or a Python function) scores high, near its start."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import Array

from jax_rlhf.cli.model_paths import reward_model, sft_model
from jax_rlhf.config import RunConfig
from jax_rlhf.data import DataConfig, Datasets, checked_name, create_datasets, imported, pad_id
from jax_rlhf.io.printable import printable
from jax_rlhf.parallel import (
    all_rows,
    barrier,
    check_same_on_all_processes,
    create_layout,
    local_row_indices,
    local_rows,
    owned_rows,
)
from jax_rlhf.ppo.config import PPOConfig, resolve
from jax_rlhf.ppo.engine import RLHFEngine
from jax_rlhf.ppo.trainer import PPOTrainer
from jax_rlhf.rewards import OnFailure, RewardFunction, asks_for_special_tokens_of, score_texts
from jax_rlhf.rl import Batch, Experience, Prompts, check_experience
from jax_rlhf.runtime.manifest import export_model
from jax_rlhf.runtime.numerics import check_step, debugged
from jax_rlhf.runtime.preemption import StopSignals
from jax_rlhf.runtime.progress import Progress, digest, tokenizer_digest
from jax_rlhf.runtime.run_logger import Record, sample_row
from jax_rlhf.runtime.supervised_phase import other_widths


def run(
    config: RunConfig, workdir: Path, *, stop: StopSignals | None = None, accept_changes: bool = False
) -> dict[str, float]:
    """The PPO phase: the SFT policy and the reward model → <workdir>/ppo/model and <workdir>/ppo/critic.

    Args:
      config: the run's settings.
      workdir: its folder.
      stop, accept_changes: as in the SFT phase.

    Returns:
      What it came to, also in <workdir>/ppo/summary.json: the evaluation on held-out prompts before and after.

    Raises:
      ValueError, FileNotFoundError, CheckpointError: a setting, the data or a checkpoint cannot be used.
      RewardError: a reward source returned something that is no reward.
      Stopped: it was asked to stop, and can go on.
    """
    folder = workdir / "ppo"
    layout = create_layout(config.mesh, config.rollout_mesh)
    actor = dataclasses.replace(config.model, path=sft_model(config, workdir))
    reward = dataclasses.replace(config.reward_model, path=reward_model(config, workdir))
    with Record(folder, config.log, stop, settings=config) as record:
        record.say(f"loading {actor.path}" + (f" and {reward.path}" if reward.path else ""))
        roles = {"model": actor, "reference": config.reference, "critic": config.critic, "reward_model": reward}
        engine = RLHFEngine.create(roles, layout)  # actor, reference, critic, reward
        pad = pad_id(engine.tokenizer, config.data)
        settings = resolve(config.ppo, config.data, engine.layout, pad_id=pad)
        trainer = PPOTrainer(engine, settings, reward_functions=named_functions(settings.reward.functions, settings))
        most = config.eval_rows_of("ppo")
        known = engine.models.actor.model.config.vocab_size
        how = {"seed": config.seed, "eval_rows": most, "vocab_size": known}
        prompts = create_datasets(config.data, engine.tokenizer, "ppo", mesh=layout, **how)
        texts = _texts(config, engine) if settings.loss.ptx_coef else None
        judges = named_functions(settings.eval_functions, settings)
        check_same_on_all_processes(prompts.digest, "the data")
        record.says_of(prompts)
        if texts is not None and config.data.ptx_paths:
            record.says_of(texts)
        inputs = _inputs(engine, prompts, texts)
        called = lambda: trainer.failures.calls  # noqa: E731
        progress = Progress(record, config, inputs, accept_changes=accept_changes, signs=[called])
        trainable, trainer.state = progress.restore((engine.params.trainable, trainer.state))
        engine.params = engine.params.replace(trainable=trainable)

        def evaluate(iteration: int) -> dict[str, float]:
            metrics, rows = _evaluate(iteration, trainer, prompts, judges, record)
            progress.notes |= {"after": rows, "last": metrics}
            return metrics

        if progress.step == 0:
            record.say(f"compiling, and evaluating the SFT policy{other_widths(prompts)}")
            with progress.watchdog:
                evaluate(0)
            progress.notes |= {"before": progress.notes["after"], "first": progress.notes["last"]}
        with progress.saving(lambda: _save(engine, folder)):
            batches = prompts.batches(progress.step, settings.iterations)
            for iteration in progress.steps(settings.iterations, "iteration", evaluate, settings.eval_every):
                batch, text = next(batches), _pretraining(texts, iteration)
                record.compiles_for(iteration, batch)
                experience, metrics = debugged(
                    config.debug, functools.partial(_iteration, trainer, batch, text, check=config.debug)
                )
                record.metrics(iteration + 1, metrics | _shares(metrics), **_shown(metrics))
                shown = {"columns": _columns(batch), "count": settings.sample_rows}
                record.samples(_rows(trainer, experience, iteration + 1, "train", **shown))
                good = check_step(config, record, iteration + 1, metrics, experience)
                progress.done((engine.params.trainable, trainer.state), good=good)

        notes = progress.notes
        _show_samples(notes["before"], notes["after"], config.log.table_rows, record)
        result = {"iterations": progress.step} | {f"{name}_before": value for name, value in notes["first"].items()}
        result |= notes["last"]
        record.summary(result | progress.costs.summary())
    return result


def _iteration(
    trainer: PPOTrainer, prompts: Prompts, text: Batch | None, *, check: bool
) -> tuple[Experience, dict[str, float]]:
    experience = trainer.generate_experience(prompts)
    if check:
        check_experience(jax.tree.map(local_rows, experience))
    return experience, trainer.train_rlhf(experience, text)


def _inputs(engine: RLHFEngine, prompts: Datasets, texts: Datasets | None) -> dict[str, str]:
    """Checksums of what a checkpoint does not hold."""
    frozen = engine.params.frozen
    inputs = {"the data": digest(prompts.digest, "" if texts is None else texts.digest)}
    inputs["the tokenizer"] = tokenizer_digest(engine.tokenizer)
    inputs["the reference"] = digest(frozen.reference)
    inputs["the reward model"] = digest(frozen.reward, frozen.reward_bias, frozen.missing_eos_bias)
    inputs["the actor's and the critic's frozen parameters"] = digest(frozen.actor, frozen.critic, frozen.critic_bias)
    return inputs


def _texts(config: RunConfig, engine: RLHFEngine) -> Datasets:
    """The texts of PPO-ptx, one per row."""
    how = {"seed": config.seed, "eos_ids": config.ends(engine), "mesh": engine.layout}
    return create_datasets(ptx_data(config.data), engine.tokenizer, "sft", **how)


def ptx_data(data: DataConfig) -> DataConfig:
    """The data of the pretraining loss.

    Args:
      data: the run's.

    Returns:
      `ptx_paths` as they are, or where there are none, what the SFT phase learns.
    """
    if not data.ptx_paths:
        return dataclasses.replace(data, packing=False)
    own = {"paths": data.ptx_paths, "weights": (), "eval_paths": (), "data_split": "", "eval_rows": 1}
    return dataclasses.replace(data, packing=False, **own)


def named_functions(names: Sequence[str], config: PPOConfig) -> list[RewardFunction]:
    """Reward functions by their names; with `isolation="process"` they are imported in their processes alone.

    Args:
      names: "package.module:function" each.
      config: how they are called.

    Returns:
      The functions.

    Raises:
      ValueError: there is none of that name.
    """
    how = {"timeout": config.reward.timeout, "isolation": config.reward.isolation, "memory_gb": config.reward.memory_gb}
    functions = []
    for name in names:
        own = config.reward.isolation == "process"
        function = checked_name(name, "config.ppo") if own else imported(name, "config.ppo")
        functions.append(RewardFunction(function, name=name.partition(":")[2], **how))
    return functions


def _pretraining(texts: Datasets | None, iteration: int) -> Batch | None:
    if texts is None:
        return None
    batch = texts.train[iteration]
    return Batch(batch.tokens, batch.mask)


def _save(engine: RLHFEngine, folder: Path) -> None:
    export_model(folder / "model", engine.actor)
    export_model(folder / "critic", engine.critic)
    if engine.params.trainable.actor_ema is not None:
        export_model(folder / "model_ema", engine.actor_ema)


# ---- what is shown -------------------------------------------------------------------------------------------------


def _shown(metrics: dict[str, float]) -> dict[str, float]:
    names = {"reward": "objective/scores", "kl": "objective/kl", "length": "objective/response_length"}
    return {shown: metrics[name] for shown, name in names.items()} | {"samples/s": metrics["eps"]}


def _shares(metrics: dict[str, float]) -> dict[str, float]:
    """Shares of an iteration's time, and tokens per second."""
    parts = {name: metrics[f"time/{name}"] for name in ("generate", "score", "train") if f"time/{name}" in metrics}
    shares = {f"time/{name}_share": seconds / metrics["time/iteration"] for name, seconds in parts.items()}
    tokens = metrics["objective/response_length"] * metrics["eps"]  # responses' tokens per second, of an iteration
    if "generate" in parts:
        shares["tokens_per_second/generate"] = tokens * metrics["time/iteration"] / parts["generate"]
    return shares | {"tokens_per_second": tokens}


def _rows(
    trainer: PPOTrainer,
    experience: Experience,
    step: int,
    split: str,
    *,
    columns: Sequence[Mapping[str, Any]] = (),
    count: int | None = None,
    everywhere: bool = False,
) -> list[dict[str, Any]]:
    """The first `count` of this process's responses (or of all processes'), as texts, with score and KL.

    `columns` are the data's own, of as many rows as there are.
    """
    tokenizer, layout = trainer.engine.tokenizer, trainer.engine.layout

    def read(array: Array) -> np.ndarray:
        rows = all_rows(local_rows(array), layout) if everywhere else local_rows(array)
        return rows[:count]

    tokens, prompt_mask, mask = map(read, (experience.tokens, experience.prompt_mask, experience.response_mask))
    width, scores, ended = prompt_mask.shape[1], read(experience.scores), read(experience.ended)
    kl = np.sum(read(experience.logprobs) - read(experience.ref_logprobs), axis=1)
    decode = functools.partial(tokenizer.decode, skip_special_tokens=True)
    return [
        sample_row(
            step,
            split,
            decode(tokens[row][:width][prompt_mask[row]]),
            decode(tokens[row][width:][mask[row]]),
            score=float(scores[row]),
            kl=float(kl[row]),
            length=int(mask[row].sum()),
            ended=bool(ended[row]),
            columns=columns[row] if row < len(columns) else {},
        )
        for row in range(len(tokens))
    ]


def _columns(prompts: Prompts) -> list[dict[str, Any]]:
    """The data's own columns of each of this process's rows."""
    return [{name: values[row] for name, values in prompts.columns.items()} for row in range(len(prompts.mask))]


def _verdicts(
    judge: RewardFunction,
    answered: list[dict[str, Any]],
    prompts: Prompts,
    experience: Experience,
    trainer: PPOTrainer,
) -> np.ndarray:
    """What a judge says of all responses, NaN where it gives None; each process asks it about those that it owns."""
    config, layout = trainer.config, trainer.engine.layout
    how = OnFailure(config.reward.retries, config.reward.on_failure, config.reward.failure_score)
    held, mine = local_row_indices(len(answered), layout), owned_rows(len(answered), layout)
    rows = [answered[row] for row in held[mine]]
    columns = {name: [values[row] for row in np.flatnonzero(mine)] for name, values in prompts.columns.items()}
    verdicts = np.zeros(len(held), np.float32)
    with barrier(f"asking {judge.name}"):
        texts = [row["prompt"] for row in rows], [row["response"] for row in rows]
        tokens, mask = (local_rows(part)[mine] for part in (experience.tokens, experience.response_mask))
        ids = [row[-len(real) :][real].tolist() for row, real in zip(tokens, mask, strict=True)]
        of_mine = lambda rows: None if rows is None else [rows[row] for row in np.flatnonzero(mine)]  # noqa: E731
        more = {"completion_ids": ids, "chats": of_mine(prompts.chats), "continued": of_mine(prompts.continued)}
        more["unscored"] = math.nan
        if asks_for_special_tokens_of([judge]):
            width, decode = experience.prompt_mask.shape[1], trainer.engine.tokenizer.decode
            begins = zip(tokens, local_rows(experience.prompt_mask)[mine], strict=True)
            prompt_texts = [decode(row[:width][real]) for row, real in begins]
            more["with_special_tokens"] = (prompt_texts, [decode(response) for response in ids])
        verdicts[mine] = score_texts([judge], *texts, columns, how, trainer.failures, **more)
    return all_rows(verdicts, layout)


def _evaluate(
    step: int, trainer: PPOTrainer, prompts: Datasets, judges: Sequence[RewardFunction], record: Record
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Answers all held-out prompts; (metrics, rows)."""
    rows: list[dict[str, Any]] = []
    for batch in record.watched(prompts.eval, "evaluating"):
        experience = trainer.generate_experience(batch)
        own = [example.columns for example in prompts.held_out[len(rows) : len(rows) + prompts.batch_size]]
        answered = _rows(trainer, experience, step, "eval", columns=own, everywhere=True)
        for judge in judges:
            for row, verdict in zip(answered, _verdicts(judge, answered, batch, experience, trainer), strict=True):
                row[judge.name] = float(verdict)
        rows += answered
    rows = rows[: prompts.eval_rows]
    if not rows:
        return {}, []
    words = [word for row in rows for word in row["response"].split()]
    metrics = {f"eval/{name}": float(np.mean([row[name] for row in rows])) for name in ("score", "kl", "length")}
    metrics |= {f"eval/{judge.name}": _mean_given([row[judge.name] for row in rows]) for judge in judges}
    metrics |= {
        "eval/distinct_1": len(set(words)) / max(len(words), 1),
        "eval/distinct_responses": len({row["response"] for row in rows}) / len(rows),
    }
    failures = trainer.counted_failures("eval") if judges or trainer.reward_functions else {}
    record.metrics(step, metrics | failures)
    record.samples(rows)
    numbers = ", ".join(f"{name.removeprefix('eval/')} {value:.3g}" for name, value in metrics.items())
    record.say(f"iteration {step}, {len(rows)} held-out prompts: {numbers}")
    return metrics, rows


def _mean_given(verdicts: Sequence[float]) -> float:
    """The mean over responses that a judge did not leave alone."""
    given = [verdict for verdict in verdicts if not math.isnan(verdict)]
    return float(np.mean(given)) if given else math.nan


def _show_samples(before: list[dict[str, Any]], after: list[dict[str, Any]], count: int, record: Record) -> None:
    for one, other in list(zip(before, after, strict=False))[:count]:
        record.say(f"prompt  {printable(one['prompt'])}")
        record.say(f"  before, score {one['score']:+.2f}: {printable(one['response'])}")
        record.say(f"  after,  score {other['score']:+.2f}: {printable(other['response'])}")
