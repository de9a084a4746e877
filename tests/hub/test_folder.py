"""A model folder is replaced atomically: after a crash it is the old one or the new one."""

import errno
import random
import resource
import signal
import time

import numpy as np
import pytest
from safetensors.numpy import save_file

from jax_rlhf import load_pretrained, save_pretrained
from jax_rlhf.hub import folder as folders
from jax_rlhf.hub.folder import replaced_folder
from tests.data.tiny import tokenizer
from tests.hub import tiny
from tests.hub.test_pretrained import same_params
from tests.processes import start

SAVE_FOR_EVER = """
import sys, jax, jax_rlhf
models = [jax_rlhf.load_pretrained(folder) for folder in sys.argv[1:3]]
print("ready", flush=True)
while True:
    for model in models:
        jax_rlhf.save_pretrained(sys.argv[3], model, max_shard_bytes=30_000)
"""


def test_after_a_kill_the_target_is_one_of_two_complete_models(tmp_path):
    """A process saves two models of different shapes to one folder in turns. A kill never mixes or loses them."""
    sources = [tiny.write_checkpoint(tmp_path / case, case) for case in ("llama", "opt")]
    target = tmp_path / "model"
    models = [load_pretrained(source) for source in sources]
    save_pretrained(target, models[0])
    draw, seen = random.Random(5), set()
    for _ in range(3):
        process = start(SAVE_FOR_EVER, *sources, target)
        assert process.stdout.readline() == "ready\n", process.stderr.read()
        time.sleep(draw.uniform(0.05, 0.6))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        found = load_pretrained(target)
        which = [found.model.config == model.model.config for model in models].index(True)
        assert same_params(found.params, models[which].params)
        seen.add(which)
    save_pretrained(target, models[0])
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]  # partial folders were removed


def test_an_error_while_writing_leaves_the_old_folder_unchanged(tmp_path, monkeypatch):
    pretrained = load_pretrained(tiny.write_checkpoint(tmp_path / "llama", "llama"))
    save_pretrained(tmp_path / "model", pretrained)
    before = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("jax_rlhf.hub.write.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        save_pretrained(tmp_path / "model", pretrained)
    assert {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llama", "model"]


@pytest.mark.parametrize("content", ["weights", "tokenizer", "text"])
def test_a_file_that_cannot_be_written_is_an_oserror_with_errno_and_path(tmp_path, content):
    """safetensors and tokenizers raise other exceptions, and Python's OSError of a write does not name the file."""
    write = {
        "weights": lambda folder: save_file({"weight": np.zeros(100)}, folder / "model.safetensors"),
        "tokenizer": lambda folder: tokenizer().backend_tokenizer.save(str(folder / "tokenizer.json")),
        "text": lambda folder: (folder / "config.json").write_text("{}" * 100),
    }[content]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50, limits[1]))  # bytes per file
    try:
        with pytest.raises(OSError, match="File too large") as caught, replaced_folder(tmp_path / "model") as folder:
            write(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(tmp_path / "model"))
    assert list(tmp_path.iterdir()) == []


def test_two_renames_are_used_where_folders_cannot_be_exchanged(tmp_path, monkeypatch):
    monkeypatch.setattr(folders.sys, "platform", "other")
    for content in ("old", "new"):
        with replaced_folder(tmp_path / "model") as fresh:
            (fresh / "config.json").write_text(content)
        assert (tmp_path / "model" / "config.json").read_text() == content
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_folder_with_other_files_is_not_replaced(tmp_path):
    pretrained = load_pretrained(tiny.write_checkpoint(tmp_path / "llama", "llama"))
    for name in ("thesis.docx", "checkpoints"):
        target = tmp_path / name.split(".")[0]
        target.mkdir()
        (target / name).mkdir() if "." not in name else (target / name).write_text("years of work")
        with pytest.raises(FileExistsError, match=name):
            save_pretrained(target, pretrained)
        assert (target / name).exists()
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileExistsError, match="is a file"):
        save_pretrained(tmp_path / "file", pretrained)


def test_saved_files_have_the_default_permissions(tmp_path):
    """safetensors makes files that only their owner can read, but another user may serve the model."""
    save_pretrained(tmp_path / "model", load_pretrained(tiny.write_checkpoint(tmp_path / "llama", "llama")))
    (tmp_path / "plain").write_text("x")
    expected = (tmp_path / "plain").stat().st_mode
    assert {path.stat().st_mode for path in (tmp_path / "model").iterdir()} == {expected}


def test_missing_parents_are_made_and_stale_partial_folders_are_removed(tmp_path):
    pretrained = load_pretrained(tiny.write_checkpoint(tmp_path / "llama", "llama"))
    stale = tmp_path / "runs" / ".model.partial-1"
    stale.mkdir(parents=True)
    mine = tmp_path / "runs" / ".model.partial-thesis"
    mine.mkdir()
    (stale / "model.safetensors").write_text("half")
    save_pretrained(tmp_path / "runs" / "model", pretrained)
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == [".model.partial-thesis", "model"]
