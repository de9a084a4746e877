"""The PPO loop in Python, on a tiny model with random weights: under a minute on a laptop's CPU, offline.

    python examples/ppo_loop.py

The model continues prompts such as "i like hot" and "we drink cold". The reward counts one word, so its mean shows
whether PPO learns. For your own model, use load_pretrained("folder or hub id") instead of tiny_model.create.
"""

import itertools
import json
import tempfile
from pathlib import Path

import tiny_model

from jax_rlhf import PPOTrainer, RLHFEngine, create_datasets

PROMPTS = (("i", "we", "you", "they"), ("like", "want", "buy", "drink"), ("hot", "cold", "more", "some"))
WORDS = ["<eos>", *itertools.chain(*PROMPTS), "tea", "coffee", "milk", "water", "please"]


def cups_of_tea(prompts: list[str], responses: list[str]) -> list[float]:
    """One point for each "tea" in a response."""
    return [float(response.split().count("tea")) for response in responses]


def main(iterations: int = 20) -> list[dict[str, float]]:
    """Trains the model, prints one line per iteration, and returns the metrics."""
    engine = RLHFEngine(tiny_model.create(WORDS, eos_token="<eos>", pad_token="<eos>"))
    settings = {
        "sampling": {"max_new_tokens": 6},  # tokens of a response
        "kl": {"coef": 0.1},  # reward units per nat
        "ppo_epochs": 4,  # passes over the responses of an iteration
        "num_minibatches": 2,  # optimizer steps per pass
        "loss": {"value_clip_range": 1.0},  # reward units
        "actor": {"optimizer": {"learning_rate": 3e-3}},
        "critic": {"optimizer": {"learning_rate": 1e-2}},
    }
    trainer = PPOTrainer(engine, settings, reward_functions=cups_of_tea)

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "prompts.jsonl"
        rows = [{"prompt": " ".join(words)} for words in itertools.product(*PROMPTS)]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        data = {"paths": (str(file),), "ppo_batch_size": 32, "max_prompt_tokens": 4}
        prompts = create_datasets(data, engine.tokenizer, phase="ppo", seed=0)

    history = []
    for iteration in range(iterations):
        experience = trainer.generate_experience(prompts.train[iteration])  # sample, score, advantages
        metrics = trainer.train_rlhf(experience)  # 4 × 2 optimizer steps
        print(f"{iteration}: reward {metrics['objective/scores']:.2f}, KL {metrics['objective/kl']:.2f} nats")
        history.append(metrics)
    return history


if __name__ == "__main__":
    main()
