"""What a PPO run shows: its responses as texts, evaluations on held-out prompts, samples before and after."""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jax import Array

from jax_rlhf.data import Datasets
from jax_rlhf.hub import decode, tokenizer_of
from jax_rlhf.io.printable import printable
from jax_rlhf.parallel import all_rows, barrier, local_row_indices, local_rows, owned_rows
from jax_rlhf.ppo.trainer import PPOTrainer
from jax_rlhf.rewards import OnFailure, RewardFunction, asks_for_special_tokens_of, score_texts
from jax_rlhf.rl import Experience, Prompts
from jax_rlhf.runtime.phase import Phase
from jax_rlhf.runtime.run_logger import sample_row


def response_rows(
    trainer: PPOTrainer,
    experience: Experience,
    step: int,
    split: str,
    *,
    columns: Sequence[Mapping[str, Any]] = (),
    count: int | None = None,
    everywhere: bool = False,
) -> list[dict[str, Any]]:
    """Lines of samples.jsonl: responses as texts, with score and KL.

    Args:
      trainer: decodes with its engine's tokenizer.
      experience: the responses.
      step: iterations done.
      split: "train" or "eval".
      columns: the data's other columns, per row; may be shorter than the batch.
      count: rows from the first on; None = all.
      everywhere: rows of all processes, not only of this one.
    """
    tokenizer, layout = tokenizer_of(trainer.engine), trainer.engine.layout

    def read(array: Array) -> np.ndarray:
        rows = all_rows(local_rows(array), layout) if everywhere else local_rows(array)
        return rows[:count]

    tokens, prompt_mask, mask = map(read, (experience.tokens, experience.prompt_mask, experience.response_mask))
    width, scores, ended = prompt_mask.shape[1], read(experience.scores), read(experience.ended)
    kl = np.sum(read(experience.logprobs) - read(experience.ref_logprobs), axis=1)
    return [
        sample_row(
            step,
            split,
            decode(tokenizer, tokens[row][:width][prompt_mask[row]]),
            decode(tokenizer, tokens[row][width:][mask[row]]),
            score=float(scores[row]),
            kl=float(kl[row]),
            length=int(mask[row].sum()),
            ended=bool(ended[row]),
            columns=columns[row] if row < len(columns) else {},
        )
        for row in range(len(tokens))
    ]


def row_columns(prompts: Prompts) -> list[dict[str, Any]]:
    """The data's other columns of each of this process's rows."""
    return [{name: values[row] for name, values in (prompts.columns or {}).items()} for row in range(len(prompts.mask))]


def _verdicts(
    judge: RewardFunction,
    answered: list[dict[str, Any]],
    prompts: Prompts,
    experience: Experience,
    trainer: PPOTrainer,
) -> np.ndarray:
    """An evaluation function's scores of all responses, NaN for None. Each process scores the rows that it owns."""
    config, layout = trainer.config, trainer.engine.layout
    on_failure = OnFailure(config.reward.retries, config.reward.on_failure, config.reward.failure_score)
    local, mine = local_row_indices(len(answered), layout), owned_rows(len(answered), layout)
    rows = [answered[row] for row in local[mine]]
    own = [int(row) for row in np.flatnonzero(mine)]
    columns = {name: [values[row] for row in own] for name, values in (prompts.columns or {}).items()}
    verdicts = np.zeros(len(local), np.float32)
    with barrier(f"calling {judge.title}"):
        texts = [row["prompt"] for row in rows], [row["response"] for row in rows]
        tokens, mask = (local_rows(part)[mine] for part in (experience.tokens, experience.response_mask))
        ids = [row[-len(real) :][real].tolist() for row, real in zip(tokens, mask, strict=True)]
        of_mine = lambda rows: None if rows is None else [rows[row] for row in own]  # noqa: E731
        more = {"completion_ids": ids, "chats": of_mine(prompts.chats), "continued": of_mine(prompts.continued)}
        more["unscored"] = math.nan
        if asks_for_special_tokens_of([judge]):
            width = experience.prompt_mask.shape[1]
            text = functools.partial(decode, tokenizer_of(trainer.engine), skip_special_tokens=False)
            prompt_rows = zip(tokens, local_rows(experience.prompt_mask)[mine], strict=True)
            prompt_texts = [text(row[:width][real]) for row, real in prompt_rows]
            more["with_special_tokens"] = (prompt_texts, [text(response) for response in ids])
        verdicts[mine] = score_texts([judge], *texts, columns, on_failure, trainer.failures, **more)
    return all_rows(verdicts, layout)


def evaluate(
    phase: Phase, trainer: PPOTrainer, prompts: Datasets, judges: Sequence[RewardFunction], step: int
) -> dict[str, float]:
    """Responds to all held-out prompts, and logs metrics and samples.

    The first evaluation stays in `phase.notes` as "first" and "before", the last one as "last" and "after".

    Args:
      phase: its log and notes.
      trainer: samples and scores.
      prompts: the data, with held-out rows.
      judges: evaluation functions, whose scores are only reported.
      step: iterations done.

    Returns:
      The metrics; empty without held-out rows.
    """
    rows: list[dict[str, Any]] = []
    for batch in phase.logger.progress_bar(prompts.eval, "evaluating"):
        experience = trainer.generate_experience(batch)
        own = [example.columns for example in prompts.held_out[len(rows) : len(rows) + prompts.batch_size]]
        answered = response_rows(trainer, experience, step, "eval", columns=own, everywhere=True)
        for judge in judges:
            for row, verdict in zip(answered, _verdicts(judge, answered, batch, experience, trainer), strict=True):
                row[judge.title] = float(verdict)
        rows += answered
    rows = rows[: prompts.eval_rows]
    metrics = _metrics(rows, judges) if rows else {}
    if rows:
        failures = trainer.counted_failures("eval") if judges or trainer.reward_functions else {}
        phase.logger.log_metrics(step, metrics | failures)
        phase.logger.log_samples(rows)
        numbers = ", ".join(f"{name.removeprefix('eval/')} {value:.3g}" for name, value in metrics.items())
        phase.logger.info(f"iteration {step}, {len(rows)} held-out prompts: {numbers}")
    phase.notes |= {"after": rows, "last": metrics}
    if step == 0:
        phase.notes |= {"before": rows, "first": metrics}
    return metrics


def _metrics(rows: list[dict[str, Any]], judges: Sequence[RewardFunction]) -> dict[str, float]:
    words = [word for row in rows for word in row["response"].split()]
    metrics = {f"eval/{name}": float(np.mean([row[name] for row in rows])) for name in ("score", "kl", "length")}
    metrics |= {f"eval/{judge.title}": _mean_given([row[judge.title] for row in rows]) for judge in judges}
    return metrics | {
        "eval/distinct_1": len(set(words)) / max(len(words), 1),
        "eval/distinct_responses": len({row["response"] for row in rows}) / len(rows),
    }


def _mean_given(verdicts: Sequence[float]) -> float:
    """The mean over the responses that an evaluation function scored."""
    given = [verdict for verdict in verdicts if not math.isnan(verdict)]
    return float(np.mean(given)) if given else math.nan


def show_samples(phase: Phase) -> None:
    """Prints responses of the first and of the last evaluation to the same prompts."""
    pairs = zip(phase.notes["before"], phase.notes["after"], strict=False)
    for one, other in list(pairs)[: phase.config.log.table_rows]:
        phase.logger.info(f"prompt  {printable(one['prompt'])}")
        phase.logger.info(f"  before, score {one['score']:+.2f}: {printable(one['response'])}")
        phase.logger.info(f"  after,  score {other['score']:+.2f}: {printable(other['response'])}")
