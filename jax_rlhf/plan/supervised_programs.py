"""The programs of SFT and of the reward model: training step, evaluation, sampling of responses, export."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from jax_rlhf.config import RunConfig
from jax_rlhf.data import PackedPairs, PairBatch, TextBatch
from jax_rlhf.hub import Pretrained
from jax_rlhf.models import Decoder
from jax_rlhf.models.decoder import Params
from jax_rlhf.models.split import SplitModel, SplitParams
from jax_rlhf.optim import supervised
from jax_rlhf.parallel import Layout, shardings_of
from jax_rlhf.plan.abstract import (
    Program,
    abstract_model,
    as_saved,
    decode_bytes,
    export_program,
    joined,
    replicated,
    shard_rows,
    sharded_rows,
    token_rows,
    with_shardings,
)
from jax_rlhf.ppo.resolve import batch_plan
from jax_rlhf.reward import calibration, train as reward
from jax_rlhf.reward.loss import reward_start
from jax_rlhf.rl import Prompts
from jax_rlhf.sampling import Sampling, sample_program
from jax_rlhf.sft import train as sft

_STEPS = 10_000  # arbitrary: the number of steps depends on the data, which a plan does not read, and affects no shape


@dataclasses.dataclass(frozen=True)
class _Phase:
    """The state of a phase on the devices, which its programs share."""

    name: str
    spec: supervised.TrainingSpec
    state: supervised.SupervisedState
    params: SplitParams
    layout: Layout

    @property
    def resident(self) -> dict[str, Any]:
        return {"parameters": (self.state.trainable, self.params.frozen), "optimizer": self.state.optimizer}

    def program(self, name: str, function: Any, arguments: tuple, transient: Any, **fields: Any) -> Program:
        fields = {"resident": self.resident} | fields
        return Program(self.name, name, function, arguments, transient=transient, layout=self.layout, **fields)

    def step(self, batch: Any) -> Program:
        arguments = self.spec, shardings_of(self.state), self.state, self.params.frozen, batch
        return self.program("step", supervised.step, arguments, batch)

    def export(self) -> list[Program]:
        return export_program(self.name, [(self.spec.network, self.params)], self.resident, self.layout)


def sft_programs(config: RunConfig, layout: Layout) -> list[Program]:
    """The programs of supervised fine-tuning."""
    data, pretrained = config.data, abstract_model(config.model, "lm", layout)
    assert pretrained is not None  # config.model has a path
    spec = sft.training_spec(
        config.sft,
        pretrained.model,
        data.sft_batch_size,
        config.sft.steps or _STEPS,
        trainable_layers=config.model.trainable_layers,
    )
    phase = _phase("sft", spec, pretrained, layout)
    ids, flags = token_rows(layout, data.sft_batch_size, data.max_tokens)
    batch = TextBatch(ids, flags, flags, ids, ids)
    evaluation = (spec.network, spec.loss, spec.microbatches, phase.state.trainable, phase.params.frozen, batch)
    made = [phase.step(batch), phase.program("evaluation", supervised.evaluation_sums, evaluation, batch)]
    if config.sft.sample_rows:
        sampling = Sampling(config.sft.sample_tokens, eos_ids=(pretrained.model.config.vocab_size - 1,))
        rows = config.sft.sample_rows + -config.sft.sample_rows % layout.num_shards("rows")
        whole, copied = joined(spec.network, phase.params, layout)
        arguments, transient, read = _responses(pretrained.model, whole, rows, config, sampling, layout)
        made.append(phase.program("responses", sample_program, arguments, (transient, copied), decode=read))
    return made + phase.export()


def reward_programs(config: RunConfig, layout: Layout) -> list[Program]:
    """The programs that train the reward model, and that sample and score responses to normalise its scores."""
    data, settings = config.data_of("reward"), config.reward
    pretrained = reward_model(config, layout)
    spec = reward.training_spec(settings, pretrained.model, data.reward_batch_size, settings.steps or _STEPS)
    phase, batch = _phase("reward", spec, pretrained, layout), _pairs(config, layout)
    arguments = spec.network, spec.microbatches, phase.params, batch
    made = [phase.step(batch), phase.program("evaluation", reward.batch_pair_scores, arguments, batch)]
    if settings.normalize_rows:
        made += _normalising(config, phase, layout)
    return made + phase.export()


def _pairs(config: RunConfig, layout: Layout) -> PairBatch | PackedPairs:
    data = config.data_of("reward")
    rows, width = data.reward_batch_size, data.max_tokens
    ids, flags = token_rows(layout, rows, width)
    if not data.packing:
        return PairBatch(ids, ids, flags, flags, sharded_rows(layout, jnp.float32, rows))
    width, slots = 2 * width, max(1, 2 * width // 64)  # assumes pairs of 32 tokens per text; few are shorter
    ids, flags = token_rows(layout, rows, width)
    last, real = token_rows(layout, rows, slots)
    return PackedPairs(ids, flags, ids, ids, last, last, real, sharded_rows(layout, jnp.float32, rows, slots))


def _normalising(config: RunConfig, phase: _Phase, layout: Layout) -> list[Program]:
    """Programs that sample responses of the SFT policy, which then is on the devices too, and that score them."""
    sampler, ppo, rows = policy(config, layout), config.ppo, config.data.ppo_batch_size
    sampling = dataclasses.replace(ppo.sampling, eos_ids=(sampler.model.config.vocab_size - 1,))
    arguments, transient, read = _responses(sampler.model, sampler.params, rows, config, sampling, layout)
    resident = phase.resident | {"parameters": (phase.state.trainable, phase.params.frozen, sampler.params)}
    responses = phase.program("responses", sample_program, arguments, transient, resident=resident, decode=read)
    samples, width = shard_rows(sample_program.eval_shape(*arguments), layout), config.data.prompt_width
    mask = sharded_rows(layout, jnp.bool_, *samples.tokens.shape)
    groups = rows // batch_plan(ppo, rows, width, layout, layout.platform).microbatch_size
    scored = phase.spec.network, groups, phase.params, samples.tokens, mask
    scores = phase.program("response scores", calibration.batch_text_scores, scored, (samples, mask), resident=resident)
    return [responses, scores]


def _responses(
    model: Decoder, params: Params, rows: int, config: RunConfig, sampling: Sampling, layout: Layout
) -> tuple[tuple, Any, float]:
    """(arguments of the sampler, those that are on the devices for it only, bytes that decoding reads)."""
    width = config.data.prompt_width
    tokens, mask = token_rows(layout, rows, width)
    key, ids = replicated(layout, jax.random.key(0)), sharded_rows(layout, jnp.int32, rows)
    arguments = (model, params, Prompts(tokens, mask, ids, columns=None), key, sampling)
    return arguments, (tokens, mask), decode_bytes(model, rows, width, sampling.max_new_tokens)


def policy(config: RunConfig, layout: Layout) -> Pretrained:
    """The SFT policy: that of `config.sft_model_path`, or the one that this run trains."""
    given = abstract_model(dataclasses.replace(config.model, path=config.sft_model_path), "lm", layout)
    start = abstract_model(config.model, "lm", layout)
    assert start is not None, "the actor has a path"
    return given or as_saved(start)


def reward_model(config: RunConfig, layout: Layout) -> Pretrained:
    """The model with which the training of the reward model starts."""
    settings, layers, models = config.reward, config.reward.num_layers, []
    start = dataclasses.replace(config.model, path=settings.start_from, revision=settings.start_revision)
    pretrained = abstract_model(start, "lm", layout)
    pretrained = pretrained or policy(config, layout)

    def cut(params: Any) -> Any:
        start = reward_start(dataclasses.replace(pretrained, params=params), layers, jax.random.key(0))
        models.append(start.model)
        return start.params

    shapes = jax.eval_shape(cut, pretrained.params)
    shardings = SplitModel(models[0]).shardings(layout).trainable
    return Pretrained(models[0], with_shardings(shapes, shardings))


def _phase(name: str, spec: supervised.TrainingSpec, pretrained: Pretrained, layout: Layout) -> _Phase:
    shardings = spec.network.shardings(layout)
    shapes = jax.eval_shape(functools.partial(supervised.split_params, spec), pretrained.params)
    params = SplitParams(
        with_shardings(shapes.frozen, shardings.frozen), with_shardings(shapes.trainable, shardings.trainable)
    )
    state = with_shardings(
        supervised.abstract_state(spec, params.trainable), supervised.state_shardings(spec, params.trainable, layout)
    )
    return _Phase(name, spec, state, SplitParams(params.frozen, state.trainable), layout)
