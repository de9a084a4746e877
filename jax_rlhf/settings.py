"""Settings: dataclasses declare the fields; mappings and flags set them."""

import ast
import dataclasses
import difflib
import functools
import inspect
import itertools
import re
import textwrap
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypeVar, cast

from ml_collections import ConfigDict, config_dict

T = TypeVar("T")


def from_mapping(kind: type[T], values: Any, where: str = "config") -> T:
    """Creates a config dataclass from a mapping, and checks the type of every field.

    Args:
      kind: the dataclass.
      values: a dict or `ml_collections.ConfigDict` of the fields that differ from the defaults, nested like the
        dataclass; or an instance of `kind`, which is returned.
      where: the name of the mapping in error messages.

    Raises:
      ValueError: an unknown field (the message suggests similar names), or a value of the wrong type.
    """
    if isinstance(values, kind):
        return values
    if not isinstance(values, Mapping) and not hasattr(values, "items"):
        raise ValueError(f"{where} must be a mapping of {kind.__name__}'s fields, not {type(values).__name__}.")
    hints = typing.get_type_hints(kind)
    fields = {field.name for field in dataclasses.fields(cast(Any, kind))}
    checked = {}
    for name, value in values.items():
        if name not in fields:
            path = f"{where}.{name}".removeprefix("config.")
            raise ValueError(f"{where}.{name} does not exist; {suggest_field(name, fields, path=path)}")
        checked[name] = _checked(hints[name], value, f"{where}.{name}")
    try:
        return kind(**checked)
    except ValueError as error:
        text = str(error)
        if text.startswith("config."):
            raise
        raise ValueError(f"{where}.{text}" if re.match(r"\w+=", text) else f"{where}: {text}") from error


def check_ranges(
    config: Any,
    *,
    at_least_0: tuple[str, ...] = (),
    at_least_1: tuple[str, ...] = (),
    above_0: tuple[str, ...] = (),
) -> None:
    """Checks that numeric fields of a config dataclass are in range; None is always in range.

    The message begins with the field. `from_mapping` puts the section before it.

    Args:
      config: the dataclass.
      at_least_0, at_least_1, above_0: names of fields.

    Raises:
      ValueError: a field is out of range, or not a number.
    """
    for names, wrong, wanted in (
        (at_least_0, lambda value: not value >= 0, "0 or more"),
        (at_least_1, lambda value: not value >= 1, "1 or more"),
        (above_0, lambda value: not value > 0, "above 0"),
    ):
        for name in names:
            value = getattr(config, name)
            if value is not None and wrong(value):
                raise ValueError(f"{name}={value} must be {wanted}.")


_UNSUPPORTED = {
    r"(^|_|q)lora($|_)|peft|adapters?$": "LoRA and other adapters",
    r"4bit|8bit|quanti[sz]": "quantized training",
    r"vllm|sglang": "generation by another server",
    r"^(grpo|rloo|reinforce)": "GRPO, RLOO and REINFORCE (the algorithm is PPO)",
    r"^(dpo|kto|orpo|simpo|cpo)($|_)": "DPO and its relatives (the phases are sft, reward and ppo)",
    r"deepspeed|zero_stage|fsdp_config|accelerate": "DeepSpeed and accelerate (config.mesh says what is sharded)",
    r"pipeline": "pipeline parallelism",
    r"(^|_)(moe|experts?)($|_)": "mixtures of experts",
}
"""Features of other frameworks that this one does not have: pattern of a field's name → feature."""
_OTHER_NAMES = {
    "gradient_checkpointing": "model.remat",
    "gradient_accumulation_steps": "sft.microbatch_size, reward.microbatch_size or ppo.microbatch_size",
    "per_device_train_batch_size": "data.sft_batch_size, data.reward_batch_size or data.ppo_batch_size, of all devices",
    "train_batch_size": "data.sft_batch_size, data.reward_batch_size or data.ppo_batch_size",
    "batch_size": "data.sft_batch_size, data.reward_batch_size or data.ppo_batch_size",
    "learning_rate": "sft.optimizer.learning_rate, reward.optimizer.learning_rate or "
    "ppo.actor.optimizer.learning_rate and ppo.critic.optimizer.learning_rate",
    "num_train_epochs": "sft.epochs, reward.epochs or ppo.iterations",
    "max_steps": "sft.steps, reward.steps or ppo.iterations",
    "max_length": "data.max_tokens",
    "max_seq_length": "data.max_tokens",
    "max_prompt_length": "data.max_prompt_tokens",
    "max_completion_length": "ppo.sampling.max_new_tokens",
    "response_length": "ppo.sampling.max_new_tokens",
    "beta": "ppo.kl.coef",
    "init_kl_coef": "ppo.kl.coef",
    "cliprange": "ppo.loss.clip_range",
    "cliprange_value": "ppo.loss.value_clip_range",
    "vf_coef": "ppo.critic.optimizer.learning_rate: the critic has its own optimizer, so its loss needs no coefficient",
    "num_ppo_epochs": "ppo.ppo_epochs",
    "num_mini_batches": "ppo.num_minibatches",
    "model_name_or_path": "model.path",
    "dataset_name": "data.paths",
    "reward_model_path": "reward_model.path",
    "sft_model_path": "sft_model_path",
    "output_dir": "--workdir=DIR, which is no field",
    "report_to": "log.tensorboard and log.wandb_project",
    "bf16": "model.dtype",
    "fp16": "model.dtype",
    "save_steps": "checkpoint.every",
    "eval_steps": "sft.eval_every, reward.eval_every or ppo.eval_every",
    "attn_implementation": "model.attention",
}
"""Names of settings in TRL, OpenRLHF and DeepSpeed-Chat → the setting here."""


_RENAMED = {
    "ppo.max_new_tokens": "ppo.sampling.max_new_tokens",
    "ppo.min_new_tokens": "ppo.sampling.min_new_tokens",
    "ppo.temperature": "ppo.sampling.temperature",
    "ppo.top_k": "ppo.sampling.top_k",
    "ppo.top_p": "ppo.sampling.top_p",
    "ppo.eos_ids": "ppo.sampling.eos_ids",
    "ppo.pad_id": "ppo.sampling.pad_id",
    "ppo.clip_range": "ppo.loss.clip_range",
    "ppo.clip_range_high": "ppo.loss.clip_range_high",
    "ppo.dual_clip": "ppo.loss.dual_clip",
    "ppo.penalty_coef": "ppo.loss.penalty_coef",
    "ppo.penalty_target": "ppo.loss.penalty_target",
    "ppo.value_clip_range": "ppo.loss.value_clip_range",
    "ppo.entropy_coef": "ppo.loss.entropy_coef",
    "ppo.entropy_target": "ppo.loss.entropy_target",
    "ppo.ptx_coef": "ppo.loss.ptx_coef",
    "ppo.missing_eos_penalty": "ppo.reward.missing_eos_penalty",
    "ppo.truncation": "ppo.reward.truncation",
    "ppo.kl_coef": "ppo.kl.coef",
    "ppo.kl_kind": "ppo.kl.kind",
    "ppo.kl_reduction": "ppo.kl.reduction",
    "ppo.kl_target": "ppo.kl.target",
    "ppo.kl_horizon": "ppo.kl.horizon",
    "ppo.reward_clip": "ppo.reward.clip",
    "ppo.reward_timeout": "ppo.reward.timeout",
    "ppo.reward_isolation": "ppo.reward.isolation",
    "ppo.reward_memory_gb": "ppo.reward.memory_gb",
    "ppo.reward_retries": "ppo.reward.retries",
    "ppo.on_reward_failure": "ppo.reward.on_failure",
    "ppo.reward_failure_score": "ppo.reward.failure_score",
    "ppo.whiten_rewards": "ppo.reward.whiten",
    "ppo.reward_functions": "ppo.reward.functions",
    "ppo.policy_loss": "ppo.loss.policy",
    "ppo.critic_warmup_iterations": "ppo.critic.warmup_iterations",
    "ppo.ema_decay": "ppo.actor.ema_decay",
    "ppo.actor_optimizer": "ppo.actor.optimizer",
    "ppo.critic_optimizer": "ppo.critic.optimizer",
    "ppo.target_kl": "ppo.limits.target_kl",
    "ppo.kl_limit": "ppo.limits.kl",
    "ppo.ratio_limit": "ppo.limits.ratio",
    "ppo.on_limit": "ppo.limits.action",
    "ppo.limit_lr_factor": "ppo.limits.lr_factor",
    "reward.path": "reward_model.path (the reward model of PPO), or config.reward.start_from (what the reward phase "
    "starts from)",
    "reward.revision": "reward_model.revision, or config.reward.start_revision",
    "reward.dtype": "reward_model.dtype",
    "reward.remat": "reward_model.remat",
    "reward.attention": "reward_model.attention",
    "reward.offload": "reward_model.offload",
    "reward_training.path": "reward.start_from",
    "reward_training.revision": "reward.start_revision",
}
"""Names of fields before they were grouped in sections → their names now."""


def new_name(path: str) -> str | None:
    """The current name of a field that was renamed since an earlier version; None if it was not.

    Args:
      path: the former name, "a.b.c" without "config.".
    """
    section, _, rest = path.partition(".")
    for former, now in _RENAMED.items():
        if path == former or path.startswith(f"{former}."):
            return now + path[len(former) :]
    return f"reward.{rest}".rstrip(".") if section == "reward_training" else None


def suggest_field(name: str, valid: Iterable[str], prefix: str = "", *, path: str | None = None) -> str:
    """A sentence for the error about an unknown field: its current name, that it is unsupported, or similar names.

    Args:
      name: the unknown field as the user wrote it, "a.b.c".
      valid: the fields that exist, in the same form.
      prefix: put before each suggested name.
      path: the full name, if `name` is only its last part.
    """
    now = new_name(path or name)
    if now is not None:
        return f"it is now config.{now}."
    valid, last = list(valid), name.lower().rpartition(".")[2]
    for pattern, feature in _UNSUPPORTED.items():
        if re.search(pattern, last):
            return f"{feature}: not supported yet."
    same = [path for path in valid if path.lower().rpartition(".")[2] == last]
    near = same or difflib.get_close_matches(name, valid, n=3)
    if last in _OTHER_NAMES and not same:
        return f"here it is config.{_OTHER_NAMES[last]}." if "=" not in _OTHER_NAMES[last] else _OTHER_NAMES[last]
    if near:
        return f"did you mean {' or '.join(prefix + path for path in near)}?"
    if any("." in path for path in valid):  # all fields of a run, too many to list
        return "configs/sft.py, configs/reward.py and configs/ppo.py explain the fields."
    return f"the fields are {', '.join(sorted(valid))}."


def suggest_value(name: str, valid: Sequence[str], what: str) -> str:
    """A sentence for the error about an invalid value: that it is unsupported, a similar one, or all valid ones.

    Args:
      name: the value as the user wrote it.
      valid: the valid values.
      what: what the values are, in the plural, such as "phases".
    """
    for pattern, feature in _UNSUPPORTED.items():
        if re.search(pattern, name.lower()):
            return f"{feature}: not supported yet."
    near = difflib.get_close_matches(name, valid, n=1)
    return f"did you mean {near[0]}?" if near else f"the {what} are {', '.join(valid)}."


def list_element_type(hint: Any) -> type:
    """The type of the elements of a list field, whose type hint is `tuple[str, ...]` or `tuple[int, ...] | None`."""
    return next(typing.get_args(option)[0] for option in _options(hint) if typing.get_origin(option) is tuple)


def _checked(hint: Any, value: Any, where: str) -> Any:
    options = _options(hint)
    if type(None) in options and value in (None, "None"):  # the text comes from a flag
        return None
    for option in options:
        origin = typing.get_origin(option)
        if origin is Literal and value in typing.get_args(option):
            return value
        if origin is tuple:
            items = _items(option, value)
            if items is not None:
                return items
        if dataclasses.is_dataclass(option):
            return from_mapping(cast(type, option), value, where)
        if option is float and isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        if isinstance(option, type) and origin is None and type(value) is option:
            return value
    raise ValueError(f"{where}={value!r}: expected {' or '.join(map(_type_name, options))}.")


def _options(hint: Any) -> tuple:
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _items(option: Any, value: Any) -> tuple | None:
    """The value as a tuple; None if its items have the wrong type."""
    kind = typing.get_args(option)[0]
    if kind is str:
        texts = [part.strip() for part in value.split(",")] if isinstance(value, str) else value
        if isinstance(texts, list | tuple) and all(isinstance(text, str) for text in texts):
            return tuple(text for text in texts if text.strip())
        return None
    if not isinstance(value, list | tuple) or any(isinstance(item, bool) for item in value):
        return None
    if kind is float:
        return tuple(map(float, value)) if all(isinstance(item, int | float) for item in value) else None
    return tuple(value) if all(type(item) is kind for item in value) else None


def _type_name(option: Any) -> str:
    if typing.get_origin(option) is Literal:
        return " or ".join(map(repr, typing.get_args(option)))
    if typing.get_origin(option) is tuple:
        return f"a tuple of {typing.get_args(option)[0].__name__}"
    return "None" if option is type(None) else getattr(option, "__name__", str(option))


@functools.cache
def field_docs(kind: type) -> dict[str, str]:
    """Field → its docstring in the source, as one line of text; includes the fields of parent classes."""
    docs: dict[str, str] = {}
    for parent in reversed(kind.__mro__):
        if not dataclasses.is_dataclass(parent):
            continue
        source = ast.parse(textwrap.dedent(inspect.getsource(parent)))
        body = next(node.body for node in source.body if isinstance(node, ast.ClassDef))
        for field, after in itertools.pairwise(body):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(after, ast.Expr)
                and isinstance(after.value, ast.Constant)
            ):
                docs[field.target.id] = " ".join(str(after.value.value).split())
    return docs


def to_config_dict(settings: Any) -> ConfigDict:
    """Converts a config dataclass to a ConfigDict that flags can override. A field that is None keeps its type."""
    hints = typing.get_type_hints(type(settings))
    result = ConfigDict()
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            value = to_config_dict(value)
        options = _options(hints[field.name])
        if type(None) in options and not {int, float}.isdisjoint(options):
            value = config_dict.FieldReference(
                value, field_type=object
            )  # a flag may set None; `from_mapping` checks the type
        elif value is None:
            option = next(option for option in options if option is not type(None))
            kind = {Literal: str, tuple: tuple}.get(typing.get_origin(option), option)
            value = config_dict.placeholder(kind)
        result[field.name] = value
    return result
