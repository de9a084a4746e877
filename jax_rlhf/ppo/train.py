"""PPO: the policy learns to write responses that the reward model or a Python function scores high."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from jax_rlhf.data import DataConfig, Datasets, checked_name, create_datasets, imported, pad_id
from jax_rlhf.hub import response_end_ids, tokenizer_of
from jax_rlhf.hub.config import ModelConfig
from jax_rlhf.parallel import Layout, local_rows
from jax_rlhf.ppo.config import LimitsConfig, PPOConfig
from jax_rlhf.ppo.engine import RLHFEngine
from jax_rlhf.ppo.evaluate import evaluate, response_rows, row_columns, show_samples
from jax_rlhf.ppo.resolve import resolve
from jax_rlhf.ppo.trainer import PPOTrainer
from jax_rlhf.rewards import RewardFunction
from jax_rlhf.rl import Batch, Experience, Prompts, check_experience
from jax_rlhf.runtime.manifest import export_model
from jax_rlhf.runtime.numerics import Fault, check_step, debugged
from jax_rlhf.runtime.phase import Phase, digest, tokenizer_digest
from jax_rlhf.runtime.supervised_phase import other_widths


def run(
    phase: Phase,
    config: PPOConfig,
    *,
    roles: Mapping[str, ModelConfig],
    data: DataConfig,
    layout: Layout | None,
    seed: int,
) -> dict[str, float]:
    """The PPO phase: SFT policy and reward model → <workdir>/ppo/model, ppo/critic. Continues from the last checkpoint.

    Args:
      phase: its log and checkpoints.
      config: its settings.
      roles: the four models, as `RLHFEngine.create` takes them: "model", "reference", "critic", "reward_model".
      data: the data.
      layout: the mesh; None = one device.
      seed: the seed of the order of rows. `config.seed` is that of the samples.

    Returns:
      The results, also in <workdir>/ppo/summary.json: the evaluation on held-out prompts before and after.

    Raises:
      ValueError, FileNotFoundError, CheckpointError: a setting, the data or a checkpoint cannot be used.
      RewardError: a reward function failed, or returned something that is not a reward.
      Stopped: the run was asked to stop. It can continue.
    """
    paths = filter(None, (roles[name].path for name in ("model", "reward_model")))
    phase.logger.info(f"loading {' and '.join(paths)}")
    engine = RLHFEngine.create(roles, layout)  # actor, reference, critic, reward
    config = resolve(config, data, engine.layout, pad_id=pad_id(tokenizer_of(engine), data))
    trainer = PPOTrainer(engine, config, reward_functions=reward_functions(config))
    judges = eval_functions(config)
    prompts = phase.create_datasets(
        data,
        tokenizer_of(engine),
        seed=seed,
        eval_rows=data.eval_rows if config.eval_rows is None else config.eval_rows,
        vocab_size=engine.models.actor.model.config.vocab_size,
        mesh=layout,
    )
    texts = _pretraining_texts(phase, config, data, engine, seed) if config.loss.ptx_coef else None
    _restore(phase, trainer, prompts, texts)
    evaluation = functools.partial(evaluate, phase, trainer, prompts, judges)
    if phase.step == 0:
        phase.logger.info(f"compiling, and evaluating the SFT policy{other_widths(prompts)}")
        with phase.watchdog:
            evaluation(0)
    with phase.saving(lambda: _export(engine, phase.folder)):
        batches = prompts.batches(phase.step, config.iterations)
        for iteration in phase.steps(config.iterations, "iteration", evaluation, config.eval_every):
            batch, text = next(batches), _pretraining_batch(texts, iteration)
            phase.logger.note_width(iteration, batch)
            step = functools.partial(_iteration, trainer, batch, text, check=phase.config.debug)
            experience, metrics = debugged(phase.config.debug, step)
            _log(phase, trainer, iteration + 1, batch, experience, metrics)
            fault, bad = passed_limit(config.limits, metrics), phase.config.max_bad_steps
            good = check_step(phase.logger, iteration + 1, metrics, experience, max_bad_steps=bad, fault=fault)
            phase.done((engine.params.trainable, trainer.state), good=good)
    show_samples(phase)
    before = {f"{name}_before": value for name, value in phase.notes["first"].items()}
    return phase.finish({"iterations": phase.step} | before | phase.notes["last"])


def _iteration(
    trainer: PPOTrainer, prompts: Prompts, text: Batch | None, *, check: bool
) -> tuple[Experience, dict[str, float]]:
    experience = trainer.generate_experience(prompts)
    if check:
        check_experience(jax.tree.map(local_rows, experience))
    return experience, trainer.train_rlhf(experience, text)


def _restore(phase: Phase, trainer: PPOTrainer, prompts: Datasets, texts: Datasets | None) -> None:
    """Continues from the last checkpoint, which contains all that trains. The rest must be the same as before."""
    engine, frozen = trainer.engine, trainer.engine.params.frozen
    inputs = {
        "the data": digest(prompts.digest, "" if texts is None else texts.digest),
        "the tokenizer": tokenizer_digest(tokenizer_of(engine)),
        "the reference": digest(frozen.reference),
        "the reward model": digest(frozen.reward, frozen.reward_bias, frozen.missing_eos_bias),
        "the actor's and the critic's frozen parameters": digest(frozen.actor, frozen.critic, frozen.critic_bias),
    }
    phase.activity.append(lambda: trainer.failures.calls)  # a reward function is called
    trainable, trainer.state = phase.restore((engine.params.trainable, trainer.state), inputs)
    engine.params = engine.params.replace(trainable=trainable)


# ---- data ----------------------------------------------------------------------------------------------------------


def _pretraining_texts(phase: Phase, config: PPOConfig, data: DataConfig, engine: RLHFEngine, seed: int) -> Datasets:
    """The texts of PPO-ptx, one per row."""
    ends = response_end_ids(engine, config.sampling.eos_ids)
    texts = create_datasets(ptx_data(data), tokenizer_of(engine), "sft", seed=seed, eos_ids=ends, mesh=engine.layout)
    if data.ptx_paths:
        phase.logger.log_datasets(texts)
    return texts


def ptx_data(data: DataConfig) -> DataConfig:
    """The settings of PPO-ptx's data: `ptx_paths`, or without them the data of the SFT phase."""
    if not data.ptx_paths:
        return dataclasses.replace(data, packing=False)
    own = {"paths": data.ptx_paths, "weights": (), "eval_paths": (), "data_split": "", "eval_rows": 1}
    return dataclasses.replace(data, packing=False, **own)


def _pretraining_batch(texts: Datasets | None, iteration: int) -> Batch | None:
    if texts is None:
        return None
    batch: Any = texts.train[iteration]
    return Batch(batch.tokens, batch.mask)


def reward_functions(config: PPOConfig) -> list[RewardFunction]:
    """The functions of `config.ppo.reward.functions`. With `isolation="process"` only their own processes import them.

    Raises:
      ValueError: there is no function of that name.
    """
    return _named(config.reward.functions, "config.ppo.reward.functions", config)


def eval_functions(config: PPOConfig) -> list[RewardFunction]:
    """The functions of `config.ppo.eval_functions`; as `reward_functions`."""
    return _named(config.eval_functions, "config.ppo.eval_functions", config)


def _named(names: Sequence[str], field: str, config: PPOConfig) -> list[RewardFunction]:
    reward = config.reward
    limits = {"timeout": reward.timeout, "isolation": reward.isolation, "memory_gb": reward.memory_gb}
    functions = []
    for name in names:
        isolated = reward.isolation == "process"
        function = checked_name(name, field) if isolated else imported(name, field)
        functions.append(RewardFunction(function, name=name.rpartition(":")[2], **limits))
    return functions


# ---- results -------------------------------------------------------------------------------------------------------


def _export(engine: RLHFEngine, folder: Path) -> None:
    export_model(folder / "model", engine.actor)
    export_model(folder / "critic", engine.critic)
    if engine.params.trainable.actor_ema is not None:
        export_model(folder / "model_ema", engine.actor_ema)


def _log(
    phase: Phase,
    trainer: PPOTrainer,
    step: int,
    prompts: Prompts,
    experience: Experience,
    metrics: dict[str, float],
) -> None:
    """Logs an iteration's metrics and some of its responses."""
    names = {"reward": "objective/scores", "kl": "objective/kl", "length": "objective/response_length"}
    shown = {short: metrics[name] for short, name in names.items()} | {"samples/s": metrics["eps"]}
    phase.logger.log_metrics(step, metrics | _shares(metrics), **shown)
    count = trainer.config.sample_rows
    rows = response_rows(trainer, experience, step, "train", columns=row_columns(prompts), count=count)
    phase.logger.log_samples(rows)


def _shares(metrics: dict[str, float]) -> dict[str, float]:
    """Shares of an iteration's time, and tokens per second."""
    parts = {name: metrics[f"time/{name}"] for name in ("generate", "score", "train") if f"time/{name}" in metrics}
    shares = {f"time/{name}_share": seconds / metrics["time/iteration"] for name, seconds in parts.items()}
    tokens = metrics["objective/response_length"] * metrics["eps"]  # response tokens per second of an iteration
    if "generate" in parts:
        shares["tokens_per_second/generate"] = tokens * metrics["time/iteration"] / parts["generate"]
    return shares | {"tokens_per_second": tokens}


def passed_limit(limits: LimitsConfig, metrics: Mapping[str, float]) -> Fault | None:
    """The fault of an iteration that exceeds `limits.kl` or `limits.ratio`; None where `action` is not "stop"."""
    numbers = {"kl": "objective/kl", "ratio": "val/largest_ratio_gap"}
    passed = [name for name in numbers if metrics.get(f"limit/{name}")]
    if not passed or limits.action != "stop":
        return None
    cause = "; ".join(
        f"{numbers[name]}={metrics[numbers[name]]:.4g}, config.ppo.limits.{name}={getattr(limits, name):g}"
        for name in passed
    )
    remedy = "a lower learning rate, a higher config.ppo.kl.coef, fewer ppo_epochs, config.ppo.limits.action=lower_lr"
    return Fault(cause, remedy)
