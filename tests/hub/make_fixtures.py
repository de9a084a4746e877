"""Writes torch_models.json and torch_logits.npz to tests/fixtures. `python -m tests.hub.make_fixtures` needs torch."""

import json
import tempfile
from pathlib import Path

import numpy as np

from tests.hub import tiny, torch_oracle


def stored_names(model) -> dict[str, list[int]]:
    """Names and shapes as torch's save_pretrained writes them (a tied head is left out)."""
    from safetensors import safe_open

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        with safe_open(Path(folder) / "model.safetensors", framework="np") as file:
            return {name: list(file.get_slice(name).get_shape()) for name in sorted(file.keys())}


def main() -> None:
    """Stores the tensors' names and shapes, then torch's outputs of the checkpoints made from them."""
    models = {
        case: {head: stored_names(torch_oracle.empty(case, head)) for head in ("lm", "scalar")} for case in tiny.CASES
    }
    tiny.FIXTURES.mkdir(exist_ok=True)
    (tiny.FIXTURES / "torch_models.json").write_text(json.dumps(models, indent=0) + "\n")
    outputs = {}
    for case in tiny.CASES:
        for head in ("lm", "scalar"):
            with tempfile.TemporaryDirectory() as folder:
                tiny.write_checkpoint(Path(folder), case, head)
                outputs[f"{case}/{head}"] = torch_oracle.outputs(torch_oracle.load(Path(folder), head), head)
    np.savez_compressed(tiny.FIXTURES / "torch_logits.npz", **outputs)


if __name__ == "__main__":
    main()
