"""The oracle, torch transformers. This module is imported only if torch is installed."""

from pathlib import Path

import numpy as np
import torch
import transformers

from tests.hub.tiny import CASES, batch


def model_class(head: str) -> type:
    """The class that loads a checkpoint with this head."""
    return transformers.AutoModelForCausalLM if head == "lm" else transformers.AutoModelForSequenceClassification


def empty(case: str, head: str) -> torch.nn.Module:
    """A randomly initialised torch model of a case."""
    config = transformers.CONFIG_MAPPING[CASES[case]["model_type"]].from_dict(dict(CASES[case]))
    config.num_labels = 1
    return model_class(head).from_config(config)


def load(folder: Path, head: str) -> torch.nn.Module:
    """Loads a checkpoint, and fails if a tensor is missing or unused."""
    model, info = model_class(head).from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    problems = {name: found for name, found in info.items() if found}
    assert not problems, problems
    return model.eval()


def outputs(model: torch.nn.Module, head: str) -> np.ndarray:
    """Logits on `batch()` [3, LENGTH, VOCAB], or the scalar head's value at every token [3, LENGTH].

    Each row is computed separately, because with longrope the longest row decides which factors all rows use.
    """
    return np.concatenate([_row(model, head, *(array[i : i + 1] for array in batch())) for i in range(3)])


def _row(model: torch.nn.Module, head: str, tokens: np.ndarray, mask: np.ndarray, positions: np.ndarray) -> np.ndarray:
    inputs = {"attention_mask": torch.tensor(mask.astype(np.int64)), "position_ids": torch.tensor(positions)}
    with torch.no_grad():
        if head == "lm":
            return model(input_ids=torch.tensor(tokens), **inputs).logits.numpy()
        hidden = model.base_model(input_ids=torch.tensor(tokens), **inputs).last_hidden_state
        return model.score(hidden)[..., 0].numpy()
