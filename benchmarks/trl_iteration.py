"""Seconds of a PPO iteration in TRL on the shape given as JSON; run by `ppo_iteration.py --trl=PYTHON`. One JSON line.

Needs only torch, transformers, datasets and TRL. Models, sizes and settings are those of `ppo_iteration.py`; everything
else is TRL's default, so there is one microbatch.
"""

import json
import statistics
import sys
import tempfile
import time

import datasets
import torch
from memory import peak_gigabytes
from tokenizers import Tokenizer, models
from torch_llama import llama_config
from transformers import (
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer

ITERATIONS = 5


class Clock(TrainerCallback):
    """Records when each iteration ends."""

    def __init__(self) -> None:
        self.times = []

    def on_train_begin(self, *args: object, **kwargs: object) -> None:
        """Records the start too."""
        self.times.append(time.perf_counter())

    on_step_end = on_train_begin


def main() -> None:
    """Trains for six iterations. The median excludes the first."""
    shape = json.loads(sys.argv[1])
    pad = shape["vocab_size"] - 1
    config = llama_config(shape, pad_token_id=pad)
    vocabulary = {f"w{index}": index for index in range(shape["vocab_size"])}
    bare = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bare, pad_token=f"w{pad}", eos_token="w0", padding_side="left")
    rows = torch.randint(0, pad, (shape["batch"] * (ITERATIONS + 1), shape["prompt"])).tolist()
    scalar = llama_config(shape, pad_token_id=pad, num_labels=1)
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = PPOTrainer(
            PPOConfig(
                output_dir=folder,
                per_device_train_batch_size=shape["batch"],
                gradient_accumulation_steps=1,
                num_mini_batches=1,
                num_ppo_epochs=shape["ppo_epochs"],
                response_length=shape["response"],
                total_episodes=len(rows),
                temperature=1.0,
                report_to="none",
                save_strategy="no",
                num_sample_generations=0,
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
            ),
            processing_class=tokenizer,
            model=LlamaForCausalLM(config),
            ref_model=LlamaForCausalLM(config),
            reward_model=LlamaForSequenceClassification(scalar),
            value_model=LlamaForSequenceClassification(scalar),
            train_dataset=datasets.Dataset.from_dict({"input_ids": rows}),
            callbacks=[clock],
        )
        trainer.train()
    seconds = [end - start for start, end in zip(clock.times, clock.times[1:], strict=False)]
    result = {
        "seconds_per_iteration": statistics.median(seconds[1:]),
        "peak_memory_gb": peak_gigabytes(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
