"""The reference page and the commented configs agree with the dataclasses of the settings."""

import ast

import pytest

from jax_rlhf.cli import reference
from tests.processes import ROOT


def every(fields):
    for field in fields:
        yield field
        yield from every(field.fields)


@pytest.mark.parametrize("name", sorted(reference.PRESETS))
def test_a_commented_config_agrees_with_the_fields(name):
    """If this fails, run `python -m jax_rlhf.cli.reference`."""
    assert (ROOT / "configs" / f"{name}.py").read_text() == reference.commented_config(reference.PRESETS[name])


def test_the_reference_page_agrees_with_the_fields():
    """If this fails, run `python -m jax_rlhf.cli.reference`."""
    assert (ROOT / "docs" / "config.md").read_text() == reference.markdown()


def test_every_setting_has_an_explanation():
    known = list(every(reference.all_fields()))
    assert len(known) > 120
    for field in known:
        assert len(field.doc.split()) >= 2, field.path
        assert field.doc.endswith((".", ")")), field.path
    assert {field.path: field for field in known}["ppo.kl.coef"].default == 0.05


def test_every_setting_belongs_to_a_section_of_a_commented_config():
    written = set()
    for preset in reference.PRESETS.values():
        chosen = [field for field in every(reference.all_fields()) if field.path in preset.sections]
        written |= {field.path for field in every(chosen)}
    assert {field.path for field in every(reference.all_fields()) if not field.fields} <= written


def test_commented_configs_assign_values_that_are_not_defaults():
    for preset in reference.PRESETS.values():
        text = reference.commented_config(preset)
        assigned = {ast.unparse(node) for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Assign)}
        for path, value in preset.values.items():
            name = path.rpartition(".")[2]
            assert any(line.endswith(f"{name} = {value!r}") for line in assigned), path
