"""Seconds of torch `generate` on the shape given as JSON; run by `generate.py --torch=PYTHON`.

Prints one line after its first run, then one line with the seconds of a run per input line, and at the end its peak
memory. Needs only torch and transformers.
"""

import json
import sys
import time

import torch
from memory import peak_gigabytes
from torch_llama import llama_config
from transformers import GenerationConfig, LlamaForCausalLM


def main() -> None:
    """Samples once per input line."""
    shape = json.loads(sys.argv[1])
    model = LlamaForCausalLM(llama_config(shape)).eval()
    prompts = torch.randint(0, shape["vocab_size"], (shape["batch"], shape["prompt"]))
    generation_config = GenerationConfig(
        max_new_tokens=shape["response"],
        min_new_tokens=shape["response"],
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        eos_token_id=None,
        pad_token_id=0,
    )

    def seconds() -> float:
        start = time.perf_counter()
        with torch.no_grad():
            out = model.generate(prompts, attention_mask=torch.ones_like(prompts), generation_config=generation_config)
        if out.shape != (shape["batch"], shape["prompt"] + shape["response"]):
            raise ValueError(f"torch generated {list(out.shape)}")
        return time.perf_counter() - start

    print(seconds(), flush=True)
    for _ in sys.stdin:
        print(seconds(), flush=True)
    print(peak_gigabytes())


if __name__ == "__main__":
    main()
