"""Formats of rows, such as TRL's: the prompt and completions that each phase takes from a row."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from jax_rlhf.data import DataConfig, DataError
from jax_rlhf.data.formats import own_prompt, row_texts
from jax_rlhf.data.sources import Row, read_rows
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
        ({"text": "a b", "prompt": "a"}, "sft", "", ("a b",)),  # the text contains the prompt
        ({"text": "a b", "prompt": "a"}, "ppo", "a", ()),
        ({"text": "x", "prompt": "a", "completion": "b"}, "sft", "a", ("b",)),
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
def test_plain_texts_are_read_without_the_chat_template(content, phase, prompt, completions):
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
def test_chats_are_rendered_by_the_chat_template(content, phase, prompt, completions):
    read = texts(content, phase)
    assert (read.prompt, read.completions, read.templated) == (prompt, completions, True)


WHOLE = {"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]}
ANSWERS = {"chosen": [assistant("b")], "rejected": [assistant("c")]}


@pytest.mark.parametrize("answers", [WHOLE, ANSWERS])
@pytest.mark.parametrize(
    ("phase", "completions"), [("sft", ("b <eos> ",)), ("reward", ("b <eos> ", "c <eos> ")), ("ppo", ())]
)
def test_a_text_prompt_beside_chat_answers_is_a_user_message(answers, phase, completions):
    read = texts({"prompt": "a"} | answers, phase)
    assert (read.prompt, read.completions) == ("<user> a <eos> <assistant> ", completions)
    assert read.templated


def test_two_equal_chats_keep_their_last_message_as_the_answer():
    read = texts({"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("b")]}, "reward")
    assert read.completions == ("b <eos> ", "b <eos> ")


def test_a_blank_chat_answer_is_an_empty_completion():
    read = texts({"prompt": [user("a")], "chosen": [assistant("b")], "rejected": [assistant(" ")]}, "reward")
    assert read.completions == ("b <eos> ", "")


CALL = {"type": "function", "function": {"name": "time", "arguments": {"zone": "z"}}}
TOOLS = [{"type": "function", "function": {"name": "time", "parameters": {"type": "object"}}}]
AGENT = (
    "{% if tools %}{{ '<tools> ' ~ tools[0].function.name ~ ' ' }}{% endif %}"
    "{% for m in messages %}{{ '<' ~ m.role ~ '> ' ~ m.content ~ ' ' }}{% for call in m.tool_calls or [] %}"
    "{{ '<call> ' ~ call.function.name ~ ' ' ~ call.function.arguments.zone ~ ' ' }}{% endfor %}"
    "{{ '<eos> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)
ASKED = "<user> a <eos> <assistant> "


@pytest.mark.parametrize("content", [{"content": ""}, {"content": None}, {}])
@pytest.mark.parametrize("arguments", [{"zone": "z"}, '{"zone": "z"}', {"zone": "z", "unit": None}])
def test_a_tool_call_is_rendered_with_or_without_content(content, arguments):
    """In OpenAI's format the content is null, and the arguments are a JSON string."""
    call = CALL | {"function": CALL["function"] | {"arguments": arguments}}
    turn = {"role": "assistant", "tool_calls": [call]} | content
    agent = tiny.tokenizer(template=AGENT)
    read = texts({"messages": [user("a"), turn]}, "sft", agent)
    assert (read.prompt, read.completions) == (ASKED, (" <call> time z <eos> ",))
    told = [user("a"), turn, {"role": "tool", "content": "b"}, assistant("c")]
    for tools, begin in ((None, ""), (TOOLS, "<tools> time "), (json.dumps(TOOLS), "<tools> time "), ([], "")):
        read = texts({"messages": told, "tools": tools}, "sft", agent)
        history = f"{begin}<user> a <eos> <assistant>  <call> time z <eos> <tool> b <eos> <assistant> "
        assert (read.prompt, read.completions) == (history, ("c <eos> ",))
        assert texts({"prompt": told[:-1], "tools": tools}, "ppo", agent).prompt == history


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [user("a"), {"role": "assistant", "content": "x", "tool_calls": [{"function": wrong}]}]}
        for wrong in ("f", [], 7, True)
    ]
    + [
        {"messages": [user("a")], "completion": 5},
        {"messages": [user("a")], "chosen": 5, "rejected": 5},
        {"messages": [user("a")], "chosen": True, "rejected": [assistant("b")]},
        {"messages": [user("a"), assistant("b")], "completion": {"a": 1}},
        {"prompt": [user("a")], "completion": [7]},
        {"prompt": 1.5, "chosen": "a", "rejected": "b"},
    ],
)
def test_invalid_messages_and_tool_calls_are_errors_that_name_the_line(row):
    for phase in ("sft", "reward"):
        if phase == "sft" or "chosen" in row:
            with pytest.raises(DataError, match=r"x.jsonl, line 7: "):
                row_texts(Row(row, "x.jsonl", 7), phase, DataConfig(), tiny.tokenizer(template=AGENT))


@pytest.mark.parametrize("call", [{"function": None, "name": "time"}, {"name": "time"}, {"function": {"name": 7}}])
def test_an_incomplete_tool_call_is_passed_to_the_template(call):
    bare = AGENT.replace("call.function.name ~ ' ' ~ call.function.arguments.zone", "(call.name or call.function.name)")
    row = {"messages": [user("a"), assistant("b") | {"tool_calls": [call]}]}
    read = texts(row, "sft", tiny.tokenizer(template=bare))
    assert read.completions == (f"b <call> {call.get('name', 7)} <eos> ",)


def test_none_fields_of_messages_in_parquet_files_are_removed(tmp_path):
    """Arrow stores every message with the keys of all messages; the absent ones are None."""
    rows = [
        {"messages": [user("a"), {"role": "assistant", "content": None, "tool_calls": [CALL]}], "tools": TOOLS},
        {"messages": [user("b"), assistant("c")], "tools": None},
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    first, second = read_rows(str(tmp_path / "x.parquet"), phase="sft", split="train", hub_split="train")
    agent = tiny.tokenizer(template=AGENT.replace("m.tool_calls or []", "m.tool_calls"))
    assert second.content["messages"] == [user("b"), assistant("c")]
    assert row_texts(first, "sft", DataConfig(), agent).prompt.startswith("<tools> time <user> a")
    assert row_texts(second, "sft", DataConfig(), agent).completions == ("c <eos> ",)


@pytest.mark.parametrize("phase", ["sft", "ppo"])
@pytest.mark.parametrize("prompt", ["a", [user("a")], "something else"])
def test_messages_take_precedence_over_a_prompt(phase, prompt):
    """ultrachat_200k and no_robots have the first question as `prompt`, and the whole chat as `messages`."""
    turns = [user("a"), assistant("b"), user("c"), assistant("d")]
    read = texts({"prompt": prompt, "prompt_id": "7", "messages": turns}, phase)
    assert read.prompt == "<user> a <eos> <assistant> b <eos> <user> c <eos> <assistant> "
    assert read.completions == (("d <eos> ",) if phase == "sft" else ())
    assert read.columns == {"prompt_id": "7"}
    assert read.chat == turns[:-1]
    row = Row({"prompt": prompt, "messages": turns}, "x.jsonl", 1)
    assert own_prompt(row, DataConfig()) == own_prompt(Row({"messages": turns}, "x.jsonl", 1), DataConfig())


def test_a_pair_takes_precedence_over_messages():
    """ultrafeedback_binarized has a prompt, a pair of whole conversations, and the chosen one as messages."""
    row = {"prompt": "a", "messages": WHOLE["chosen"]} | WHOLE
    for phase, completions in (("sft", ("b <eos> ",)), ("reward", ("b <eos> ", "c <eos> ")), ("ppo", ())):
        read = texts(row, phase)
        assert (read.prompt, read.completions) == (ASKED, completions)


@pytest.mark.parametrize(
    ("completion", "expected"),
    [([assistant("d")], "d <eos> "), ("d", "d <eos> "), ([assistant("d"), user("e"), assistant("f")], None)],
)
def test_a_prompt_that_ends_with_an_assistant_message_is_continued(completion, expected):
    asked = [user("a"), assistant("b c ")]
    assert texts({"prompt": asked}, "ppo").prompt == "<user> a <eos> <assistant> b c "
    assert texts({"prompt": asked}, "ppo").continued
    read = texts({"prompt": asked, "completion": completion}, "sft")
    expected = expected or "d <eos> <user> e <eos> <assistant> f <eos> "
    assert (read.prompt, read.completions) == ("<user> a <eos> <assistant> b c ", (expected,))
    read = texts({"prompt": asked, "chosen": "d", "rejected": "e"}, "reward")
    assert (read.prompt, read.completions) == ("<user> a <eos> <assistant> b c ", ("d <eos> ", "e <eos> "))


def test_consecutive_assistant_messages_are_separate_turns():
    """An answer continues an assistant message only at the end of a prompt column."""
    turns = [user("a"), assistant("b"), assistant("c")]
    for phase, completions in (("sft", ("c <eos> ",)), ("ppo", ())):
        read = texts({"messages": turns}, phase)
        assert (read.prompt, read.completions) == ("<user> a <eos> <assistant> b <eos> <assistant> ", completions)
        assert not read.continued
    read = texts({"chosen": turns, "rejected": [*turns[:2], assistant("d")]}, "reward")
    assert (read.prompt, read.completions) == (
        "<user> a <eos> <assistant> b <eos> <assistant> ",
        ("c <eos> ", "d <eos> "),
    )


@pytest.mark.parametrize("column", ["messages", "conversations"])
@pytest.mark.parametrize("answer", ["{}", assistant("{}"), [assistant("{}")], {"from": "gpt", "value": "{}"}])
def test_messages_beside_answers_are_the_prompt(column, answer):
    """LLaMA-Factory's ranking format is read, in which an answer is one message without a list."""
    filled = lambda text: json.loads(json.dumps(answer).replace("{}", text))  # noqa: E731
    pair = {column: [user("a")], "chosen": filled("b"), "rejected": filled("c")}
    for phase, completions in (("sft", ("b <eos> ",)), ("reward", ("b <eos> ", "c <eos> ")), ("ppo", ())):
        read = texts(pair, phase)
        assert (read.prompt, read.completions) == (ASKED, completions)
    read = texts({column: [user("a")], "completion": filled("b")}, "sft")
    assert (read.prompt, read.completions) == (ASKED, ("b <eos> ",))
    row = Row(pair, "x.jsonl", 1)
    assert own_prompt(row, DataConfig()) == ("a", "prompt")


@pytest.mark.parametrize("begin", [{}, {"prompt": "a"}, {"prompt": [user("a")]}])
def test_messages_that_repeat_the_chosen_conversation_are_ignored(begin):
    """In ultrafeedback_binarized, `messages` is a copy of `chosen`."""
    whole = {"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]}
    read = texts({"messages": whole["chosen"]} | whole | begin, "reward")
    assert (read.prompt, read.completions) == (ASKED, ("b <eos> ", "c <eos> "))


def test_with_answers_a_prompt_takes_precedence_over_messages():
    answers = {"chosen": [assistant("b")], "rejected": [assistant("c")]}
    for prompt in ("a", [user("a")]):
        read = texts({"messages": [user("x"), assistant("y")], "prompt": prompt} | answers, "reward")
        assert (read.prompt, read.completions) == (ASKED, ("b <eos> ", "c <eos> "))


def test_the_system_column_of_a_sharegpt_row_is_the_system_message():
    row = {"system": "s", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    assert texts(row, "sft").prompt == "<system> s " + "<eos> " + ASKED
    assert texts({"system": "s", "prompt": [user("a")]}, "ppo").prompt == ASKED  # not a ShareGPT row


@pytest.mark.parametrize(("asks", "says"), [("human", "gpt"), ("user", "model"), ("Human", "bot")])
def test_other_role_names_are_mapped_to_user_and_assistant(asks, says):
    turns = [{"role": asks, "content": "a"}, {"role": says, "content": "b"}]
    read = texts({"messages": turns}, "sft")
    assert (read.prompt, read.completions) == (ASKED, ("b <eos> ",))
    read = texts({"chosen": turns, "rejected": [turns[0], {"role": says, "content": "c"}]}, "reward")
    assert (read.prompt, read.completions) == (ASKED, ("b <eos> ", "c <eos> "))


def test_an_answer_must_begin_with_an_assistant_message():
    with pytest.raises(DataError, match="line 7: an answer begins with the user's message"):
        texts({"prompt": [user("a")], "completion": [user("b")]}, "sft")
    unlike = {"chosen": [user("a"), assistant("b")], "rejected": [user("c"), assistant("d")]}
    read = texts(unlike, "reward")  # no common prompt: each is a whole conversation
    assert (read.prompt, read.completions) == ("", (ASKED + "b <eos> ", "<user> c <eos> <assistant> d <eos> "))
    system = {"role": "system", "content": "s"}
    whole = {name: [user("a"), assistant(name[0])] for name in ("chosen", "rejected")}
    read = texts({"prompt": [system, user("a")]} | whole, "reward")  # they lack the system message
    assert (read.prompt, read.completions) == (f"<system> s <eos> {ASKED}", ("c <eos> ", "r <eos> "))


@pytest.mark.parametrize("content", [None, "", "b"])
def test_a_tool_call_that_the_template_omits_is_reported(content):
    """Without the tool call, the model would learn to end its turn at once."""
    turn = {"role": "assistant", "content": content, "tool_calls": [CALL]}
    assert texts({"messages": [user("a"), turn]}, "sft").unwritten == "time"
    assert texts({"messages": [user("a"), turn]}, "sft", tiny.tokenizer(template=AGENT)).unwritten == ""
    for template, unwritten in ((tiny.TEMPLATE, True), (AGENT, False)):
        row = {"prompt": [user("a")], "tools": TOOLS}
        assert texts(row, "ppo", tiny.tokenizer(template=template)).tools_unwritten == unwritten
        told = {"prompt": [user("a"), turn, {"role": "tool", "content": "c"}]}
        assert texts(told, "ppo", tiny.tokenizer(template=template)).tools_unwritten == unwritten
    listed = tiny.tokenizer(template=AGENT.replace("m.tool_calls or []", "[]"))  # renders the tools, but no calls
    read = texts({"messages": [user("what time a"), turn], "tools": TOOLS}, "sft", listed)
    assert read.prompt == "<tools> time <user> what time a <eos> <assistant> "
    assert read.unwritten == "time"


def test_a_template_that_fails_without_tool_calls_is_taken_to_read_them():
    needed = "{% if not (m.content or m.tool_calls) %}{{ raise_exception('empty') }}{% endif %}"
    strict = tiny.tokenizer(template=tiny.TEMPLATE.replace("{{ '<' ", needed + "{{ '<' "))
    called = [user("a"), {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "c"}]
    assert not texts({"prompt": called}, "ppo", strict).tools_unwritten


def test_an_answer_may_have_several_messages():
    """The tool's message may be empty, and the template may change its text."""
    answer = [{"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": ""}, assistant("c")]
    read = texts({"prompt": [user("a")], "completion": answer}, "sft", tiny.tokenizer(template=AGENT))
    assert (read.prompt, read.unwritten) == (ASKED, "")
    assert read.completions == (" <call> time z <eos> <tool>  <eos> <assistant> c <eos> ",)
    answer[1]["content"] = "b c"
    upper = AGENT.replace("m.content", "(m.content | upper if m.role == 'tool' else m.content)")
    read = texts({"prompt": [user("a")], "completion": answer}, "sft", tiny.tokenizer(template=upper))
    assert read.completions == (" <call> time z <eos> <tool> B C <eos> <assistant> c <eos> ",)
    assert read.unwritten == ""


def test_a_prompt_repeated_at_the_start_of_its_answers_is_removed():
    read = texts({"prompt": [user("a")]} | WHOLE, "reward")
    assert (read.prompt, read.completions) == (ASKED, ("b <eos> ", "c <eos> "))


@pytest.mark.parametrize(
    ("template", "turn", "unwritten"),
    [
        ("m.content.split('</think>') | last", assistant("<think> x </think> b"), "<think> x </think> b"),
        ("m.content", assistant("b") | {"reasoning_content": "x y"}, "x y"),
        ("m.content | trim", assistant(" b\n"), ""),
        ("m.reasoning_content ~ ' </think> ' ~ m.content", assistant("b") | {"reasoning_content": "x  y"}, ""),
    ],
)
def test_a_part_of_an_answer_that_the_template_omits_is_reported(template, turn, unwritten):
    template = tiny.TEMPLATE.replace("m.content", f"({template} if m.role == 'assistant' else m.content)")
    read = texts({"messages": [user("a"), turn]}, "sft", tiny.tokenizer(template=template))
    assert read.unwritten == unwritten
    history = texts(
        {"messages": [user("a"), turn, user("c"), assistant("d")]}, "sft", tiny.tokenizer(template=template)
    )
    assert history.unwritten == "" or "reasoning_content ~" in template  # only the answer that is learned is checked


@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_sharegpt_rows_are_read_as_chats(column):
    turns = [
        {"from": "system", "value": "s"},
        {"from": "human", "value": "a", "weight": None},
        {"from": "gpt", "value": "b"},
    ]
    read = texts({column: turns, "id": "x"}, "sft")
    assert (read.prompt, read.completions) == ("<system> s <eos> <user> a <eos> <assistant> ", ("b <eos> ",))
    assert read.columns == {"id": "x"}
    with pytest.raises(DataError, match="line 7: a message is from 'robot'; known are human, user"):
        texts({column: [{"from": "robot", "value": "a"}]}, "ppo")


@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_messages_may_be_a_json_string_as_in_csv_files(column):
    read = texts({column: json.dumps([user("a"), assistant("b")])}, "sft")
    assert (read.prompt, read.completions) == (ASKED, ("b <eos> ",))
    for wrong in ("[", "a b", '{"a"', "7"):
        with pytest.raises(DataError, match="line 7: messages must be a list with at least one chat message"):
            texts({column: wrong}, "sft", messages_column=column)


def test_text_parts_are_joined_and_image_parts_are_errors():
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]
    assert texts({"messages": [user(parts), assistant("c")]}, "sft").prompt == "<user> a b <eos> <assistant> "
    with pytest.raises(DataError, match="line 7: a message has a part of type 'image'; only text parts are supported"):
        texts({"messages": [user([{"type": "image"}]), assistant("c")]}, "sft")


def test_chat_template_kwargs_of_a_row_reach_the_template():
    template = "{{ thinking | default('none') ~ ' ' }}" + tiny.TEMPLATE
    for value, begin in ((None, "none "), ({"thinking": "a"}, "a "), ('{"thinking": "a"}', "a ")):
        row = {"prompt": [user("b")], "chat_template_kwargs": value}
        assert texts(row, "ppo", tiny.tokenizer(template=template)).prompt.startswith(begin)
    with pytest.raises(DataError, match=r"line 7: chat_template_kwargs is .*; it must be an object"):
        texts({"prompt": [user("b")], "chat_template_kwargs": {"tokenize": True}}, "ppo")
    with pytest.raises(DataError, match="it must be an object of the template"):  # a row cannot set the template
        texts({"prompt": [user("b")], "chat_template_kwargs": {"chat_template": "{{ 'x' }}"}}, "ppo")


def test_as_chat_makes_chats_of_plain_texts_with_a_prompt():
    read = texts(PAIR, "reward", as_chat=True)
    assert (read.prompt, read.completions, read.templated) == (ASKED, ("b <eos> ", "c <eos> "), True)
    assert read.chat == [user("a")]
    assert texts({"prompt": "a", "completion": "b"}, "sft", as_chat=True).completions == ("b <eos> ",)
    assert texts({"prompt": "a"}, "ppo", as_chat=True).prompt == ASKED
    assert not texts({"text": "a b"}, "sft", as_chat=True).templated  # it has no prompt


HH = "\n\nHuman: May I?\n\nAssistant: Yes.\n\nHuman: And now?\n\nAssistant:"


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        (HH + " I think so.", HH + " I think not.", HH),
        (HH + " No.", HH + " No!", HH),
        (HH + " No.\n\nHuman: b\n\nAssistant: c", HH + " Yes.", HH),  # the chosen conversation goes on
        ("Q: a\n### Response:\nI am b", "Q: a\n### Response:\nI am c", "Q: a\n### Response:\n"),
        ("USER: a ASSISTANT: I am b", "USER: a ASSISTANT: I am c", "USER: a ASSISTANT:"),
        (
            "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nI am b",
            "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nI am c",
            "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n",
        ),
        (
            "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n\nb",  # both answers begin with an empty line
            "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n\nc",
            "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n",
        ),
        ("[INST] a [/INST] I b", "[INST] a [/INST] I c", "[INST] a [/INST]"),
        *(
            (before + "I am b", before + "I am c", before)
            for before in (
                "<|user|>\na<|end|>\n<|assistant|>\n",
                "<start_of_turn>user\na<end_of_turn>\n<start_of_turn>model\n",
                "<|start_header_id|>user<|end_header_id|>\n\na<|eot_id|>"
                "<|start_header_id|>assistant<|end_header_id|>\n\n",
                "<|start|>user<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>",
                "<|im_start|>user<|im_sep|>a<|im_end|><|im_start|>assistant<|im_sep|>",
                "<｜User｜>a<｜Assistant｜>",
                "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>a<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
                "GPT4 Correct User: a<|end_of_turn|>GPT4 Correct Assistant:",
                "Human: a\nAI:",
                "User: a\nBot:",
                "assistant: hi\nuser: a\nassistant:",
                "### Instruction:\na\n\n### Response:\n",
                "### Human: a ### Assistant:",
                "## Question\na\n## Answer\n",
                "用户：a\n助手：",
                "Q: a\nA: b\n\nQ: c\nA:",
                "Question: a\nAnswer:",
                "SUBREDDIT: r/a\nPOST: a b\nTL;DR:",
                "问:天空?答:",
            )
        ),
        # An answer may contain "Answer:".
        (HH + " It is so.\nAnswer: 4", HH + " It is so.\nAnswer: 5", HH),
        ("Ask an assistant: it is good", "Ask an assistant: it is grim", "Ask an assistant: it is"),
        ("a film so good", "a film so grim", "a film so"),
        ("it ended 2:4", "it ended 2:5", "it ended"),
        ("good", "grim", ""),
        ("问:天空什么颜色?答:蓝色", "问:天空什么颜色?答:绿色", "问:天空什么颜色?答:"),
        ("空は何色ですか？青です", "空は何色ですか？緑です", "空は何色ですか？"),
        ("ฟ้าสีอะไรฟ้า", "ฟ้าสีอะไรเขียว", "ฟ้าสีอะไร"),
        ("Q:2+2?A:4", "Q:2+2?A:5", "Q:2+2?A:"),
        ("하늘은 파란색", "하늘은 파랑", "하늘은"),  # Korean has spaces between words
        ("蓝", "蓝色", ""),  # each answer must have a text
        ("same", "same", ""),
    ],
)
def test_the_prompt_of_a_pair_of_texts_ends_where_the_answers_begin(chosen, rejected, prompt):
    read = texts({"chosen": chosen, "rejected": rejected}, "reward")
    assert (read.prompt, read.completions) == (prompt, (chosen[len(prompt) :], rejected[len(prompt) :]))
    assert read.implicit
    assert texts({"chosen": chosen, "rejected": rejected}, "sft").prompt == prompt


@pytest.mark.parametrize(
    ("label", "learned"),
    [
        (True, True),
        (False, False),
        (1, True),
        (0, False),
        ("False", False),
        ("true", True),
        ("0", False),
        ("0.0", False),
        (0.0, False),
        (1.0, True),
        ("No", False),
        ("", True),
        (None, True),
        (3, True),
        ("negative", True),
    ],
)
def test_sft_does_not_learn_completions_with_a_false_label(label, learned):
    """TRL's unpaired preferences (KTO) have a true or false label."""
    row = {"prompt": "a", "completion": "b", "label": label}
    assert (texts(row, "sft").left_out == "") == learned
    assert texts(row, "sft", label_column="none").left_out == ""
    assert (texts(row, "ppo").left_out, texts(row, "ppo").prompt) == ("", "a")
    assert texts(row, "ppo").columns == {"label": label}  # a reward function may use it
    assert texts({"text": "a", "label": label}, "sft").left_out == ""  # a classifier's label


def test_text_that_closes_a_conversation_is_not_part_of_the_prompt():
    template = tiny.TEMPLATE.replace("{% endif %}", "{% else %}{{ '<bos>' }}{% endif %}")  # as in Phi-3's
    read = texts({"messages": [user("a"), assistant("b")]}, "sft", tiny.tokenizer(template=template))
    assert (read.prompt, read.completions) == ("<user> a <eos> <assistant> ", ("b <eos> <bos>",))


def test_a_template_that_changes_the_prompt_before_an_answer_is_an_error():
    template = "{% for m in messages %}{{ m.content if loop.last or messages|length == 1 else 'x' }} {% endfor %}"
    with pytest.raises(DataError, match="the chat template renders the prompt differently"):
        texts({"messages": [user("a"), assistant("b")]}, "sft", tiny.tokenizer(template=template))


def test_margins_and_other_columns_are_read_and_columns_can_be_renamed():
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
        ({"prompt": 3, "completion": "b"}, "sft", "is of type int; it must be a text or a list of chat messages"),
        ({"messages": [{"role": "user"}]}, "sft", "is not a chat message"),
        ({"messages": [user("a")]}, "sft", "the last message is the user's"),
        ({"messages": []}, "sft", "at least one chat message"),
        (PAIR | {"margin": "much"}, "reward", "'margin' is 'much'; it must be a number"),
    ],
)
def test_an_unusable_row_is_an_error_that_says_why(content, phase, message):
    with pytest.raises(DataError, match=message):
        texts(content, phase)


def test_a_missing_or_failing_chat_template_is_an_error():
    with pytest.raises(DataError, match="line 7: this row is a chat, and the tokenizer has no chat template"):
        texts({"messages": [user("a"), assistant("b")]}, "sft", tiny.tokenizer(template=None))
    with pytest.raises(DataError, match="the chat template fails: TemplateError: no"):
        texts({"prompt": [user("a")]}, "ppo", tiny.tokenizer(template="{{ raise_exception('no') }}"))
