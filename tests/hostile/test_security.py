"""The promises of docs/security.md: no code from a checkpoint is run, and no file name leads out of its folder."""

import ast
import json
import os
import subprocess
import sys

import pytest
from safetensors.numpy import save_file

from jax_rlhf import CheckpointError, load_pretrained, save_pretrained
from jax_rlhf.data import DataError
from jax_rlhf.data.sources import read_rows
from jax_rlhf.runtime.config import LogConfig
from jax_rlhf.runtime.run_logger import RunLogger
from tests.cli import tiny
from tests.hub import tiny as hub
from tests.processes import ROOT

RUN_CODE = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "runpy", "code"}
NODES = [node for file in (ROOT / "jax_rlhf").rglob("*.py") for node in ast.walk(ast.parse(file.read_text()))]


def test_the_package_does_not_unpickle_or_evaluate_code():
    assert len(NODES) > 10_000
    for node in NODES:
        if isinstance(node, ast.Import):
            assert not {alias.name.partition(".")[0] for alias in node.names} & RUN_CODE
        if isinstance(node, ast.ImportFrom):
            assert (node.module or "").partition(".")[0] not in RUN_CODE
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name):
                assert node.func.id not in ("eval", "exec", "compile", "__import__")
            for argument in node.keywords:
                if argument.arg in ("trust_remote_code", "allow_pickle"):
                    assert isinstance(argument.value, ast.Constant)
                    assert argument.value.value is False


def test_code_in_the_folder_of_a_checkpoint_is_not_run(tmp_path):
    folder = tmp_path / "model"
    tiny.checkpoint(folder)
    code = f"import pathlib; pathlib.Path({str(tmp_path / 'ran')!r}).touch()\nclass Own: pass\n"
    for name in ("modeling_own.py", "configuration_own.py", "tokenization_own.py"):
        (folder / name).write_text(code)
    for name, classes in (
        ("config.json", {"AutoConfig": "configuration_own.Own", "AutoModelForCausalLM": "modeling_own.Own"}),
        ("tokenizer_config.json", {"AutoTokenizer": ["tokenization_own.Own", "tokenization_own.Own"]}),
    ):
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | {"auto_map": classes}))
    try:
        load_pretrained(folder)
    except CheckpointError as error:  # transformers may refuse it
        print(error)
    assert not (tmp_path / "ran").exists()


def test_a_chat_template_cannot_reach_python(tmp_path):
    folder = tmp_path / "model"
    tiny.checkpoint(folder)
    touch = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    (folder / "chat_template.jinja").write_text(touch)
    tokenizer = load_pretrained(folder).tokenizer
    with pytest.raises(Exception, match=r"unsafe|not safe|access"):
        tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "sub/inside.safetensors", "..", 7])
def test_an_index_cannot_name_a_file_outside_its_folder(tmp_path, name):
    folder = hub.write_checkpoint(tmp_path / "model", "llama")
    (folder / "model.safetensors").rename(tmp_path / "outside.safetensors")
    names = dict.fromkeys(hub.tensors("llama"), name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    with pytest.raises(CheckpointError, match="which is not in its folder"):
        load_pretrained(folder)


def test_a_tensor_name_is_not_used_as_a_path(tmp_path):
    folder = hub.write_checkpoint(tmp_path / "model", "llama")
    save_file(
        hub.tensors("llama") | {"../../escaped": hub.weight("x", (2,), around_one=False)}, folder / "model.safetensors"
    )
    with pytest.raises(CheckpointError, match=r"not part of the model.*\.\./\.\./escaped"):
        load_pretrained(folder)
    assert not list(tmp_path.parent.glob("escaped*"))


def test_a_saved_model_contains_no_code(tmp_path):
    pretrained = load_pretrained(tiny.checkpoint(tmp_path / "base"))
    save_pretrained(tmp_path / "saved", pretrained)
    assert {file.suffix for file in (tmp_path / "saved").iterdir()} <= {".json", ".safetensors", ".jinja"}


def test_logged_texts_cannot_control_the_terminal(tmp_path, capsys):
    with RunLogger(tmp_path / "ppo", LogConfig(tensorboard=False)) as logger:
        logger.info("harmless \x1b]0;title\x07\x1b[2J\u202e\r text")
        logger.log_samples([{"response": "\x1b[31m</script>\ud800\x9b\u202eö€😀"}])
    assert "\x1b" not in capsys.readouterr().out
    (line,) = (tmp_path / "ppo" / "samples.jsonl").read_bytes().splitlines()
    assert line.decode().isprintable()  # JSON escapes the other characters
    assert "ö€😀" in line.decode()
    assert json.loads(line)["response"] == "\x1b[31m</script>\ud800\x9b\u202eö€😀"


ESCAPES = "harmless \x1b]0;title\x07\x1b[2J\u202e\r\x9b text"

LOGS = f"""
import logging, sys, threading, warnings
from absl import logging as absl_logging
import transformers
from jax_rlhf.io.terminal import make_output_harmless
make_output_harmless()
text = {ESCAPES!r}
logging.getLogger("other").warning("%s", text)
logging.getLogger("other").addHandler(logging.StreamHandler())
logging.getLogger("other").warning("message %s", text)
transformers.logging.get_logger("transformers.x").warning(text)
absl_logging.warning("%s", text)
absl_logging.use_absl_handler()
absl_logging.error(text)
warnings.warn(text)
try:
    raise ValueError(text)
except ValueError:
    logging.getLogger("other").exception("it failed")
    absl_logging.exception("it failed")
def fails():
    raise ValueError(text)
thread = threading.Thread(target=fails)
thread.start()
thread.join()
class Ends:
    def __del__(self):
        raise ValueError(text)
Ends()
print("\\udc80 \\ud800")
raise ValueError(text)
"""


def test_output_of_other_packages_cannot_control_the_terminal():
    """Tests loggers, warnings, and tracebacks of threads, of finalizers and of the program itself."""
    done = subprocess.run([sys.executable, "-c", LOGS], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1
    said = done.stderr + done.stdout
    assert said.count("harmless") >= 12
    strange = {character for character in said if not character.isprintable()} - {"\n"}
    assert strange == set()
    assert "\\udc80" in done.stdout


def test_impossible_file_names_end_in_a_documented_error(tmp_path):
    for name in (
        "x" * 5000,
        "a\x00b",
        "~nobody-of-that-name/x",
        f"{'x' * 300}/config.json",
        f"{tmp_path}/{'y' * 300}.jsonl",
    ):
        with pytest.raises((FileNotFoundError, CheckpointError)):
            load_pretrained(name)
        with pytest.raises((FileNotFoundError, DataError)):
            read_rows(name, phase="sft", split="train", hub_split="train")


def test_access_tokens_of_the_environment_are_not_written_or_printed(tmp_path, monkeypatch):
    from tests.cli import test_end_to_end as alone

    secrets = {name: f"hf_secret_{name}" for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY")}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    done = alone.run(tmp_path, "--config.phases=sft", "--config.sft.steps=2", "--verbosity=1")
    assert done[0] == 0, done[2][-3000:]
    written = [file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()]
    assert len(written) > 10
    for content in (*written, done[1].encode(), done[2].encode()):
        assert b"hf_secret" not in content
    assert os.environ["HF_TOKEN"]
