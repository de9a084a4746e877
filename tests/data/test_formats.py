"""TRL's formats, row by row: what each phase takes."""

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
        ({"text": "a b", "prompt": "a"}, "sft", "", ("a b",)),  # the whole, beside what it begins with
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
def test_a_tool_call_is_a_turn_whatever_its_content(content, arguments):
    """OpenAI's form has content null, and arguments as JSON."""
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
def test_what_is_no_message_and_no_call_is_named(row):
    for phase in ("sft", "reward"):
        if phase == "sft" or "chosen" in row:
            with pytest.raises(DataError, match=r"x.jsonl, line 7: "):
                row_texts(Row(row, "x.jsonl", 7), phase, DataConfig(), tiny.tokenizer(template=AGENT))


@pytest.mark.parametrize("call", [{"function": None, "name": "time"}, {"name": "time"}, {"function": {"name": 7}}])
def test_a_call_without_a_function_or_name_is_left_to_the_template(call):
    bare = AGENT.replace("call.function.name ~ ' ' ~ call.function.arguments.zone", "(call.name or call.function.name)")
    row = {"messages": [user("a"), assistant("b") | {"tool_calls": [call]}]}
    read = texts(row, "sft", tiny.tokenizer(template=bare))
    assert read.completions == (f"b <call> {call.get('name', 7)} <eos> ",)


def test_tool_calls_and_nones_of_parquet_files(tmp_path):
    """Arrow gives each message the keys of all."""
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
def test_messages_beside_a_prompt_win(phase, prompt):
    """ultrachat_200k and no_robots hold the first question as `prompt`."""
    turns = [user("a"), assistant("b"), user("c"), assistant("d")]
    read = texts({"prompt": prompt, "prompt_id": "7", "messages": turns}, phase)
    assert read.prompt == "<user> a <eos> <assistant> b <eos> <user> c <eos> <assistant> "
    assert read.completions == (("d <eos> ",) if phase == "sft" else ())
    assert read.columns == {"prompt_id": "7"}
    assert read.chat == turns[:-1]
    row = Row({"prompt": prompt, "messages": turns}, "x.jsonl", 1)
    assert own_prompt(row, DataConfig()) == own_prompt(Row({"messages": turns}, "x.jsonl", 1), DataConfig())


def test_a_pair_beside_messages_is_a_pair():
    """ultrafeedback_binarized has a prompt, a pair of whole conversations, and the chosen one as messages."""
    row = {"prompt": "a", "messages": WHOLE["chosen"]} | WHOLE
    for phase, completions in (("sft", ("b <eos> ",)), ("reward", ("b <eos> ", "c <eos> ")), ("ppo", ())):
        read = texts(row, phase)
        assert (read.prompt, read.completions) == (ASKED, completions)


@pytest.mark.parametrize(
    ("completion", "expected"),
    [([assistant("d")], "d <eos> "), ("d", "d <eos> "), ([assistant("d"), user("e"), assistant("f")], None)],
)
def test_a_prompt_that_ends_with_the_assistant_is_continued(completion, expected):
    asked = [user("a"), assistant("b c ")]
    assert texts({"prompt": asked}, "ppo").prompt == "<user> a <eos> <assistant> b c "
    assert texts({"prompt": asked}, "ppo").continued
    read = texts({"prompt": asked, "completion": completion}, "sft")
    expected = expected or "d <eos> <user> e <eos> <assistant> f <eos> "
    assert (read.prompt, read.completions) == ("<user> a <eos> <assistant> b c ", (expected,))
    read = texts({"prompt": asked, "chosen": "d", "rejected": "e"}, "reward")
    assert (read.prompt, read.completions) == ("<user> a <eos> <assistant> b c ", ("d <eos> ", "e <eos> "))


def test_two_turns_of_the_assistant_in_a_row_are_two():
    """In one conversation; only a prompt of its own is continued."""
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
def test_messages_beside_answers_are_their_prompt(column, answer):
    """LLaMA-Factory's rankings: a message alone is an answer too."""
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
def test_messages_beside_whole_conversations_are_one_of_them(begin):
    """As in ultrafeedback: `messages` is `chosen` again."""
    whole = {"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]}
    read = texts({"messages": whole["chosen"]} | whole | begin, "reward")
    assert (read.prompt, read.completions) == (ASKED, ("b <eos> ", "c <eos> "))


def test_a_prompt_beside_answers_counts_before_messages():
    answers = {"chosen": [assistant("b")], "rejected": [assistant("c")]}
    for prompt in ("a", [user("a")]):
        read = texts({"messages": [user("x"), assistant("y")], "prompt": prompt} | answers, "reward")
        assert (read.prompt, read.completions) == (ASKED, ("b <eos> ", "c <eos> "))


def test_the_system_s_turn_of_share_gpt_rows():
    row = {"system": "s", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    assert texts(row, "sft").prompt == "<system> s " + "<eos> " + ASKED
    assert texts({"system": "s", "prompt": [user("a")]}, "ppo").prompt == ASKED  # another data set's column


@pytest.mark.parametrize(("asks", "says"), [("human", "gpt"), ("user", "model"), ("Human", "bot")])
def test_roles_of_other_names(asks, says):
    turns = [{"role": asks, "content": "a"}, {"role": says, "content": "b"}]
    read = texts({"messages": turns}, "sft")
    assert (read.prompt, read.completions) == (ASKED, ("b <eos> ",))
    read = texts({"chosen": turns, "rejected": [turns[0], {"role": says, "content": "c"}]}, "reward")
    assert (read.prompt, read.completions) == (ASKED, ("b <eos> ", "c <eos> "))


def test_an_answer_is_the_assistant_s():
    with pytest.raises(DataError, match="line 7: an answer begins with the user's message"):
        texts({"prompt": [user("a")], "completion": [user("b")]}, "sft")
    unlike = {"chosen": [user("a"), assistant("b")], "rejected": [user("c"), assistant("d")]}
    read = texts(unlike, "reward")  # nothing in common: each is a text of its own
    assert (read.prompt, read.completions) == ("", (ASKED + "b <eos> ", "<user> c <eos> <assistant> d <eos> "))
    system = {"role": "system", "content": "s"}
    whole = {name: [user("a"), assistant(name[0])] for name in ("chosen", "rejected")}
    read = texts({"prompt": [system, user("a")]} | whole, "reward")  # whole conversations, without the system's turn
    assert (read.prompt, read.completions) == (f"<system> s <eos> {ASKED}", ("c <eos> ", "r <eos> "))


@pytest.mark.parametrize("content", [None, "", "b"])
def test_a_call_that_the_template_does_not_write_is_noticed(content):
    """Else an immediate end of the turn would be learned."""
    turn = {"role": "assistant", "content": content, "tool_calls": [CALL]}
    assert texts({"messages": [user("a"), turn]}, "sft").unwritten == "time"
    assert texts({"messages": [user("a"), turn]}, "sft", tiny.tokenizer(template=AGENT)).unwritten == ""
    for template, unwritten in ((tiny.TEMPLATE, True), (AGENT, False)):
        row = {"prompt": [user("a")], "tools": TOOLS}
        assert texts(row, "ppo", tiny.tokenizer(template=template)).tools_unwritten == unwritten
        told = {"prompt": [user("a"), turn, {"role": "tool", "content": "c"}]}
        assert texts(told, "ppo", tiny.tokenizer(template=template)).tools_unwritten == unwritten
    listed = tiny.tokenizer(template=AGENT.replace("m.tool_calls or []", "[]"))  # the tools, and not what is called
    read = texts({"messages": [user("what time a"), turn], "tools": TOOLS}, "sft", listed)
    assert read.prompt == "<tools> time <user> what time a <eos> <assistant> "
    assert read.unwritten == "time"


def test_a_template_that_wants_a_call_or_a_text_looks_for_calls():
    needed = "{% if not (m.content or m.tool_calls) %}{{ raise_exception('empty') }}{% endif %}"
    strict = tiny.tokenizer(template=tiny.TEMPLATE.replace("{{ '<' ", needed + "{{ '<' "))
    called = [user("a"), {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "c"}]
    assert not texts({"prompt": called}, "ppo", strict).tools_unwritten


def test_an_answer_of_several_messages():
    """The tool may say nothing, and what it says a template may write as it likes."""
    answer = [{"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": ""}, assistant("c")]
    read = texts({"prompt": [user("a")], "completion": answer}, "sft", tiny.tokenizer(template=AGENT))
    assert (read.prompt, read.unwritten) == (ASKED, "")
    assert read.completions == (" <call> time z <eos> <tool>  <eos> <assistant> c <eos> ",)
    answer[1]["content"] = "b c"
    upper = AGENT.replace("m.content", "(m.content | upper if m.role == 'tool' else m.content)")
    read = texts({"prompt": [user("a")], "completion": answer}, "sft", tiny.tokenizer(template=upper))
    assert read.completions == (" <call> time z <eos> <tool> B C <eos> <assistant> c <eos> ",)
    assert read.unwritten == ""


def test_answers_that_begin_with_the_prompt_s_messages_are_whole_conversations():
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
def test_what_a_template_leaves_out_of_an_answer_is_noticed(template, turn, unwritten):
    template = tiny.TEMPLATE.replace("m.content", f"({template} if m.role == 'assistant' else m.content)")
    read = texts({"messages": [user("a"), turn]}, "sft", tiny.tokenizer(template=template))
    assert read.unwritten == unwritten
    history = texts(
        {"messages": [user("a"), turn, user("c"), assistant("d")]}, "sft", tiny.tokenizer(template=template)
    )
    assert history.unwritten == "" or "reasoning_content ~" in template  # only what is learned must be there


@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_share_gpt_rows_are_chats(column):
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
def test_messages_may_be_json_as_csv_files_hold_them(column):
    read = texts({column: json.dumps([user("a"), assistant("b")])}, "sft")
    assert (read.prompt, read.completions) == (ASKED, ("b <eos> ",))
    for wrong in ("[", "a b", '{"a"', "7"):
        with pytest.raises(DataError, match="line 7: messages must be a list with at least one chat message"):
            texts({column: wrong}, "sft", messages_column=column)


def test_texts_in_parts_are_joined_and_images_are_named():
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]
    assert texts({"messages": [user(parts), assistant("c")]}, "sft").prompt == "<user> a b <eos> <assistant> "
    with pytest.raises(DataError, match="line 7: a message has a part of type 'image'; only text parts are supported"):
        texts({"messages": [user([{"type": "image"}]), assistant("c")]}, "sft")


def test_options_for_the_template_come_with_the_row():
    template = "{{ thinking | default('none') ~ ' ' }}" + tiny.TEMPLATE
    for value, begin in ((None, "none "), ({"thinking": "a"}, "a "), ('{"thinking": "a"}', "a ")):
        row = {"prompt": [user("b")], "chat_template_kwargs": value}
        assert texts(row, "ppo", tiny.tokenizer(template=template)).prompt.startswith(begin)
    with pytest.raises(DataError, match=r"line 7: chat_template_kwargs is .*; it must be an object"):
        texts({"prompt": [user("b")], "chat_template_kwargs": {"tokenize": True}}, "ppo")
    with pytest.raises(DataError, match="it must be an object of the template"):  # a row brings no template of its own
        texts({"prompt": [user("b")], "chat_template_kwargs": {"chat_template": "{{ 'x' }}"}}, "ppo")


def test_plain_texts_are_chats_where_that_is_wanted():
    read = texts(PAIR, "reward", as_chat=True)
    assert (read.prompt, read.completions, read.templated) == (ASKED, ("b <eos> ", "c <eos> "), True)
    assert read.chat == [user("a")]
    assert texts({"prompt": "a", "completion": "b"}, "sft", as_chat=True).completions == ("b <eos> ",)
    assert texts({"prompt": "a"}, "ppo", as_chat=True).prompt == ASKED
    assert not texts({"text": "a b"}, "sft", as_chat=True).templated  # nobody says it


HH = "\n\nHuman: May I?\n\nAssistant: Yes.\n\nHuman: And now?\n\nAssistant:"


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        (HH + " I think so.", HH + " I think not.", HH),
        (HH + " No.", HH + " No!", HH),
        (HH + " No.\n\nHuman: b\n\nAssistant: c", HH + " Yes.", HH),  # one goes on
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
        # An answer may say "Answer:" itself.
        (HH + " It is so.\nAnswer: 4", HH + " It is so.\nAnswer: 5", HH),
        ("Ask an assistant: it is good", "Ask an assistant: it is grim", "Ask an assistant: it is"),
        ("a film so good", "a film so grim", "a film so"),
        ("it ended 2:4", "it ended 2:5", "it ended"),
        ("good", "grim", ""),
        ("问:天空什么颜色?答:蓝色", "问:天空什么颜色?答:绿色", "问:天空什么颜色?答:"),
        ("空は何色ですか？青です", "空は何色ですか？緑です", "空は何色ですか？"),
        ("ฟ้าสีอะไรฟ้า", "ฟ้าสีอะไรเขียว", "ฟ้าสีอะไร"),
        ("Q:2+2?A:4", "Q:2+2?A:5", "Q:2+2?A:"),
        ("하늘은 파란색", "하늘은 파랑", "하늘은"),  # Korean has spaces
        ("蓝", "蓝色", ""),  # an answer must be left of each
        ("same", "same", ""),
    ],
)
def test_where_the_prompt_of_two_texts_ends(chosen, rejected, prompt):
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
def test_an_undesired_completion_is_not_learned(label, learned):
    """TRL's unpaired preferences (KTO)."""
    row = {"prompt": "a", "completion": "b", "label": label}
    assert (texts(row, "sft").left_out == "") == learned
    assert texts(row, "sft", label_column="none").left_out == ""
    assert (texts(row, "ppo").left_out, texts(row, "ppo").prompt) == ("", "a")
    assert texts(row, "ppo").columns == {"label": label}  # reward functions may want it
    assert texts({"text": "a", "label": label}, "sft").left_out == ""  # of a classifier


def test_what_a_template_ends_a_conversation_with_is_no_part_of_the_prompt():
    template = tiny.TEMPLATE.replace("{% endif %}", "{% else %}{{ '<bos>' }}{% endif %}")  # Phi-3's ends so
    read = texts({"messages": [user("a"), assistant("b")]}, "sft", tiny.tokenizer(template=template))
    assert (read.prompt, read.completions) == ("<user> a <eos> <assistant> ", ("b <eos> <bos>",))


def test_a_template_that_changes_the_prompt_once_there_is_an_answer():
    template = "{% for m in messages %}{{ m.content if loop.last or messages|length == 1 else 'x' }} {% endfor %}"
    with pytest.raises(DataError, match="the chat template renders the prompt differently"):
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
        ({"prompt": 3, "completion": "b"}, "sft", "is of type int; it must be a text or a list of chat messages"),
        ({"messages": [{"role": "user"}]}, "sft", "is not a chat message"),
        ({"messages": [user("a")]}, "sft", "the last message is the user's"),
        ({"messages": []}, "sft", "at least one chat message"),
        (PAIR | {"margin": "much"}, "reward", "'margin' is 'much'; it must be a number"),
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
