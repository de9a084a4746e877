"""A run with a custom reward function: under a minute on a laptop's CPU, offline.

    python examples/custom_reward.py runs/custom_reward

The script creates a tiny model with random weights and a file of prompts, and then runs this command:

    jax-rlhf --config=ppo --config.ppo.reward.functions=examples/custom_reward.py:wanted_words …

"examples/custom_reward.py:wanted_words" names the function below by its file. "package.module:function" names a
function of a module that Python can import.
docs/ppo.md lists the other arguments that such a function can receive, and what happens if it fails.
"""

import itertools
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

SUBJECTS, VERBS = ("i", "we", "you", "they"), ("want", "like", "buy", "drink")
DRINKS = ("tea", "coffee", "milk", "water")


def wanted_words(prompts: Sequence[str], responses: Sequence[str], wanted: Sequence[str]) -> list[float]:
    """The share of a response's words that equal the row's word in the column "wanted".

    Args:
      prompts: B texts, without special tokens.
      responses: B texts, without special tokens.
      wanted: B words, from the data column of this name.

    Returns:
      B scores between 0 and 1.
    """
    del prompts
    words = [response.split() for response in responses]
    return [row.count(word) / max(len(row), 1) for row, word in zip(words, wanted, strict=True)]


def make_inputs(folder: Path) -> None:
    """Writes a model, and one line per prompt such as {"prompt": "we like tea", "wanted": "tea"}."""
    import tiny_model  # imported here because it loads JAX, which the reward function does not need

    from jax_rlhf import save_pretrained

    words = ["<eos>", *SUBJECTS, *VERBS, *DRINKS]
    save_pretrained(folder / "model", tiny_model.create(words, eos_token="<eos>", pad_token="<eos>"))
    rows = [{"prompt": " ".join(row), "wanted": row[-1]} for row in itertools.product(SUBJECTS, VERBS, DRINKS)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def main(folder: Path) -> dict[str, float]:
    """Runs PPO, and returns its summary."""
    folder.mkdir(parents=True, exist_ok=True)
    make_inputs(folder)
    settings = {
        "sft_model_path": folder / "model",  # the actor and the reference are initialised from this
        "model.path": folder / "model",
        "data.paths": folder / "prompts.jsonl",
        "data.ppo_batch_size": 32,
        "data.max_prompt_tokens": 4,
        "ppo.reward.functions": f"{__file__}:wanted_words",
        "ppo.iterations": 25,
        "ppo.sampling.max_new_tokens": 4,
        "ppo.kl.coef": 0.02,  # reward units per nat
        "ppo.num_minibatches": 2,
        "ppo.actor.optimizer.learning_rate": 3e-3,
        "ppo.critic.optimizer.learning_rate": 1e-2,
    }
    flags = [f"--config.{name}={value}" for name, value in settings.items()]
    command = [sys.executable, "-m", "jax_rlhf", "--config=ppo", f"--workdir={folder / 'run'}", "--overwrite", *flags]
    subprocess.run(command, check=True)
    return json.loads((folder / "run" / "ppo" / "summary.json").read_text())


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/custom_reward"))
