"""Small tokenizers of the chat families, with their special tokens and chat templates.

The templates are those of published checkpoints, without default system messages and without tools.
"""

import dataclasses

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

_LOOP = "{% for m in messages %}"
_END = "{% endfor %}"
_ASK = "{% if add_generation_prompt %}"
CHATML = (
    _LOOP
    + "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}"
    + _END
    + _ASK
    + "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{% set loop_messages = messages %}{% for m in loop_messages %}"
    "{% set content = '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim %}"
    "{% set content = content + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}"
    + _END
    + _ASK
    + "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
INST = (
    "{{ bos_token }}"
    + _LOOP
    + "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    + "{% else %}{{ ' ' + m['content'] | trim + ' ' + eos_token }}{% endif %}"
    + _END
)
GEMMA = (
    "{{ bos_token }}"
    + _LOOP
    + "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' + m['content'] | trim"
    + " + '<end_of_turn>\n' }}"
    + _END
    + _ASK
    + "{{ '<start_of_turn>model\n' }}{% endif %}"
)
PHI3 = (
    _LOOP
    + "{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}"
    + _END
    + _ASK
    + "{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
ZEPHYR = (
    _LOOP
    + "{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}"
    + _END
    + _ASK
    + "{{ '<|assistant|>\n' }}{% endif %}"
)
TULU = (
    _LOOP
    + "{{ '<|' + m['role'] + '|>\n' + m['content'] + (eos_token if m['role'] == 'assistant' else '\n') }}"
    + _END
    + _ASK
    + "{{ '<|assistant|>\n' }}{% endif %}"
)


@dataclasses.dataclass(frozen=True)
class Family:
    """A chat family.

    Attributes:
      template: its chat template.
      special: its special tokens, EOS first.
      end: the token that ends the assistant's turn.
      kind: the tokenizer's model: "byte_level", "sentencepiece" (BPE with byte fallback) or "unigram".
      bos: its BOS, or None.
      ordinary: tokens that the tokenizer adds as ordinary ones.
      stripped: special tokens that remove the white space after them.
      adds_bos: whether the tokenizer adds BOS to texts.
    """

    template: str
    special: tuple[str, ...]
    end: str
    kind: str = "byte_level"
    bos: str | None = None
    ordinary: tuple[str, ...] = ()
    stripped: tuple[str, ...] = ()
    adds_bos: bool = False


FAMILIES = {
    "qwen": Family(
        CHATML,
        ("<|im_end|>", "<|endoftext|>", "<|im_start|>"),
        "<|im_end|>",
        ordinary=("<think>", "</think>", "<tool_call>", "</tool_call>"),
    ),
    "openhermes": Family(  # ChatML in which <|im_start|> is an ordinary added token
        CHATML, ("<|im_end|>", "<s>", "</s>", "<unk>"), "<|im_end|>", "sentencepiece", ordinary=("<|im_start|>",)
    ),
    "llama3": Family(
        LLAMA3,
        ("<|eot_id|>", "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>"),
        "<|eot_id|>",
        bos="<|begin_of_text|>",
        adds_bos=True,
    ),
    "llama2": Family(INST, ("</s>", "<s>", "<unk>"), "</s>", "sentencepiece", bos="<s>", adds_bos=True),
    "mistral": Family(
        INST, ("</s>", "<s>", "<unk>", "[INST]", "[/INST]"), "</s>", "sentencepiece", bos="<s>", adds_bos=True
    ),
    "gemma": Family(
        GEMMA,
        ("<eos>", "<bos>", "<pad>", "<unk>", "<start_of_turn>", "<end_of_turn>"),
        "<end_of_turn>",
        "sentencepiece",
        bos="<bos>",
        adds_bos=True,
    ),
    "phi3": Family(
        PHI3,
        ("<|endoftext|>", "<s>", "<unk>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"),
        "<|end|>",
        "sentencepiece",
        bos="<s>",
        stripped=("<|end|>", "<|user|>", "<|assistant|>", "<|system|>"),
    ),
    "zephyr": Family(ZEPHYR, ("</s>", "<s>", "<unk>"), "</s>", "sentencepiece", bos="<s>", adds_bos=True),
    "opt": Family(TULU, ("</s>", "<pad>"), "</s>", bos="</s>", adds_bos=True),
    "pythia": Family(TULU, ("<|endoftext|>", "<|padding|>"), "<|endoftext|>"),
    "unigram": Family(TULU, ("</s>", "<pad>", "<unk>"), "</s>", "unigram"),
}


def tokenizer_of(family: Family) -> PreTrainedTokenizerFast:
    """A small tokenizer of a family."""
    letters = [chr(code) for code in range(32, 127)]
    if family.kind == "byte_level":
        pieces = [*family.special, *family.ordinary, *bytes_to_unicode().values(), "he", "Ġt"]
        merges = [("h", "e"), ("Ġ", "t")]
        bare = Tokenizer(models.BPE({piece: index for index, piece in enumerate(pieces)}, merges))
        bare.pre_tokenizer, bare.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    elif family.kind == "sentencepiece":
        raw = [f"<0x{byte:02X}>" for byte in range(256)]
        pieces = [*family.special, *family.ordinary, *raw, "▁", *letters[1:], "he", "▁t"]
        vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
        merges = [("h", "e"), ("▁", "t")]
        bare = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
        bare.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        bare.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    else:  # as in T5: the text of a special token is a piece with a score
        scored = [(piece, 0.0) for piece in (*family.special, *family.ordinary)]
        scored += [("▁", -2.0), *((letter, -3.0) for letter in letters[1:]), ("he", -2.5)]
        bare = Tokenizer(models.Unigram(scored, unk_id=family.special.index("<unk>"), byte_fallback=False))
        bare.normalizer = normalizers.Replace("\n", " ")
        bare.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    bare.add_special_tokens(
        [AddedToken(token, normalized=False, rstrip=token in family.stripped) for token in family.special]
    )
    bare.add_tokens([AddedToken(token, normalized=False) for token in family.ordinary])
    if family.adds_bos:
        place = (family.bos, bare.token_to_id(family.bos))
        bare.post_processor = processors.TemplateProcessing(single=f"{family.bos} $A", special_tokens=[place])
    return PreTrainedTokenizerFast(
        tokenizer_object=bare,
        eos_token=family.special[0],
        bos_token=family.bos,
        unk_token="<unk>" if "<unk>" in family.special else None,
        pad_token=next((token for token in family.special if "pad" in token), family.special[0]),
        chat_template=family.template,
        clean_up_tokenization_spaces=False,
    )
