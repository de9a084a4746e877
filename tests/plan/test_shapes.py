"""The decoder that a plan is for: a preset, a hub id that names a preset, or a downloaded config."""

import json

import jax
import pytest

from jax_rlhf.hub import CheckpointError
from jax_rlhf.models import Decoder, abstract_params
from jax_rlhf.plan.presets import PRESETS
from jax_rlhf.plan.shapes import model_shape, preset_of
from tests.plan import tiny

# Parameters in billions, from the models' cards and papers; a tied head counts once.
BILLIONS = {
    "smollm2-135m": 0.1345,
    "smollm2-360m": 0.3618,
    "smollm2-1.7b": 1.711,
    "tinyllama-1.1b": 1.100,
    "llama-2-7b": 6.738,
    "llama-2-13b": 13.016,
    "llama-2-70b": 68.977,
    "llama3.2-1b": 1.236,
    "llama3.2-3b": 3.213,
    "llama3-8b": 8.030,
    "llama3-70b": 70.554,
    "mistral-7b-v0.1": 7.242,
    "mistral-7b-v0.3": 7.248,
    "mistral-nemo-12b": 12.248,
    "qwen2.5-0.5b": 0.494,
    "qwen2.5-1.5b": 1.544,
    "qwen2.5-3b": 3.086,
    "qwen2.5-7b": 7.616,
    "qwen2.5-14b": 14.770,
    "qwen2.5-32b": 32.764,
    "qwen2.5-72b": 72.706,
    "qwen3-0.6b": 0.596,
    "qwen3-1.7b": 1.721,
    "qwen3-4b": 4.022,
    "qwen3-8b": 8.191,
    "qwen3-14b": 14.768,
    "qwen3-32b": 32.762,
    "gemma-2-2b": 2.614,
    "gemma-2-9b": 9.242,
    "gemma-2-27b": 27.227,
    "gemma-3-270m": 0.268,
    "gemma-3-1b": 1.000,
    "phi-3-mini": 3.821,
    "phi-3-medium": 13.960,
    "phi-4-mini": 3.836,
    "phi-4": 14.660,
    "gpt2": 0.1244,
    "gpt2-medium": 0.3548,
    "gpt2-large": 0.7740,
    "gpt2-xl": 1.5576,
    "pythia-70m": 0.0704,
    "pythia-160m": 0.1623,
    "pythia-410m": 0.4053,
    "pythia-1b": 1.0118,
    "pythia-1.4b": 1.4146,
    "pythia-2.8b": 2.7752,
    "pythia-6.9b": 6.8573,
    "pythia-12b": 11.8461,
    "opt-125m": 0.1252,
    "opt-350m": 0.3312,
    "opt-1.3b": 1.3158,
    "opt-2.7b": 2.6516,
    "opt-6.7b": 6.6585,
    "opt-13b": 12.853,
    "opt-30b": 29.97,
    "opt-66b": 65.72,
}


def test_every_preset_has_its_models_number_of_parameters():
    assert BILLIONS.keys() == PRESETS.keys()
    for name, wanted in BILLIONS.items():
        shapes = abstract_params(Decoder(model_shape(name)[0]))
        assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) / 1e9 == pytest.approx(wanted, rel=1.5e-3), name


@pytest.mark.parametrize(
    ("hub_id", "preset"),
    [
        ("meta-llama/Meta-Llama-3-8B-Instruct", "llama3-8b"),
        ("meta-llama/Llama-3.1-8B", "llama3-8b"),
        ("meta-llama/Llama-3.3-70B-Instruct", "llama3-70b"),
        ("meta-llama/Llama-3.2-1B-Instruct", "llama3.2-1b"),
        ("meta-llama/Llama-2-7b-chat-hf", "llama-2-7b"),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "smollm2-135m"),
        ("TinyLlama/TinyLlama-1.1B-Chat-v1.0", "tinyllama-1.1b"),
        ("mistralai/Mistral-7B-Instruct-v0.3", "mistral-7b-v0.3"),
        ("mistralai/Mistral-7B-v0.1", "mistral-7b-v0.1"),
        ("mistralai/Mistral-Nemo-Instruct-2407", "mistral-nemo-12b"),
        ("Qwen/Qwen2.5-7B-Instruct", "qwen2.5-7b"),
        ("Qwen/Qwen2-72B", "qwen2.5-72b"),
        ("Qwen/Qwen3-8B-Base", "qwen3-8b"),
        ("google/gemma-2-2b-it", "gemma-2-2b"),
        ("google/gemma-3-1b-it", "gemma-3-1b"),
        ("microsoft/Phi-3-mini-4k-instruct", "phi-3-mini"),
        ("microsoft/Phi-4-mini-instruct", "phi-4-mini"),
        ("microsoft/phi-4", "phi-4"),
        ("openai-community/gpt2-xl", "gpt2-xl"),
        ("EleutherAI/pythia-1.4b-deduped", "pythia-1.4b"),
        ("facebook/opt-13b", "opt-13b"),
        ("meta-llama/Llama-3.1-405B", None),
        ("mistralai/Mistral-7B-Instruct-v0.2", None),
        ("google/gemma-3-4b-it", None),
        ("someone/opt-13b-lora", None),
    ],
)
def test_a_hub_id_names_a_preset(hub_id, preset):
    assert preset_of(hub_id) == preset


def test_a_downloaded_config_takes_precedence_over_a_preset(tmp_path, monkeypatch):
    """In the hub's cache, refs name commits, and snapshots contain their files."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))

    def download(hub_id, revision, layers):
        folder = tmp_path / f"models--{hub_id.replace('/', '--')}"
        snapshot = folder / "snapshots" / f"{layers:040d}"
        snapshot.mkdir(parents=True)
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / revision).write_text(snapshot.name)
        (snapshot / "config.json").write_text(json.dumps(tiny.SHAPE | {"num_hidden_layers": layers}))
        return snapshot / "config.json"

    download("someone/unknown-7b", "main", 3)
    download("someone/unknown-7b", "later", 5)
    download("facebook/opt-13b", "main", 4)
    assert model_shape("someone/unknown-7b")[0].num_layers == 3
    assert model_shape("someone/unknown-7b", "later")[0].num_layers == 5
    assert model_shape("facebook/opt-13b")[0].num_layers == 4
    assert model_shape("facebook/opt-1.3b")[0].num_layers == 24
    broken = download("someone/broken", "main", 6)
    broken.write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json: .*download it again"):
        model_shape("someone/broken")


@pytest.mark.parametrize("path", ["someone/unknown-7b", "nowhere/at/all", "./missing", "unknown"])
def test_the_error_for_an_unknown_model_lists_the_presets(path, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=r"does not use the network.*or a preset: smollm2-135m"):
        model_shape(path)
