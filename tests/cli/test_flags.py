"""Command-line flags: lists, configs, misspelled fields, and fields of other frameworks."""

import functools
import importlib
import re
import subprocess
import sys
import tomllib

import pytest
from absl import flags

import jax_rlhf
from jax_rlhf.cli import flags as command_line
from jax_rlhf.cli.packaged import packaged_config, packaged_configs
from jax_rlhf.config import default_config, run_config
from jax_rlhf.settings import _OTHER_NAMES, _RENAMED
from tests.cli.test_end_to_end import environment
from tests.processes import ROOT


@pytest.fixture
def parsed(monkeypatch):
    """parsed(*arguments): the settings that the program makes of a command line, with absl flags of this test only."""

    def parse(*arguments):
        values = flags.FlagValues()
        monkeypatch.setattr(flags, "FLAGS", values)
        values["verbosity"] = flags.Flag(flags.IntegerParser(), None, "verbosity", 0, "")
        arguments = ["jax-rlhf", *arguments]
        monkeypatch.setattr(sys, "argv", arguments)
        config = command_line.config_flags.DEFINE_config_file("config", flag_values=values)
        monkeypatch.setattr(command_line, "CONFIG", config)
        command_line.parse_flags(arguments)
        return run_config(config.value)

    return parse


@pytest.fixture
def refused(parsed, capsys):
    """refused(*arguments): the error message for a wrong command line, which follows a line with the usage."""

    def refuse(*arguments):
        with pytest.raises(SystemExit) as stopped:
            parsed(*arguments)
        assert stopped.value.code == 2
        usage, error = capsys.readouterr().err.splitlines()
        assert usage.startswith("usage: jax-rlhf --config=")
        assert error.startswith("error: ")
        return error.removeprefix("error: ")

    return refuse


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("a.jsonl,b.jsonl", ("a.jsonl", "b.jsonl")),
        ("/data/a.jsonl,/data/b.jsonl", ("/data/a.jsonl", "/data/b.jsonl")),
        ("./a.jsonl,../b.jsonl", ("./a.jsonl", "../b.jsonl")),
        ("~/a,~/b", ("~/a", "~/b")),
        ("part-1.jsonl,part-2.jsonl", ("part-1.jsonl", "part-2.jsonl")),
        ("2024,2025", ("2024", "2025")),
        ("2024.jsonl", ("2024.jsonl",)),
        ("1e5", ("1e5",)),
        ("True,None", ("True", "None")),
        ("my rows.jsonl,other rows.jsonl", ("my rows.jsonl", "other rows.jsonl")),
        ("a.jsonl, b.jsonl,", ("a.jsonl", "b.jsonl")),
        ("package.module:function,b.jsonl", ("package.module:function", "b.jsonl")),
        ("org/name,gs://bucket/x.jsonl", ("org/name", "gs://bucket/x.jsonl")),
        ('"a,b.jsonl",c.jsonl', ("a,b.jsonl", "c.jsonl")),
        ("'a,b.jsonl','c d.jsonl'", ("a,b.jsonl", "c d.jsonl")),
        ("bob's.jsonl,c.jsonl", ("bob's.jsonl", "c.jsonl")),
        ("(copy) a.jsonl,b.jsonl", ("(copy) a.jsonl", "b.jsonl")),
        ("[1].jsonl", ("[1].jsonl",)),
        ("(1)", ("(1)",)),
        ("[2024]", ("[2024]",)),
        ("('a.jsonl', 'b,c.jsonl')", ("a.jsonl", "b,c.jsonl")),
        ('["a.jsonl"]', ("a.jsonl",)),
        ("数据/问.jsonl,b.jsonl", ("数据/问.jsonl", "b.jsonl")),
        ("a=b.jsonl,c.jsonl", ("a=b.jsonl", "c.jsonl")),
        ("", ()),
        ("()", ()),
    ],
)
def test_every_text_between_commas_is_an_element(parsed, written, expected):
    assert parsed("--config=sft", f"--config.data.paths={written}").data.paths == expected


def test_lists_of_other_fields_are_parsed(parsed):
    settings = parsed(
        "--config=ppo",
        "--config.phases=sft,reward,ppo",
        "--config.ppo.reward.functions=a.b:f,c:g",
        "--config.ppo.sampling.eos_ids=2,7",
        "--config.data.paths=a b.jsonl",
        "--config.data.paths=c.jsonl,d.jsonl",
        "--config.data.weights=3,1.5,1",
        "--config.data.length_buckets=(64, 128)",
        "--config.mesh.rules=mlp=tensor+fsdp,embed=",
    )
    assert settings.phases == ("sft", "reward", "ppo")
    assert settings.ppo.reward.functions == ("a.b:f", "c:g")
    assert settings.ppo.sampling.eos_ids == (2, 7)
    assert settings.data.paths == ("a b.jsonl", "c.jsonl", "d.jsonl")  # the values of a repeated flag are concatenated
    assert settings.data.weights == (3.0, 1.5, 1.0)
    assert settings.data.length_buckets == (64, 128)
    assert settings.mesh.rules == ("mlp=tensor+fsdp", "embed=")
    assert parsed("--config=ppo", "--config.ppo.sampling.eos_ids=None").ppo.sampling.eos_ids is None
    assert parsed("--config=ppo").phases == ("ppo",)


def test_a_comma_in_an_element_of_a_config_files_list_is_kept():
    assert run_config({"data": {"paths": ("a,b.jsonl", "c.jsonl")}}).data.paths == ("a,b.jsonl", "c.jsonl")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--config=FILE_OR_NAME is missing; the packaged configs are deepspeed_chat_opt, "),
        (["--config.seed=1"], "--config=FILE_OR_NAME is missing"),
        (["--config"], "--config has no value"),
        (["--config=nosuch.py"], "--config=nosuch.py: 'nosuch.py' is not a file; the packaged configs are "),
        (["--config=elsewhere/ppo.py"], "'elsewhere/ppo.py' is not a file; --config=ppo is a packaged config"),
        (
            ["--config=ppo", "--config.ppo.kl.cof=1"],
            "config.ppo.kl.cof does not exist; did you mean config.ppo.kl.",
        ),
        (["--config=ppo", "--config.kl_coef=1"], "did you mean config.ppo.kl.coef"),
        (
            ["--config=sft", "--config.learning_rate=1"],
            "did you mean config.ppo.actor.optimizer.learning_rate or config.ppo.critic.optimizer.learning_rate or "
            "config.reward.optimizer.learning_rate or config.sft.optimizer.learning_rate?",
        ),
        (["--config=ppo", "--config.model.lora_rank=8"], "LoRA and other adapters: not supported yet"),
        (["--config=ppo", "--noconfig.model.load_in_4bit"], "quantized training: not supported yet"),
        (["--config=ppo", "--config.ppo.use_vllm=true"], "generation by another server: not supported yet"),
        (["--config=sft", "--config.model.gradient_checkpointing=1"], "here it is config.model.remat."),
        (["--config=sft", "--config.per_device_train_batch_size=1"], "here it is config.data.sft_batch_size, "),
        (["--config=sft", "--config.output_dir=x"], "--workdir=DIR"),
        (
            ["--config=ppo", "--config.xyzzy=1"],
            "configs/sft.py, configs/reward.py and configs/ppo.py explain the fields",
        ),
        (
            ["--config=sft", "--config.data.weights=a,b"],
            "config.data.weights='a,b': expected numbers separated by commas",
        ),
        (["--config=sft", "--config.seed=many"], "--config.seed=many: invalid literal for int()"),
        (["--config=sft", "--nosuch=1"], "Unknown command line flag 'nosuch'"),
    ],
)
def test_a_wrong_flag_ends_with_a_one_line_error(refused, arguments, message):
    assert message in refused(*arguments)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("x = 1\n", "has no function get_config"),
        ("get_config = 3\n", "has no function get_config"),
        ("def get_config(:\n", ", line 1: invalid syntax"),
        ("import nosuchmodule\n", ", line 1: ModuleNotFoundError: No module named 'nosuchmodule'"),
        ("def get_config():\n    x = 1\n    return x / 0\n", ", line 3: ZeroDivisionError: division by zero"),
        ("import jax_rlhf.packaged\n", "(from jax_rlhf.cli.packaged import packaged_config)"),
        (
            "from jax_rlhf.config import default_config\n"
            "def get_config():\n    config = default_config()\n    config.ppo.kl_coef *= 2\n",
            "(it is now config.ppo.kl.coef)",
        ),
        ("def get_config():\n    return {}['kl_coef']\n", ", line 2: KeyError: 'kl_coef'"),
        (
            "def get_config():\n    return {}\n",
            "get_config returned a dict; it must return an ml_collections.ConfigDict",
        ),
    ],
)
def test_an_error_in_a_config_file_names_the_file_and_the_cause(refused, tmp_path, content, message):
    (tmp_path / "mine.py").write_text(content)
    said = refused(f"--config={tmp_path / 'mine.py'}")
    assert said.startswith(str(tmp_path / "mine.py"))
    assert message in said
    assert ("it is now" in said) == ("it is now" in message)


def test_a_users_config_file_may_take_a_parameter(parsed, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "from jax_rlhf.cli.packaged import packaged_config\n"
        "def get_config(seed='3'):\n"
        "    config = packaged_config('sft')\n"
        "    config.seed = int(seed)\n"
        "    return config\n"
    )
    assert parsed(f"--config={tmp_path / 'mine.py'}:7").seed == 7
    assert parsed("--config", str(tmp_path / "mine.py")).seed == 3
    needed = (tmp_path / "mine.py").read_text().replace("seed='3'", "seed")
    (tmp_path / "needed.py").write_text(needed)
    monkeypatch.setenv("HOME", str(tmp_path))  # for "~", which a shell does not expand after "="
    assert parsed("--config=~/needed.py:5").seed == 5


def test_the_package_contains_all_configs(parsed):
    assert set(packaged_configs()) == {file.stem for file in (ROOT / "configs").glob("*.py")}
    for name in packaged_configs():
        assert parsed(f"--config={name}") == run_config(packaged_config(name))


def test_unknown_phases_and_fields_raise_with_an_explanation():
    with pytest.raises(ValueError, match=r"'dpo' is not a phase; DPO and its relatives .*: not supported yet"):
        run_config({"phases": ("dpo",)})
    with pytest.raises(ValueError, match="'rm' is not a phase; the phases are sft, reward, ppo"):
        run_config({"phases": ("rm",)})
    with pytest.raises(ValueError, match=r"config.model.lora_r does not exist; LoRA and other adapters: not"):
        run_config({"model": {"lora_r": 8}})


@pytest.mark.parametrize(
    ("field", "value", "wanted"),
    [
        ("sft.microbatch_size", 0, "1 or more"),
        ("sft.steps", -3, "1 or more"),
        ("sft.epochs", 0.0, "above 0"),
        ("sft.eval_every", -1, "0 or more"),
        ("sft.sample_rows", -1, "0 or more"),
        ("sft.optimizer.warmup_steps", -1, "0 or more"),
        ("reward.microbatch_size", -2, "1 or more"),
        ("reward.normalize_rows", -1, "0 or more"),
        ("reward.optimizer.total_steps", 0, "1 or more"),
        ("ppo.actor.optimizer.learning_rate", -1.0, "0 or more"),
        ("ppo.critic.optimizer.max_grad_norm", 0.0, "above 0"),
        ("ppo.iterations", 0, "1 or more"),
        ("data.sft_batch_size", 0, "1 or more"),
    ],
)
def test_a_number_out_of_range_is_an_error_that_names_the_field(field, value, wanted):
    config = default_config()
    with config.unlocked():
        config.update_from_flattened_dict({field: value})
    with pytest.raises(ValueError, match=rf"^config\.{re.escape(field)}={value} must be {wanted}\.$"):
        run_config(config)


def test_a_wrong_command_exits_with_code_2_and_no_traceback(tmp_path):
    """A Kubernetes JobSet restarts a run after most other exit codes."""
    command = [sys.executable, "-m", "jax_rlhf", "--config=nosuch.py", "--workdir=x"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "PyTorch was not found" not in done.stderr + done.stdout
    assert done.stderr.splitlines()[-1].startswith("error: --config=nosuch.py: 'nosuch.py' is not a file")


def test_the_wheel_has_every_package_the_configs_and_the_examples():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = {file.parent.relative_to(ROOT).as_posix().replace("/", ".") for file in ROOT.glob("jax_rlhf/**/*.py")}
    beside = {"jax_rlhf.configs": "configs", "jax_rlhf.examples": "examples"}
    assert set(project["tool"]["setuptools"]["packages"]) == packages | beside.keys()
    assert project["tool"]["setuptools"]["package-dir"] == beside
    assert project["tool"]["setuptools"]["package-data"] == {"*": ["__init__.pyi"]}
    for entry in project["project"]["scripts"].values():
        module, _, name = entry.partition(":")
        assert callable(getattr(importlib.import_module(module), name))
    assert project["project"]["version"] == jax_rlhf.__version__


@pytest.mark.parametrize("text", sorted({*_OTHER_NAMES.values(), *_RENAMED.values()}))
def test_every_setting_named_in_an_error_exists(text):
    config = default_config()
    fields = [name for name in re.findall(r"[a-z_0-9]+(?:\.[a-z_0-9]+)+", text) if name.split(".")[0] in config]
    assert fields or text == "sft_model_path" or text.startswith("--workdir")
    for field in fields:
        functools.reduce(getattr, field.split("."), config)  # raises AttributeError
