"""Text in a row never begins or ends a turn, in every chat family and in plain texts."""

import time

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from jax_rlhf.data import DataConfig, DataError, create_datasets
from jax_rlhf.data.chats import common_beginning
from jax_rlhf.data.formats import row_texts
from jax_rlhf.data.sources import Row
from jax_rlhf.data.special_tokens import MARK, first_special, marked, token_ids, without_marks
from jax_rlhf.data.tokens import tokenized
from tests.data import tiny
from tests.data.families import FAMILIES, tokenizer_of

every_family = pytest.mark.parametrize("name", sorted(FAMILIES))


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def example(row, phase, tokenizer, ends=None, **config):
    config = DataConfig(max_tokens=4000, max_prompt_tokens=4000, **config)
    text = row_texts(Row(row, "x.jsonl", 1), phase, config, tokenizer)
    ends = (tokenizer.eos_token_id,) if ends is None else ends
    (found,) = tokenized([Row(row, "x.jsonl", 1)], [text], tokenizer, config, {}, ends)
    return found


def special_in(ids, family, tokenizer):
    """The special and the other added tokens among ids, in order."""
    known = {tokenizer.convert_tokens_to_ids(token) for token in (*family.special, *family.ordinary)}
    return tokenizer.convert_ids_to_tokens([index for index in ids.tolist() if index in known])


def forged(family):
    """A text that imitates the end of the user's turn and a turn of the assistant, then every special token."""
    turn = tokenizer_of(family).apply_chat_template([user("x"), assistant("yes"), user("more")], tokenize=False)
    return "he" + turn[turn.index("x") + 1 :] + "".join(family.special) + " the"


@every_family
def test_text_in_a_prompt_does_not_begin_or_end_a_turn(name):
    family = FAMILIES[name]
    tokenizer, ends = tokenizer_of(family), (tokenizer_of(family).convert_tokens_to_ids(family.end),)
    harmless = example({"prompt": [user("he the")]}, "ppo", tokenizer, ends).prompt
    said = forged(family)
    found = example({"prompt": [user(said)]}, "ppo", tokenizer, ends).prompt
    assert special_in(found, family, tokenizer) == special_in(harmless, family, tokenizer)
    if family.kind != "unigram":  # which has no tokens for some characters
        assert said in tokenizer.decode(found)
    as_plain = example({"prompt": said}, "ppo", tokenizer, ends).prompt
    assert special_in(as_plain, family, tokenizer) == ([family.bos] if family.adds_bos else [])
    hidden = example({"prompt": [user("he"), assistant(said), user("the")]}, "ppo", tokenizer, ends).prompt
    three = example({"prompt": [user("he"), assistant("he"), user("the")]}, "ppo", tokenizer, ends).prompt
    assert special_in(hidden, family, tokenizer) == special_in(three, family, tokenizer)


@every_family
def test_text_in_an_answer_does_not_end_the_answer(name):
    """The text of EOS does not truncate an answer, and an answer cannot contain further turns."""
    family = FAMILIES[name]
    tokenizer = tokenizer_of(family)
    ends = (tokenizer.convert_tokens_to_ids(family.end),)
    said = forged(family)
    row = {"prompt": [user("he")], "chosen": [assistant(said)], "rejected": [assistant(f"he {family.end}")]}
    for content in (row, {"prompt": "he", "chosen": said, "rejected": f"he {family.end}"}):
        pair = example(content, "reward", tokenizer, ends)
        for answer_ids in pair.completions:
            assert special_in(answer_ids, family, tokenizer) == [family.end]
            assert answer_ids[-1] == ends[0]
        if family.kind != "unigram":
            assert said.strip() in tokenizer.decode(pair.completions[0])
            assert f"he {family.end}" in tokenizer.decode(pair.completions[1])
        learned = example(content, "sft", tokenizer, ends)
        assert learned.completions[0].tolist() == pair.completions[0].tolist()


@every_family
def test_unmarked_text_is_tokenized_as_by_the_tokenizer(name):
    """Unmarked text before marked text is tokenized by another method, with the same result."""
    family = FAMILIES[name]
    tokenizer = tokenizer_of(family)
    chat = [user("he the\n\nhe  "), assistant(" the he\n"), user("he")]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    for one in (text, "he the", " he", "he\n", f"{text} he", ""):
        expected = tokenizer(one, add_special_tokens=False)["input_ids"]
        assert token_ids([one], tokenizer) == [expected]
        if one and family.kind != "unigram":  # the same, with a marked text at the end
            (other,) = token_ids([one + marked(f"z{family.end}z", tokenizer)], tokenizer)
            split = tokenizer(f"z{family.end}z", add_special_tokens=False, split_special_tokens=True)["input_ids"]
            assert tokenizer.decode(other) == tokenizer.decode(expected) + f"z{family.end}z"
            assert other[-len(split) + 2 :] == split[2:]


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.kind == "byte_level"])
def test_marked_text_is_tokenized_as_with_split_special_tokens(name):
    family = FAMILIES[name]
    tokenizer = tokenizer_of(family)
    for token in family.special:
        text = f"he {token}the{token}\n {token * 2}"
        expected = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert token_ids([marked(text, tokenizer)], tokenizer) == [expected]


@every_family
def test_parse_special_tokens_reads_text_that_a_template_rendered(name):
    """With parse_special_tokens, text that a template rendered has the same tokens as the chat."""
    family = FAMILIES[name]
    tokenizer, ends = tokenizer_of(family), (tokenizer_of(family).convert_tokens_to_ids(family.end),)
    chat = [user("he"), assistant("the"), user("he he")]
    written = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    by_template = example({"prompt": chat}, "ppo", tokenizer, ends).prompt
    found = example({"prompt": written}, "ppo", tokenizer, ends, parse_special_tokens=True).prompt
    before = [] if written.startswith(family.bos or " ") or not family.adds_bos else [tokenizer.bos_token_id]
    assert found.tolist() == before + by_template.tolist()  # a plain text gets the tokenizer's BOS
    as_text = example({"prompt": written}, "ppo", tokenizer, ends).prompt
    assert special_in(as_text, family, tokenizer) == ([family.bos] if family.adds_bos else [])
    row = {"prompt": "he", "completion": f"he{family.end}e"}
    cut = example(row, "sft", tokenizer, ends, parse_special_tokens=True).completions[0]
    assert (cut[-1], cut.tolist().count(ends[0])) == (ends[0], 1)
    assert tokenizer.decode(cut[:-1]).strip() == "he"


def test_think_tags_in_an_answer_become_their_tokens(tmp_path):
    """Data sets write these tags in the text of answers, and Qwen's tokenizer adds them as ordinary tokens."""
    family = FAMILIES["qwen"]
    tokenizer = tokenizer_of(family)
    found = example({"prompt": [user("he")], "completion": [assistant("<think>he</think>the")]}, "sft", tokenizer)
    assert special_in(found.completions[0], family, tokenizer) == ["<think>", "</think>", "<|im_end|>"]


def test_think_tags_become_their_tokens_even_if_they_are_special():
    tokenizer = with_normalizer(None, normalized=False, tokens=("<think>", "</think>", "<|im_end|>", "<|im_start|>"))
    found = example({"prompt": [user("he")], "completion": [assistant("<think>x</think>")]}, "sft", tokenizer)
    ids = tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
    assert [index for index in found.completions[0].tolist() if index in ids] == ids


def test_a_plain_text_may_begin_with_the_text_of_bos():
    """BOS at the beginning of a text is one special token. BOS anywhere else stays text."""
    family = FAMILIES["llama3"]
    tokenizer = tokenizer_of(family)
    bos = family.bos
    for row in ({"text": f"{bos}he {bos}"}, {"prompt": "", "completion": f"{bos}he {bos}"}):
        found = example(row, "sft", tokenizer)
        ids = np.concatenate([found.prompt, *found.completions])
        assert special_in(ids, family, tokenizer) == [bos, family.special[0]]
        assert tokenizer.decode(ids).count(bos) == 2
    found = example({"prompt": f"{bos}he", "completion": f"{bos}the"}, "sft", tokenizer)
    assert special_in(found.prompt, family, tokenizer) == [bos]
    assert special_in(found.completions[0], family, tokenizer) == [family.special[0]]
    assert tokenizer.decode(found.completions[0]).startswith(bos)


def test_a_note_counts_the_rows_that_contain_special_tokens(tmp_path):
    rows = [
        {"prompt": f"{text} {'<eos> ' * (number < 7)}b", "completion": "c"}
        for number, text in enumerate(tiny.letters(30))
    ]
    file = tiny.write(tmp_path / "x.jsonl", rows)
    settings = {"paths": (file,), "eval_rows": 1, "sft_batch_size": 1}
    notes = create_datasets(settings, tiny.tokenizer(template=None), "sft", seed=0).notes
    assert notes == (
        "sft data: 7 rows have special tokens of the tokenizer in their texts, such as '<eos>', which are "
        "tokenized as text. If a chat template has already rendered these texts, set "
        "--config.data.parse_special_tokens=true.",
    )
    notes = create_datasets(
        settings | {"parse_special_tokens": True}, tiny.tokenizer(template=None), "sft", seed=0
    ).notes
    assert notes == (
        "sft data: 7 rows have special tokens of the tokenizer in their texts, such as '<eos>', which are "
        "tokenized as these tokens.",
    )


def test_special_tokens_in_any_part_of_a_row_are_text():
    """The special token is in the content, the tool calls, the tools and an option of the template."""
    family = FAMILIES["qwen"]
    tokenizer = tokenizer_of(family)
    tokenizer.chat_template = (
        "{{ tools | tojson }}{{ note }}{% for m in messages %}{{ '<|im_start|>' + m.role + (m.name or '') }}"
        "{{ (m.tool_calls or []) | tojson }}{{ m.content }}<|im_end|>{% endfor %}"
    )
    end = "<|im_end|>"
    call = {"function": {"name": end, "arguments": {end: [end, {"a": end}]}}}
    row = {
        "messages": [user(end), assistant("he") | {"tool_calls": [call]}],
        "tools": [{"name": end, "parameters": {end: 1}}],
        "chat_template_kwargs": {"note": end},
    }
    found = example(row, "sft", tokenizer)
    both = np.concatenate([found.prompt, found.completions[0]])
    assert special_in(both, family, tokenizer) == ["<|im_start|>", "<|im_end|>", "<|im_start|>", "<|im_end|>"]
    assert tokenizer.decode(both).count(end) == 10


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("phi3", {"role": "endoftext"}),
        ("phi3", {"role": " endoftext"}),
        ("phi3", {"role": "end|>\n<|assistant"}),
        ("phi3", {"role": "end|>\n<|user", "name": "x"}),
        ("pythia", {"role": "endoftext"}),
        ("qwen", {"role": "user", "name": "im_end"}),
        ("qwen", {"role": "user\nhe"}),
        ("qwen", {"role": "<|im_end|>"}),
        ("qwen", {"role": "user", "name": "a<|im_end|>"}),
        ("zephyr", {"role": "s"}),
        ("mistral", {"role": "user", "name": "/INST"}),
    ],
)
def test_a_role_or_name_cannot_complete_a_special_token(name, message):
    """A template may write '<|' + role + '|>'."""
    row = {"prompt": [user("he"), message | {"content": "the"}, user("he")]}
    with pytest.raises(DataError, match=r"is a part of the special token|is empty, too long, or has line breaks"):
        example(row, "ppo", tokenizer_of(FAMILIES[name]))


@every_family
def test_common_roles_and_names_are_accepted(name):
    tokenizer = tokenizer_of(FAMILIES[name])
    for role in ("developer", "tool", "ipython", "observation", "narrator", "Жанна", "role 7"):
        chat = [user("he") | {"name": "O'Brien (Bob), 3rd"}, {"role": role, "content": "x"}]
        assert "x" in tokenizer.decode(example({"prompt": chat}, "ppo", tokenizer).prompt)


@pytest.mark.parametrize("option", ["eos_token", "bos_token", "pad_token"])
def test_template_options_cannot_set_or_complete_special_tokens(option):
    row = {"prompt": [user("he")], "chat_template_kwargs": {option: "x"}}
    with pytest.raises(DataError, match=f"chat_template_kwargs sets {option}, which only the tokenizer may set"):
        example(row, "ppo", tokenizer_of(FAMILIES["llama3"]))
    with pytest.raises(DataError, match=r"option 'im_end' is a part of the special token '<.im_end.>'"):
        example(row | {"chat_template_kwargs": {"note": "im_end"}}, "ppo", tokenizer_of(FAMILIES["qwen"]))


@pytest.mark.parametrize(
    "template",
    [
        "{{ tools }}{{ messages[0].content }}",
        "{{ tools | tojson(ensure_ascii=True) }}{{ messages[0].content }}",
        "{{ messages[0].content | reverse }}",
        "{% for c in messages[0].content %}{{ c }}-{% endfor %}",
        "{{ messages[0].content[:4] }}",
    ],
)
def test_a_template_that_splits_or_escapes_marked_text_is_an_error(template):
    """The model would learn text that is not in the row."""
    tokenizer = tokenizer_of(FAMILIES["qwen"])
    tokenizer.chat_template = template
    row = {"prompt": [user("he <|im_end|> the")], "tools": [{"name": "f", "description": "say <|im_end|> é"}]}
    with pytest.raises(DataError, match="splits or escapes the text of a special token in the row"):
        example(row, "ppo", tokenizer)
    row = {"prompt": [user("he \\ufdd0 \\udb80 the")], "tools": [{"name": "f", "description": "é"}]}
    example(row, "ppo", tokenizer)  # text that only looks like an escaped mark


@pytest.mark.parametrize("template", ["| trim", "| upper", ".split('x') | last", "[1:]", "| tojson"])
def test_common_template_filters_do_not_break_marked_text(template):
    family = FAMILIES["qwen"]
    tokenizer = tokenizer_of(family)
    tokenizer.chat_template = "{{ messages[0].content TEMPLATE }}<|im_end|>".replace("TEMPLATE", template)
    found = example({"prompt": [user("x he <|im_start|> the ")]}, "ppo", tokenizer).prompt
    assert special_in(found, family, tokenizer) == ["<|im_end|>"]
    assert "<|im_start|>" in tokenizer.decode(found)


def with_normalizer(normalizer, *, normalized, special=True, tokens=("<|im_end|>", "<|im_start|>")):
    family = FAMILIES["qwen"]
    pieces = [*bytes_to_unicode().values(), "he"]
    bare = Tokenizer(models.BPE({piece: index for index, piece in enumerate(pieces)}, [("h", "e")]))
    bare.pre_tokenizer, bare.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bare.normalizer = normalizer
    bare.add_tokens([AddedToken(token, normalized=normalized, special=special) for token in tokens])
    return PreTrainedTokenizerFast(tokenizer_object=bare, eos_token="<|im_end|>", chat_template=family.template)


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize(
    ("normalizer", "forged"),
    [
        (normalizers.NFKC(), "\uff1c|im_end|\uff1e"),
        (normalizers.Lowercase(), "<|IM_END|>"),
        (normalizers.Replace("~", ""), "<|im_~end|>"),
    ],
)
def test_a_normalizer_cannot_make_a_special_token_of_text(normalizer, forged, normalized):
    """Some tokenizers search for special tokens in the normalized text."""
    tokenizer = with_normalizer(normalizer, normalized=normalized)
    harmless = example({"prompt": [user("x")]}, "ppo", tokenizer).prompt.tolist()
    ids = [tokenizer.convert_tokens_to_ids(token) for token in ("<|im_start|>", "<|im_end|>")]
    for said in (f"x {forged}", f"x {forged} <|im_end|>"):
        found = example({"prompt": [user(said)]}, "ppo", tokenizer).prompt.tolist()
        assert [found.count(index) for index in ids] == [harmless.count(index) for index in ids] == [2, 1]


def test_marked_text_does_not_change_the_tokens_of_the_text_before_it():
    for tokenizer in (
        with_normalizer(normalizers.NFKC(), normalized=True),
        with_normalizer(None, normalized=False),
        tokenizer_of(FAMILIES["openhermes"]),
    ):
        text = tokenizer.apply_chat_template([user("he"), assistant("the")], tokenize=False)
        (plain,) = token_ids([text], tokenizer)
        (beside,) = token_ids([text + marked("<|im_end|>", tokenizer)], tokenizer)
        assert beside[: len(plain)] == plain
        assert plain.count(tokenizer.convert_tokens_to_ids("<|im_start|>")) == 2


def test_pieces_that_merge_to_a_special_token_stay_text():
    pieces = [*bytes_to_unicode().values(), "</", "s>", "</s>"]
    merges = [("<", "/"), ("s", ">"), ("</", "s>")]
    bare = Tokenizer(models.BPE({piece: index for index, piece in enumerate(pieces)}, merges))
    bare.pre_tokenizer, bare.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bare.add_special_tokens([AddedToken("</s>", normalized=False)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bare, eos_token="</s>")
    found = example({"prompt": "a </s> b"}, "ppo", tokenizer).prompt
    assert tokenizer.eos_token_id not in found.tolist()
    assert tokenizer.decode(found) == "a </s> b"


@pytest.mark.parametrize("longest", [10, 200])  # longer tokens use another search
def test_the_longest_of_many_special_tokens_is_found_fast(longest):
    tokens = [f"<SPECIAL_{number}>" for number in range(3000)] + ["<", "<S", "_" * longest]
    tokenizer = with_normalizer(None, normalized=False, tokens=[*tokens, "<|im_end|>"])
    assert first_special("a <SPECIAL_17> b", tokenizer) == "<SPECIAL_17>"
    assert first_special("a <SPECIAL_", tokenizer) == "<S"
    if longest > 10:
        return
    text = "<" * 200_000 + "<SPECIAL_2999>"
    started = time.monotonic()
    assert without_marks(marked(text, tokenizer), tokenizer) == text
    assert time.monotonic() - started < 3


def test_chat_and_columns_keep_their_original_text():
    tokenizer = tokenizer_of(FAMILIES["qwen"])
    found = example({"prompt": [user("a<|im_end|>")], "own": "<|im_end|>"}, "ppo", tokenizer)
    assert found.chat == [user("a<|im_end|>")]
    assert found.columns == {"own": "<|im_end|>"}


def test_marks_in_a_rows_own_text_stay_text():
    tokenizer = tokenizer_of(FAMILIES["qwen"])
    for text in (
        MARK,
        f"{MARK}\U000f0001",
        f"a{MARK}",
        f"{MARK}{MARK}<|im_end|>",
        "\U000f0000\U000f0001",
        "\ufdd10-1\ufdd1",
    ):
        once = marked(text, tokenizer)
        assert without_marks(once, tokenizer) == text
        assert tokenizer.decode(token_ids([once], tokenizer)[0]) == text
    texts = [marked("a<|im_end|>", tokenizer), marked("a<|im_start|>", tokenizer)]
    assert common_beginning(texts) == "a"  # a mark is not separated from its number


def test_without_special_tokens_all_text_is_tokenized_as_usual():
    bare = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, MARK: 2, "<|im_end|>": 3}, unk_token="<unk>"))
    bare.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bare)
    assert tokenizer.all_special_tokens == []
    for text, ids in ((f"a {MARK} a", [1, 2, 1]), ("a <|im_end|>", [1, 3])):
        assert token_ids([marked(text, tokenizer)], tokenizer) == [ids]


def test_a_special_token_is_not_formed_across_prompt_and_completion():
    """The prompt ends with the first part of a special token, and the completion begins with the rest."""
    family = FAMILIES["qwen"]
    tokenizer = tokenizer_of(family)
    found = example({"prompt": "he<|im_", "completion": "end|>the"}, "sft", tokenizer)
    assert special_in(np.concatenate([found.prompt, found.completions[0]]), family, tokenizer) == ["<|im_end|>"]
    assert tokenizer.decode(found.completions[0]) == "end|>the<|im_end|>"


def test_a_whole_word_with_the_text_of_a_special_token_is_not_special():
    """A word-level model has the word <eos> in its vocabulary, even if no special tokens are split off."""
    found = example({"prompt": "a", "completion": "b <eos> c <pad>"}, "sft", tiny.tokenizer())
    assert found.completions[0].tolist().count(tiny.EOS) == 1
    assert found.completions[0][-1] == tiny.EOS


def test_special_tokens_added_later_are_recognised():
    bare = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "<x>": 2}, unk_token="<unk>"))
    bare.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bare, unk_token="<unk>", eos_token="a")
    assert token_ids([marked("a <x>", tokenizer)], tokenizer)[0][-1] == 2
    tokenizer.add_special_tokens({"additional_special_tokens": ["<x>"]})
    assert 2 not in token_ids([marked("b <x>", tokenizer)], tokenizer)[0]
