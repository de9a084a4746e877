"""TRL's formats, row by row: what each phase takes."""

import pytest

from jax_rlhf.data import DataConfig, DataError
from jax_rlhf.data.formats import row_texts
from jax_rlhf.data.sources import Row
from tests.data import tiny


def texts(content, phase, tokenizer=None, **config):
    return row_texts(Row(content, "x.jsonl", 7), phase, DataConfig(**config), tokenizer or tiny.tokenizer())


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}


@pytest.mark.parametrize(
    ("content", "phase", "prompt", "completions"),
    [
        ({"text": "a b"}, "sft", "", ("a b",)),
        ({"prompt": "a", "completion": "b"}, "sft", "a", ("b",)),
        ({"prompt": "a", "completion": "b"}, "ppo", "a", ()),
        (PAIR, "sft", "a", ("b",)),
        (PAIR, "reward", "a", ("b", "c")),
        (PAIR, "ppo", "a", ()),
        ({"chosen": "x y\n good z", "rejected": "x y\n grim"}, "reward", "x y", ("\n good z", "\n grim")),
        ({"chosen": "same", "rejected": "same"}, "reward", "", ("same", "same")),
        ({"prompt": "a"}, "ppo", "a", ()),
    ],
)
def test_plain_texts(content, phase, prompt, completions):
    read = texts(content, phase)
    assert (read.prompt, read.completions, read.templated) == (prompt, completions, False)


@pytest.mark.parametrize(
    ("content", "phase", "prompt", "completions"),
    [
        ({"messages": [user("a"), assistant("b")]}, "sft", "<user> a <eos> <assistant> ", ("b <eos> ",)),
        ({"messages": [user("a"), assistant("b")]}, "ppo", "<user> a <eos> <assistant> ", ()),
        ({"prompt": [user("a")]}, "ppo", "<user> a <eos> <assistant> ", ()),
        (
            {"prompt": [user("a")], "chosen": [assistant("b")], "rejected": [assistant("c")]},
            "reward",
            "<user> a <eos> <assistant> ",
            ("b <eos> ", "c <eos> "),
        ),
        (
            {"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]},
            "reward",
            "<user> a <eos> <assistant> ",
            ("b <eos> ", "c <eos> "),
        ),
    ],
)
def test_chats_go_through_the_template(content, phase, prompt, completions):
    read = texts(content, phase)
    assert (read.prompt, read.completions, read.templated) == (prompt, completions, True)


WHOLE = {"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]}
ANSWERS = {"chosen": [assistant("b")], "rejected": [assistant("c")]}


@pytest.mark.parametrize("answers", [WHOLE, ANSWERS])
@pytest.mark.parametrize(
    ("phase", "completions"), [("sft", ("b <eos> ",)), ("reward", ("b <eos> ", "c <eos> ")), ("ppo", ())]
)
def test_a_prompt_that_is_a_text_beside_chats(answers, phase, completions):
    read = texts({"prompt": "a"} | answers, phase)
    assert (read.prompt, read.completions) == ("<user> a <eos> <assistant> ", completions)
    assert read.templated


def test_chats_that_are_the_same_have_no_answer_less():
    read = texts({"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("b")]}, "reward")
    assert read.completions == ("b <eos> ", "b <eos> ")


def test_an_empty_answer_of_a_chat_is_empty():
    read = texts({"prompt": [user("a")], "chosen": [assistant("b")], "rejected": [assistant(" ")]}, "reward")
    assert read.completions == ("b <eos> ", "")


def test_what_a_template_ends_a_conversation_with_is_no_part_of_the_prompt():
    template = tiny.TEMPLATE.replace("{% endif %}", "{% else %}{{ '<bos>' }}{% endif %}")  # Phi-3's ends so
    read = texts({"messages": [user("a"), assistant("b")]}, "sft", tiny.tokenizer(template=template))
    assert (read.prompt, read.completions) == ("<user> a <eos> <assistant> ", ("b <eos> <bos>",))


def test_a_template_that_changes_the_prompt_once_there_is_an_answer():
    template = "{% for m in messages %}{{ m.content if loop.last or messages|length == 1 else 'x' }} {% endfor %}"
    with pytest.raises(DataError, match="the chat template writes the prompt in another way"):
        texts({"messages": [user("a"), assistant("b")]}, "sft", tiny.tokenizer(template=template))


def test_other_columns_come_along_and_margins_are_numbers():
    read = texts(PAIR | {"margin": 2, "source": "x"}, "reward")
    assert (read.margin, read.columns) == (2.0, {"source": "x"})
    assert texts(PAIR | {"margin": -2}, "reward").margin == -2.0
    assert texts({"question": "a", "answer": "b"}, "sft", prompt_column="question", completion_column="answer").prompt


@pytest.mark.parametrize(
    ("content", "phase", "message"),
    [
        ({"question": "a", "answer": "b"}, "sft", r"line 7: the sft phase needs .* this row has answer, question"),
        ({"prompt": "a"}, "sft", "the sft phase needs"),
        ({"text": "a"}, "reward", "the reward phase needs"),
        ({"text": "a"}, "ppo", "text with config.data.prompt_tokens"),
        ({"prompt": "a", "completion": None}, "sft", "the sft phase needs"),
        ({"prompt": 3, "completion": "b"}, "sft", "is a int; a text or a list of chat messages"),
        ({"messages": [{"role": "user"}]}, "sft", "is no chat message"),
        ({"messages": [user("a")]}, "sft", "the last message is the user's"),
        ({"messages": []}, "sft", "at least one chat message"),
        (PAIR | {"margin": "much"}, "reward", "'margin' holds 'much'; a number is expected"),
    ],
)
def test_a_row_that_does_not_fit_is_named(content, phase, message):
    with pytest.raises(DataError, match=message):
        texts(content, phase)


def test_a_chat_needs_a_template():
    with pytest.raises(DataError, match="line 7: this row is a chat, and the tokenizer has no chat template"):
        texts({"messages": [user("a"), assistant("b")]}, "sft", tiny.tokenizer(template=None))
    with pytest.raises(DataError, match="the chat template fails: TemplateError: no"):
        texts({"prompt": [user("a")]}, "ppo", tiny.tokenizer(template="{{ raise_exception('no') }}"))
