"""Two real processes load a model that is sharded over both, and one of them writes it."""

from jax_rlhf import load_pretrained
from tests.hub import tiny
from tests.hub.test_pretrained import same_params
from tests.processes import finish, free_port, start

SHARE = """
import sys, jax, numpy as np
jax.distributed.initialize(f"127.0.0.1:{sys.argv[1]}", 2, int(sys.argv[2]), initialization_timeout=60)
import jax_rlhf
from jax.sharding import Mesh
mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("fsdp", "tensor"))
pretrained = jax_rlhf.load_pretrained(sys.argv[3], mesh=mesh)
kernel = pretrained.params["layers"]["attention"]["query"]["kernel"]
assert not kernel.is_fully_addressable
assert sum(shard.data.size for shard in kernel.addressable_shards) == kernel.size // 2
from jax_rlhf.parallel import ProcessError, barrier
faults = (KeyError("a bug"), True), (ValueError("a setting"), False), (jax_rlhf.RewardError("x"), False)
for fault, internal in faults:
    try:
        with barrier("a part"):
            if sys.argv[2] == "1":
                raise fault
        raise SystemExit("nobody failed")
    except ProcessError as error:
        assert sys.argv[2] == "0" and error.internal == internal, (fault, error.internal)
    except type(fault):
        assert sys.argv[2] == "1" and fault.on_all_processes
try:
    jax_rlhf.save_pretrained(sys.argv[4], pretrained, max_shard_bytes=40_000)
except OSError as error:
    print("refused:", error)
"""


def run_both(source, target):
    port = free_port()
    processes = [start(SHARE, port, index, source, target, devices=4) for index in range(2)]
    # Gloo's threads print too, and may split lines.
    return [finish(process, timeout=180).partition("refused:")[2] for process in processes]


def test_two_processes_save_the_model_that_they_loaded(tmp_path):
    source = tiny.write_checkpoint(tmp_path / "gpt2", "gpt2")
    assert run_both(source, tmp_path / "saved") == ["", ""]
    assert same_params(load_pretrained(tmp_path / "saved").params, load_pretrained(source).params)


def test_a_failed_write_is_an_error_on_both_processes(tmp_path):
    source = tiny.write_checkpoint(tmp_path / "gpt2", "gpt2")
    target = tmp_path / "saved"
    target.mkdir()
    (target / "thesis.docx").write_text("years of work")
    first, second = run_both(source, target)
    assert "thesis.docx" in first
    assert "process 0 could not write" in second
    assert [path.name for path in target.iterdir()] == ["thesis.docx"]
