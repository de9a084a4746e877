"""The text that is printed when a run ends: results before and after each phase, and where to look next."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jax_rlhf.runtime.remote import remote_of


def summary_text(results: Mapping[str, Mapping[str, Any]], workdir: Path, *, tensorboard: bool) -> str:
    """A table of held-out metrics before and after each phase, and where models, curves and samples are.

    Args:
      results: phase → metric → value; the metric before training has the name "<name>_before".
      workdir: the folder of the run.
      tensorboard: whether TensorBoard files were written.
    """
    where = remote_of(workdir) or workdir
    rows = [("", "held out", "before", "after")]
    for phase, result in results.items():
        measured = [name for name in result if name.startswith("eval/") and not name.endswith("_before")]
        rows += [
            (phase, name.removeprefix("eval/"), _number(result.get(f"{name}_before")), _number(result[name]))
            for name in measured
        ]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = [
        f"{phase:{widths[0]}}  {name:{widths[1]}}  {before:>{widths[2]}}  {after:>{widths[3]}}".rstrip()
        for phase, name, before, after in rows
    ]
    for phase, result in results.items():
        others = [
            f"{name} {value:,}" if isinstance(value, int) else f"{name} {value:.4g}"
            for name, value in result.items()
            if not name.startswith("eval/")
        ]
        lines.append(f"{phase}: {', '.join(others)}; model in {where / phase / 'model'}")
    policy = next((phase for phase in ("ppo", "sft") if phase in results), None)
    if policy is not None:
        lines.append(f"chat:        python -m jax_rlhf.chat {workdir / policy / 'model'}")
    if results and tensorboard:
        lines.append(f"curves:      tensorboard --logdir {where}")
    if results:
        lines.append(f"samples:     {where / list(results)[-1] / 'samples.jsonl'}")
    return "\n".join(lines) if results else ""


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
