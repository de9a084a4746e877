"""The memory that loading a checkpoint needs."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from jax_rlhf.hub import config_from_hub
from jax_rlhf.hub.families import hub_tensors
from jax_rlhf.models import Decoder, abstract_params
from tests.processes import finish, start

# Peak resident memory is read from VmHWM, because `ru_maxrss` of a child process starts at its parent's value.
PROGRAM = """
import json, sys, jax, numpy as np, jax_rlhf
from jax.sharding import Mesh
def resident(kind):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(kind))
mesh = None if sys.argv[2] == "1" else Mesh(np.array(jax.devices()), ("fsdp",))
jax.block_until_ready(jax.jit(lambda x: x + 1)(1.0))
jax_rlhf.load_pretrained(sys.argv[3], mesh=mesh)  # a small one first: imports and compilation are not the model's
open("/proc/self/clear_refs", "w").write("5")  # the peak so far is forgotten
before = resident("VmRSS")
params = jax_rlhf.load_pretrained(sys.argv[1], mesh=mesh).params
size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
print(json.dumps({"ratio": (resident("VmHWM") - before) / size, "size": size}))
"""


def checkpoint(folder, dtype=np.float32, **sizes):
    config = {"model_type": "llama", "num_attention_heads": 8, "max_position_embeddings": 64, **sizes}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    model = Decoder(config_from_hub(config))
    assert abstract_params(model)
    tensors = {}
    for tensor in hub_tensors(model):
        for name in (
            [tensor.name.format(i) for i in range(sizes["num_hidden_layers"])] if tensor.stacked else [tensor.name]
        ):
            tensors[name] = np.full(tensor.hub_shape, 0.01, dtype)
    save_file(tensors, folder / "model.safetensors")
    return folder


SMALL = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
SHAPES = {
    "mostly_layers": {"vocab_size": 1000, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 6},
    "mostly_embedding": {
        "vocab_size": 100_000,
        "hidden_size": 1024,
        "intermediate_size": 1024,
        "num_hidden_layers": 1,
        "tie_word_embeddings": True,
    },
}


SLOW = pytest.mark.slow
CASES = [  # each shape, device count and dtype once; the others are run with the slow tests
    ("mostly_layers", 8, np.float32),
    ("mostly_embedding", 1, np.float16),
    ("mostly_embedding", 8, np.float32),
    pytest.param("mostly_layers", 1, np.float32, marks=SLOW),
    pytest.param("mostly_layers", 1, np.float16, marks=SLOW),
    pytest.param("mostly_embedding", 1, np.float32, marks=SLOW),
]


@pytest.mark.parametrize(("shape", "devices", "dtype"), CASES, ids=str)
def test_peak_memory_of_loading_is_under_1_5_times_the_parameters(shape, devices, dtype, tmp_path):
    large = checkpoint(tmp_path / "large", dtype, **SHAPES[shape])
    small = checkpoint(tmp_path / "small", dtype, **SMALL)
    measured = json.loads(finish(start(PROGRAM, large, devices, small, devices=devices)).splitlines()[-1])
    print(measured)
    assert measured["size"] > 2e8 if dtype == np.float16 else measured["size"] > 3e8
    assert 0.9 < measured["ratio"] < 1.5


def test_abstract_params_allocates_no_arrays():
    config = config_from_hub({"model_type": "llama", **SHAPES["mostly_embedding"], "num_attention_heads": 8})
    assert isinstance(jax.tree.leaves(abstract_params(Decoder(config)))[0], jax.ShapeDtypeStruct)
