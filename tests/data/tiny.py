"""A tokenizer with one token per word, readers, and files of rows."""

import json

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

PAD, EOS, BOS, USER, ASSISTANT = range(5)
WORDS = ["<pad>", "<eos>", "<bos>", "<user>", "<assistant>", *"abcdefghijklmnopqrstuvwxyz"]
TEMPLATE = (
    "{% for m in messages %}{{ '<' + m.role + '> ' + m.content + ' <eos> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)


def tokenizer(*, pad="<pad>", bos=False, template=TEMPLATE):
    """A word-level tokenizer of single letters and special tokens."""
    bare = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<pad>"))
    bare.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        bare.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=bare, pad_token=pad, eos_token="<eos>", bos_token="<bos>", chat_template=template
    )


def ids(text):
    return [WORDS.index(word) for word in text.split()]


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def letters(count, start=0):
    """`count` different texts of three letters each."""
    return [" ".join(WORDS[5 + (n // 26**place) % 26] for place in range(3)) for n in range(start, start + count)]


def reader(*, phase, split):
    return [{"text": f"{text} {phase[0]} {split[0]}"} for text in letters(20)]


def broken(*, phase, split):
    del phase, split
    yield {"text": "a"}
    yield len(7)


def no_rows(*, phase, split):
    del phase, split
    return 7
