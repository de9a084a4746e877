"""Generates docs/config.md and the commented configs from the dataclasses that declare the settings.

python -m jax_rlhf.cli.reference     writes docs/config.md, configs/sft.py, configs/reward.py and configs/ppo.py
"""

import dataclasses
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from jax_rlhf.config import RunConfig
from jax_rlhf.ppo.config import PPOConfig
from jax_rlhf.settings import field_docs

_WIDTH = 120
_ROOT = Path(__file__).parents[2]


@dataclasses.dataclass(frozen=True)
class Field:
    """One setting.

    Attributes:
      path: such as "ppo.kl.coef".
      kind: the type, as text.
      default: the default value.
      doc: the docstring, one line.
      fields: the fields of a section; empty for a single setting.
    """

    path: str
    kind: str
    default: Any
    doc: str
    fields: tuple["Field", ...] = ()


def fields_of(settings: Any, prefix: str = "") -> tuple[Field, ...]:
    """The fields of a settings dataclass, in order, with sections nested.

    Args:
      settings: an instance with the default values.
      prefix: put before each path.
    """
    hints, docs, found = typing.get_type_hints(type(settings)), field_docs(type(settings)), []
    for field in dataclasses.fields(settings):
        value, path = getattr(settings, field.name), f"{prefix}{field.name}"
        inner = fields_of(value, f"{path}.") if dataclasses.is_dataclass(value) else ()
        found.append(Field(path, _type_text(hints[field.name]), value, docs[field.name], inner))
    return tuple(found)


def all_fields() -> tuple[Field, ...]:
    """All settings of a run, with the defaults that a config file starts from."""
    return fields_of(RunConfig(ppo=PPOConfig(time_phases=True)))


def _type_text(hint: Any) -> str:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(_type_text(option) for option in typing.get_args(hint))
    if typing.get_origin(hint) is Literal:
        return " or ".join(f'"{value}"' for value in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return f"list of {typing.get_args(hint)[0].__name__}"
    return "None" if hint is type(None) else hint.__name__


# ---- the reference page --------------------------------------------------------------------------------------------


def markdown() -> str:
    """The text of docs/config.md."""
    lines = [
        "# Settings",
        "",
        "Every field is a flag, `--config.ppo.kl.coef=0.1`, and an attribute in a config file,",
        "`config.ppo.kl.coef = 0.1`.",
        "This page is written by `python -m jax_rlhf.cli.reference` from the dataclasses that declare the fields.",
    ]
    fields = all_fields()
    lines += _tables("config", "A whole run.", fields)
    return "\n".join(lines) + "\n"


def _tables(title: str, doc: str, fields: tuple[Field, ...]) -> Iterator[str]:
    single = [field for field in fields if not field.fields]
    yield from ("", f"## {title}", "", doc)
    if single:
        yield from ("", "| field | type | default | meaning |", "|---|---|---|---|")
        for field in single:
            cells = (f"`{field.path.rpartition('.')[2]}`", field.kind, f"`{value_text(field.default)}`", field.doc)
            yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
    for field in fields:
        if field.fields:
            yield from _tables(f"config.{field.path}", field.doc, field.fields)


def value_text(value: Any) -> str:
    """A value as Python source, in the style of ruff."""
    if isinstance(value, tuple):
        return f"({', '.join(map(value_text, value))}{',' * (len(value) == 1)})"
    return f'"{value}"' if isinstance(value, str) else repr(value)


# ---- commented configs ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Preset:
    """A commented config.

    Attributes:
      doc: its docstring.
      sections: paths of the fields and sections to write out.
      values: path → value, where it differs from the default.
    """

    doc: str
    sections: tuple[str, ...]
    values: Mapping[str, Any]


_MODEL = "HuggingFaceTB/SmolLM2-135M"
PRESETS = {
    "sft": Preset(
        """Supervised fine-tuning of any causal language model on any data in TRL's formats.

    python -m jax_rlhf --config=configs/sft.py --workdir=runs/sft \\
        --config.model.path=HuggingFaceTB/SmolLM2-135M --config.data.paths=my.jsonl

Rows are {"prompt", "completion"}, {"messages"} or {"text"}. The result is runs/sft/sft/model, a Hugging Face folder.
Every field of `data` and `model` is explained here; docs/data.md shows the formats.""",
        (
            *("phases", "seed", "max_bad_steps", "debug", "checkpoint", "watchdog", "log", "mesh", "rollout_mesh"),
            *("model", "data", "sft"),
        ),
        {
            "phases": ("sft",),
            "model.path": _MODEL,
            "checkpoint.minutes": 15.0,
            "sft.optimizer.schedule": "cosine",
            "sft.optimizer.warmup_steps": 10,
            "sft.optimizer.final_fraction": 0.1,
        },
    ),
    "reward": Preset(
        """A reward model from preferences.

    python -m jax_rlhf --config=configs/reward.py --workdir=runs/reward \\
        --config.model.path=HuggingFaceTB/SmolLM2-135M --config.sft_model_path=runs/sft/sft/model \\
        --config.data.paths=preferences.jsonl

Rows are {"prompt", "chosen", "rejected"}, texts or chats. The result is runs/reward/reward/model: a sequence classifier
whose score, in torch too, is logits + model.config.reward_bias. The fields of `data`: configs/sft.py. Scores are
normalized on responses to PPO's prompts, sampled by `ppo.sampling`.""",
        (
            *("phases", "model.path", "sft_model_path", "data.paths", "data.reward_batch_size", "data.max_tokens"),
            *("data.packing", "reward", "ppo.sampling"),
        ),
        {
            "phases": ("reward",),
            "model.path": _MODEL,
            "reward.optimizer.schedule": "linear",
            "reward.optimizer.warmup_steps": 10,
        },
    ),
    "ppo": Preset(
        """PPO from an SFT policy and a reward model, or with Python functions as rewards.

    python -m jax_rlhf --config=configs/ppo.py --workdir=runs/ppo --config.data.paths=prompts.jsonl \\
        --config.model.path=HuggingFaceTB/SmolLM2-135M --config.sft_model_path=runs/sft/sft/model \\
        --config.reward_model.path=runs/reward/reward/model

Rows are {"prompt"}; their other columns go to reward functions. The results are runs/ppo/ppo/model and
runs/ppo/ppo/critic. The fields of `data`: configs/sft.py; what PPO computes: docs/ppo.md.""",
        (
            *("phases", "model.path", "model.trainable_layers", "sft_model_path", "reward_model", "critic"),
            *("reference", "data.paths", "data.ptx_paths", "data.ppo_batch_size", "data.max_prompt_tokens", "ppo"),
        ),
        {
            "phases": ("ppo",),
            "model.path": _MODEL,
            "ppo.num_minibatches": 4,
            "ppo.actor.optimizer.learning_rate": 1e-6,
            "ppo.critic.optimizer.learning_rate": 5e-6,
        },
    ),
}


def commented_config(preset: Preset) -> str:
    """The source of a config file: `get_config`, and a function per section.

    Each field has its value and its docstring; an assignment of None is commented out.
    """
    by_path = {field.path: field for field in _flat(all_fields())}
    chosen = [by_path[path] for path in preset.sections]
    sections = [field for field in chosen if field.fields]
    body = ["    config = default_config()  # has every field, so that flags can set any"]
    for field in chosen:
        if not field.fields:
            body += _assignment(field, "config", field.path, preset.values)
    body += [f"    {_function(field)}(config.{field.path})" for field in sections]
    lines = [f'"""{preset.doc}', '"""', "", "from ml_collections import ConfigDict", ""]
    lines += ["from jax_rlhf.config import default_config", "", ""]
    lines += ["def get_config() -> ConfigDict:", '    """The settings."""', *body, "    return config"]
    for field in sections:
        lines += _section(field, preset.values)
    return "\n".join(lines) + "\n"


def _flat(fields: tuple[Field, ...]) -> Iterator[Field]:
    for field in fields:
        yield field
        yield from _flat(field.fields)


def _function(field: Field) -> str:
    return "_" + field.path.replace(".", "_")


def _section(field: Field, values: Mapping[str, Any]) -> list[str]:
    name = field.path.rpartition(".")[2]
    lines = ["", "", f"def {_function(field)}({name}: ConfigDict) -> None:", f'    """{field.doc}"""']
    inner = [one for one in field.fields if one.fields]
    for one in field.fields:
        if not one.fields:
            lines += _assignment(one, name, one.path.rpartition(".")[2], values)
    lines += [f"    {_function(one)}({name}.{one.path.rpartition('.')[2]})" for one in inner]
    for one in inner:
        lines += _section(one, values)
    return lines


def _assignment(field: Field, variable: str, path: str, values: Mapping[str, Any]) -> list[str]:
    value = values.get(field.path, field.default)
    line = f"{'# ' if value is None else ''}{variable}.{path} = {value_text(value)}"
    if len(f"    {line}  # {field.doc}") <= _WIDTH:
        return [f"    {line}  # {field.doc}"]
    return [*textwrap.wrap(field.doc, _WIDTH, initial_indent="    # ", subsequent_indent="    # "), f"    {line}"]


def main() -> None:
    """Writes docs/config.md and the configs."""
    (_ROOT / "docs" / "config.md").write_text(markdown(), encoding="utf-8")
    for name, preset in PRESETS.items():
        (_ROOT / "configs" / f"{name}.py").write_text(commented_config(preset), encoding="utf-8")


if __name__ == "__main__":
    main()
