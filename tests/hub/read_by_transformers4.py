"""Runs in an interpreter with transformers 4, and prints as JSON what it reads from each folder in its arguments."""

import json
import sys
from pathlib import Path

import transformers
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

TEXTS = ["Hello there,  1234 friends!\n\nHow's it going?", " leading", "naïve — 你好 🙂", "a<|im_end|>b", ""]
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]


def tokens_of(tokenizer):
    """A tokenizer's ids, decoded texts and settings, in any version of transformers."""
    chat = None
    if tokenizer.chat_template is not None:
        chat = tokenizer.apply_chat_template(CHAT, tokenize=False)
    return {
        "ids": [tokenizer(text)["input_ids"] for text in TEXTS],
        "decoded": [
            tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=skip)
            for text in TEXTS
            for skip in (True, False)
        ],
        "special": [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id],
        "all_special": sorted(tokenizer.all_special_ids),
        "length": len(tokenizer),
        "inputs": sorted(tokenizer("Hello")),
        "padding_side": tokenizer.padding_side,
        "chat": chat,
    }


def read(folder):
    """Config, generation config and tokenizer of a folder."""
    config = AutoConfig.from_pretrained(folder)
    found = {
        "config": config.to_dict(),
        "attributes": {"num_labels": config.num_labels, "dtype": str(config.torch_dtype)},
        "version": transformers.__version__,
    }
    if (folder / "generation_config.json").exists():
        found["generation"] = GenerationConfig.from_pretrained(folder).to_dict()
    if (folder / "tokenizer.json").exists():
        found["tokens"] = tokens_of(AutoTokenizer.from_pretrained(folder))
    return found


if __name__ == "__main__":
    print(json.dumps({folder: read(Path(folder)) for folder in sys.argv[1:]}, default=str))
