"""The arguments of a plan's programs equal those of the run's programs, leaf by leaf."""

import functools

import jax
import jax.numpy as jnp
import pytest
from safetensors import safe_open

from jax_rlhf import load_pretrained, save_pretrained
from jax_rlhf.cli.phases import run_phase
from jax_rlhf.config import run_config
from jax_rlhf.optim import supervised
from jax_rlhf.parallel import create_layout, partition
from jax_rlhf.plan.all_programs import programs_of
from jax_rlhf.ppo import trainer
from jax_rlhf.reward import calibration, train as reward
from jax_rlhf.sampling import sampler
from tests.cli import tiny


def leaves(arguments):
    """path → (shape, dtype, shape of one device's shard, whether it is in host memory) of each array."""
    arrays = [argument for argument in arguments if jax.tree.leaves(argument, is_leaf=is_array)]
    found = jax.tree_util.tree_flatten_with_path(arrays)[0]
    return {
        jax.tree_util.keystr(path): (leaf.shape, leaf.dtype, leaf.sharding.shard_shape(leaf.shape), kind(leaf))
        for path, leaf in found
        if is_array(leaf)
    }


def is_array(leaf):
    return isinstance(leaf, jax.Array | jax.ShapeDtypeStruct)


def kind(leaf):
    return leaf.sharding.memory_kind == "pinned_host"


def compared(name, arguments):
    """The arguments to compare: of sampling only the parameters, since the batch is as wide as the longest prompt."""
    return {"sample_program": arguments[1:2], "take_replicated": arguments[:1]}.get(name, arguments)


@pytest.fixture
def called(monkeypatch):
    """program → the arguments of its first call. Each exported array has its own entry."""
    found = {}

    def watch(module, name, kept):
        function = getattr(module, name)

        @functools.wraps(function)
        def call(*arguments):
            found.setdefault(kept(arguments), leaves(compared(name, arguments)))
            return function(*arguments)

        monkeypatch.setattr(module, name, call)

    def watch_made(name):
        """Watches the calls of the function that make_<name> returns."""
        make = getattr(trainer, f"make_{name}")

        def made(*static, **options):
            function = make(*static, **options)

            def call(*arguments):
                found.setdefault(name, leaves(arguments))
                return function(*arguments)

            call.eval_shape = function.eval_shape
            return call

        monkeypatch.setattr(trainer, f"make_{name}", made)

    watch(supervised, "step", lambda arguments: f"{arguments[0].network.model.head} step")
    watch(supervised, "evaluation_sums", lambda _: "sft evaluation")
    watch(reward, "batch_pair_scores", lambda _: "reward evaluation")
    watch(calibration, "batch_text_scores", lambda _: "reward response scores")
    watch(sampler, "sample_program", lambda arguments: f"responses of {len(arguments[2].tokens)}")
    watch(partition, "take_replicated", lambda arguments: ("export", str(leaves(arguments[:1]))))
    for name in ("experience", "sample", "score", "update"):
        watch_made(name)
    return found


ALL = {"ppo.loss.ptx_coef": 0.1}
TOP = {
    "model.trainable_layers": 1,
    "critic.trainable_layers": 1,
    "ppo.actor.ema_decay": 0.9,
    "ppo.time_phases": True,
    "reference.offload": True,
}


@pytest.mark.parametrize(("stored", "changes"), [("bfloat16", ALL), ("float32", TOP)])
def test_the_plan_has_the_shapes_dtypes_and_shardings_of_the_run(stored, changes, tmp_path, called):
    """The run computes in bfloat16, whatever the checkpoint's dtype. Frozen kernels are bfloat16 too."""
    config = tiny.config(tmp_path)
    save_pretrained(tmp_path / "base", load_pretrained(tmp_path / "base", dtype=stored))
    config.model.dtype = config.reference.dtype = config.critic.dtype = config.reward_model.dtype = "bfloat16"
    config.sft.steps = config.reward.steps = config.ppo.iterations = 1
    config.data.ppo_batch_size = 16
    config.data.eval_rows, config.sft.sample_rows, config.reward.normalize_rows = 2, 8, 8
    config.update_from_flattened_dict(changes)
    if config.reference.offload:
        config.reference.path = str(tmp_path / "base")
    settings = run_config(config)
    layout = create_layout(settings.mesh, settings.rollout_mesh)
    names = {"rollout and scoring": "experience", "rollout": "sample", "scoring": "score", "update": "update"}
    names = {f"ppo {name}": called_as for name, called_as in names.items()}
    names |= {"sft step": "lm step", "reward step": "scalar step"}
    names |= {"sft responses": "responses of 8", "reward responses": "responses of 16"}
    planned, exports = {}, []
    for one in programs_of(settings, layout):
        arguments = leaves(compared(one.function.__name__, one.arguments))
        if one.name == "export":
            exports.append(("export", str(arguments)))
        else:
            planned[names.get(f"{one.phase} {one.name}", f"{one.phase} {one.name}")] = arguments

    workdir = tmp_path / "run"
    for phase in ("sft", "reward", "ppo"):
        (workdir / phase).mkdir(parents=True)
        run_phase(phase, settings, workdir)
    assert set(exports) <= called.keys()
    assert {name for name in called if isinstance(name, str)} == planned.keys()
    for program, arguments in planned.items():
        assert called[program] == arguments, program
    frozen = {
        path: dtype
        for path, (_, dtype, _, _) in called["update"].items()
        if ".reference." in path or ".reward." in path or path.endswith(".frozen")
    }
    in_float32 = [path for path, dtype in frozen.items() if dtype != jnp.bfloat16]
    assert frozen
    assert all("norm" in path or "scalar_head" in path for path in in_float32)
    for model in ("sft/model", "reward/model", "ppo/model", "ppo/critic"):  # saved in the dtype of the computation
        with safe_open(workdir / model / "model.safetensors", "np") as file:
            kinds = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
        assert {kind for name, kind in kinds.items() if "norm" in name or "score" in name} == {"F32"}
        assert {kind for name, kind in kinds.items() if "norm" not in name and "score" not in name} == {"BF16"}
