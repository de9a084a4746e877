"""No device gathers the embeddings of the whole batch, and XLA reports no full rematerialization, on any mesh.

XLA has no such report for TPU, so the tests read the compiled text too.
"""

import contextlib
import math
import os
import re
import tempfile

import jax
import pytest

from jax_rlhf.parallel import create_layout
from jax_rlhf.plan.all_programs import programs_of
from jax_rlhf.plan.collectives import collectives
from tests.plan import tiny

FORMS = [(8, 1, 1), (1, 8, 1), (1, 1, 8), (4, 2, 1), (2, 4, 1), (4, 1, 2), (2, 1, 4), (1, 4, 2), (1, 2, 4), (2, 2, 2)]
ROWS, MICRO, TOKENS = 32, 16, 192  # no other array has these leading sizes
LEARNED = {"model_type": "opt", "ffn_dim": 2048, "word_embed_proj_dim": 512, "activation_function": "relu"}


@contextlib.contextmanager
def standard_error():
    """Captures standard error, including that of XLA's C++. Yields a list that gets one text at the end."""
    said, kept = [], os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield said
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            said.append(file.read().decode(errors="replace"))


def programs(folder, monkeypatch, chips, form, phases, **shape):
    monkeypatch.setattr(tiny, "SHAPE", {**tiny.SHAPE, **shape})
    flat = dict(zip(("mesh.data", "mesh.fsdp", "mesh.tensor"), form, strict=True))
    flat |= {"data.max_prompt_tokens": 64, "data.max_tokens": TOKENS, "ppo.microbatch_size": MICRO, "phases": phases}
    settings = tiny.settings(folder, **flat)
    devices = jax.devices() if chips == "cpu" else tiny.topology(chips).devices
    return programs_of(settings, create_layout(settings.mesh, settings.rollout_mesh, devices))


def whole_embeddings(text, form, rows):
    """The lines of a compiled program whose result has more of the batch's embeddings than a device's share."""
    share = rows * TOKENS * tiny.SHAPE["hidden_size"] // (form[0] * form[1])
    found = []
    for line in text.splitlines():
        for sizes in re.findall(r"\b(?:f32|bf16)\[([\d,]+)\]", line.partition("(")[0]):
            sizes = [int(size) for size in sizes.split(",")]
            of_batch = sizes[:2] == [rows, TOKENS] or sizes[0] == rows * TOKENS
            if of_batch and math.prod(sizes) > share:
                found.append(line.strip()[:400])
    return found


def check(made, form):
    """Compiles and checks the programs. Returns their compiled texts by name."""
    texts = {}
    for program in made:
        with standard_error() as said:
            text = program.function.lower(*program.arguments).compile().as_text()
        where = f"{program.phase} {program.name} on {form}"
        reports = [line for line in said[0].splitlines() if "nvoluntary full rematerialization" in line]
        assert not reports, f"{where}: {reports}"
        both = 2 * ROWS if program.phase == "reward" else ROWS  # chosen and rejected
        rows = {"step": both, "evaluation": both, "update": MICRO}.get(program.name, ROWS)
        assert whole_embeddings(text, form, rows) == [], where
        texts[program.name] = text
    return texts


@pytest.mark.parametrize("form", [(2, 2, 2), (2, 4, 1)])  # data and fsdp are both above 1, which once failed
def test_each_device_embeds_only_its_own_rows(tmp_path, monkeypatch, form):
    made = programs(tmp_path, monkeypatch, "cpu", form, ("sft", "ppo"))
    check([one for one in made if one.name in ("step", "rollout and scoring")], form)


def test_learned_positions_and_narrow_embeddings_stay_sharded(tmp_path, monkeypatch):
    made = programs(tmp_path, monkeypatch, "cpu", (2, 2, 2), ("sft",), **LEARNED)
    check(made[:1], (2, 2, 2))


@pytest.mark.parametrize("chips", [pytest.param("v5e:2x4", marks=pytest.mark.slow), "h100:2x4"])
def test_embeddings_stay_sharded_on_tpu_and_gpu(tmp_path, monkeypatch, chips):
    made = programs(tmp_path, monkeypatch, chips, (2, 2, 2), ("sft",))
    check(made[:1], (2, 2, 2))


def test_scoring_sends_no_rows_between_machines(tmp_path, monkeypatch):
    made = programs(tmp_path, monkeypatch, "h100:2x4", (2, 2, 2), ("ppo",))
    texts = check([one for one in made if one.name == "scoring"], (2, 2, 2))
    between = [
        one for one in collectives(texts["scoring"], devices=8, devices_per_machine=4) if one.local_group < one.group
    ]
    assert sum(one.count * one.bytes for one in between) < 1000  # bytes, for the means of metrics


@pytest.mark.slow
@pytest.mark.parametrize("chips", ["cpu", "v5e:2x4", "h100:2x4"])
@pytest.mark.parametrize("form", FORMS)
def test_embeddings_stay_sharded_in_all_programs_on_all_meshes(tmp_path, monkeypatch, chips, form):
    check(programs(tmp_path, monkeypatch, chips, form, ("sft", "reward", "ppo")), form)
