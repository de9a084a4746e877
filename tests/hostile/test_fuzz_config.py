"""Invalid overrides of the config end in a documented error."""

from absl import flags as absl_flags
from hypothesis import strategies as some
from ml_collections import config_flags

from jax_rlhf.config import default_config, run_config
from tests.hostile.fuzzing import fuzzed, inputs, values


def paths(config, prefix=""):
    for name, value in config.items():
        yield from paths(value, f"{prefix}{name}.") if hasattr(value, "items") else [f"{prefix}{name}"]


@inputs(500, 10_000)
def test_config_overrides_are_read_or_refused(examples):
    known = sorted(paths(default_config()))
    seen = set()

    def flags_of(overrides):
        """The config with flags `--config.name=value`."""
        flag_values = absl_flags.FlagValues()
        config_flags.DEFINE_config_dict("config", default_config(), flag_values=flag_values)
        flag_values(["program", *(f"--config.{name}={value}" for name, value in overrides)])
        return flag_values.config

    def nested(overrides):
        config = default_config().to_dict()
        for name, value in overrides:
            *sections, last = name.split(".")
            target = config
            for section in sections:
                target = target.get(section) if isinstance(target, dict) else None
            if isinstance(target, dict):
                target[last] = value
        return config

    def check(overrides, as_flags):
        try:
            run_config(flags_of(overrides) if as_flags else nested(overrides))
            seen.add("read")
        except ValueError as error:
            seen.add("refused" if str(error) else "without a word")
        except (absl_flags.Error, AttributeError, KeyError, TypeError, SyntaxError):  # `parse_flags` explains them
            if not as_flags:
                raise
            seen.add("no flag")

    fields = some.sampled_from(known) | some.sampled_from(["ppo.kl_cof", "x", "ppo", "data.paths.x", "sft.optimizer"])
    override = some.tuples(fields.filter(lambda name: name != "data.paths.x"), values)
    fuzzed(examples, check, overrides=some.lists(override, min_size=1, max_size=3), as_flags=some.booleans())
    assert seen == {"read", "refused", "no flag"}
