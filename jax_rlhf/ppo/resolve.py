"""Fills in what PPO's settings leave open and only a run knows."""

import dataclasses

import jax

from jax_rlhf.data.config import DataConfig
from jax_rlhf.optim.microbatches import BatchPlan, plan_batch
from jax_rlhf.parallel import Layout
from jax_rlhf.ppo.config import PPOConfig


def resolve(
    config: PPOConfig,
    data: DataConfig,
    layout: Layout | None,
    *,
    eos_ids: tuple[int, ...] | None = None,
    pad_id: int | None = None,
) -> PPOConfig:
    """Fills in what the settings leave open and only a run knows: ids, schedules' ends, and with PPO-ptx microbatches.

    Args:
      config: PPO's.
      data: the run's, with the sizes of its batches.
      layout: the mesh; None = one device.
      eos_ids, pad_id: where the settings say none; None = they stay open.

    Returns:
      The settings. Without PPO-ptx `microbatch_size` stays None where it is: each width of prompts has its own.

    Raises:
      ValueError: the sizes do not divide, or the SFT batch cannot be spread over the microbatches; says which would.
    """
    given, width = config.sampling, data.prompt_width
    sampling = dataclasses.replace(
        given,
        eos_ids=eos_ids if given.eos_ids is None else given.eos_ids,
        pad_id=pad_id if given.pad_id is None else given.pad_id,
    )
    config = dataclasses.replace(config.with_schedule_ends(), sampling=sampling)
    platform = jax.default_backend() if layout is None else layout.platform
    rows_field = "config.data.ppo_batch_size"
    micro = batch_plan(config, data.ppo_batch_size, width, layout, platform, rows_field=rows_field).microbatch_size
    if not config.loss.ptx_coef:
        return config
    groups = data.ppo_batch_size // micro
    if data.sft_batch_size % groups:
        raise ValueError(
            f"config.data.sft_batch_size={data.sft_batch_size} texts (config.ppo.loss.ptx_coef > 0) cannot be spread "
            f"over the {groups} microbatches of an iteration; take {groups} or a multiple of it, or a larger "
            "config.ppo.microbatch_size."
        )
    return dataclasses.replace(config, microbatch_size=micro)


def batch_plan(
    config: PPOConfig,
    rows: int,
    prompt_tokens: int,
    layout: Layout | None,
    platform: str,
    *,
    rows_field: str | None = None,
) -> BatchPlan:
    """How the rows of an iteration are cut.

    Args:
      config: PPO's.
      rows: of the iteration, of all processes.
      prompt_tokens: P.
      layout: the mesh; None = one device.
      platform: "cpu", "gpu" or "tpu".
      rows_field: the config field that sets `rows`, for messages; None = the caller passed the batch.

    Returns:
      The plan.

    Raises:
      ValueError: the rows do not divide; the message says how many would.
    """
    return plan_batch(
        rows,
        config.microbatch_size,
        layout,
        where="config.ppo",
        rows_field=rows_field,
        num_minibatches=config.num_minibatches,
        tokens_per_row=prompt_tokens + config.sampling.max_new_tokens,
        platform=platform,
    )
