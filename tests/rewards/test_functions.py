"""Reward functions: their arguments, the weighted sum of their scores, and the errors for invalid results."""

import asyncio
import threading
import time

import numpy as np
import pytest

from jax_rlhf import RewardError, RewardFunction
from jax_rlhf.rewards import Failures, OnFailure, score_texts

PROMPTS, RESPONSES = ["one", "two", "three"], ["a", "bb", "<odd>\n"]


def length(prompts, responses, **columns):
    return [0.5 * len(response) for response in responses]


def matches(prompts, responses, answer, **columns):
    return np.array([float(response == given) for response, given in zip(responses, answer, strict=True)])


def test_functions_get_texts_and_columns_and_are_summed_with_weights():
    functions = [RewardFunction(length), RewardFunction(matches, weight=-2.0)]
    scores = score_texts(functions, PROMPTS, RESPONSES, {"answer": ["a", "b", "c"], "id": [1, 2, 3]})
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, [0.5 - 2.0, 1.0, 3.0])


def returning(value):
    def named(prompts, responses, **columns):
        return value

    return named


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([0.1, 0.2], r"'named' returned shape \[2\] for 3 responses.*'a'"),
        (np.zeros((3, 1)), r"returned shape \[3, 1\]"),
        (0.5, r"returned shape \[\]"),
        ([0.1, float("nan"), 0.3], "returned nan for 1 of 3 responses, first for row 1: prompt 'two', response 'bb'"),
        ([0.1, 0.2, float("inf")], r"returned inf .* row 2: prompt 'three', response '<odd>\\n'"),
        ([0.1, None, 0.2], "named returned None for 1 of 3 responses, .* first for row 1: prompt 'two', response 'bb'"),
        ([None, float("nan"), 0.2], "returned nan for 1 of 3 responses, first for row 1"),
        (["good", "bad", "bad"], "'named' failed, or did not return numbers: ValueError"),
        (None, r"returned shape \[\]"),
        ([0.1, [0.2], 0.3], "did not return numbers"),
    ],
)
def test_invalid_rewards_raise_an_error_that_says_what_was_returned(value, message):
    with pytest.raises(RewardError, match=message):
        score_texts([RewardFunction(returning(value))], PROMPTS, RESPONSES, {})


def test_errors_use_the_functions_name_and_show_its_call():
    with pytest.raises(RewardError, match=r"'exact' failed.*answer.*called as exact\(prompts, responses, id=…\)"):
        score_texts([RewardFunction(matches, name="exact")], PROMPTS, RESPONSES, {"id": [1, 2, 3]})
    unnamed = RewardFunction(type("Judge", (), {"__call__": lambda self, p, r, **c: [np.nan] * 3})())
    with pytest.raises(RewardError, match="'Judge' returned nan for 3 of 3"):
        unnamed(PROMPTS, RESPONSES, {})


# ---- how functions are called --------------------------------------------------------------------------------------

CHATS = [[{"role": "user", "content": "one"}], None, [{"role": "user", "content": "three"}]]
IDS = [[7], [8, 8], [9, 1]]


def called(function, columns=None, **more):
    """The arguments that a function was called with."""
    seen = {}

    def remember(*positional, **keywords):
        seen.update(keywords, positional=positional)
        return [1.0] * 3

    function.remember = remember
    score_texts([RewardFunction(function)], PROMPTS, RESPONSES, columns or {}, completion_ids=IDS, **more)
    return seen


def trl(prompts, completions, completion_ids, answer, **kwargs):
    return trl.remember(
        prompts=prompts, completions=completions, completion_ids=completion_ids, answer=answer, **kwargs
    )


def trl_short(completions, **kwargs):
    return trl_short.remember(completions=completions, **kwargs)


def trl_all(**kwargs):
    return trl_all.remember(**kwargs)


def trl_bare(completions):
    return trl_bare.remember(completions=completions)


def plain(prompts, responses, **columns):
    return plain.remember(prompts, responses, **columns)


def bare(p, r):
    return bare.remember(p, r)


def with_ids(prompts, responses, completion_ids, messages, tag=None):
    return with_ids.remember(prompts, responses, completion_ids=completion_ids, messages=messages, tag=tag)


def with_special(prompts, responses, responses_with_special_tokens, prompts_with_special_tokens):
    seen = {"own": responses_with_special_tokens, "before": prompts_with_special_tokens}
    return with_special.remember(prompts, responses, **seen)


def trl_with_special(completions, responses_with_special_tokens, **kwargs):
    return trl_with_special.remember(completions=completions, own=responses_with_special_tokens)


def trl_ids(completion_ids, **kwargs):
    return trl_ids.remember(completion_ids=completion_ids, **kwargs)


def with_a_reference(prompts, responses, completions):
    return with_a_reference.remember(prompts, responses, completions=completions)


ANSWER = {"answer": ["x", "y", "z"]}


@pytest.mark.parametrize("function", [trl, trl_short, trl_all, trl_bare, trl_ids])
def test_functions_in_trls_form_are_called_by_keyword(function):
    seen = called(function, ANSWER)
    whole = {"prompts": PROMPTS, "completions": RESPONSES, "completion_ids": IDS} | ANSWER | {"positional": ()}
    assert seen == (whole if function is not trl_bare else {"completions": RESPONSES, "positional": ()})


def test_functions_of_prompts_and_responses_are_called_by_position():
    assert called(plain, ANSWER) == {"positional": (PROMPTS, RESPONSES)} | ANSWER
    assert called(bare, ANSWER) == {"positional": (PROMPTS, RESPONSES)}
    seen = called(with_ids, {"tag": [1, 2, 3], "other": [4, 5, 6]}, chats=CHATS)
    assert seen == {"positional": (PROMPTS, RESPONSES), "completion_ids": IDS, "messages": CHATS, "tag": [1, 2, 3]}
    seen = called(with_a_reference, {"completions": [4, 5, 6]})  # a column of the data set
    assert seen == {"positional": (PROMPTS, RESPONSES), "completions": [4, 5, 6]}
    special = ["<bos> p"] * 3, ["r <eos>"] * 3
    seen = called(with_special, {"answer": [1, 2, 3]}, with_special_tokens=special)
    assert seen == {"positional": (PROMPTS, RESPONSES), "before": special[0], "own": special[1]}
    seen = called(trl_with_special, {}, with_special_tokens=special)
    assert seen == {"positional": (), "completions": RESPONSES, "own": special[1]}
    wrapped = lambda *positional, **keywords: plain(*positional, **keywords)  # noqa: E731
    assert score_texts([RewardFunction(wrapped)], PROMPTS, RESPONSES, ANSWER).tolist() == [1.0] * 3


@pytest.mark.parametrize("name", ["prompts", "responses", "completions", "completion_ids", "p"])
@pytest.mark.parametrize("function", [trl, trl_all, plain, bare])
def test_a_column_with_a_reserved_name_breaks_neither_form(function, name):
    seen = called(function, {name: [7, 8, 9]} | ANSWER)
    if function in (plain, bare):
        assert seen["positional"] == (PROMPTS, RESPONSES)
    else:
        assert (seen["prompts"], seen["completions"], seen["completion_ids"]) == (PROMPTS, RESPONSES, IDS)
    assert function is bare or seen["answer"] == ANSWER["answer"]


def test_chats_are_passed_as_messages_in_trls_form():
    """If the response continues a turn of the assistant, the completion is the whole turn."""
    chats = [*CHATS[:2], [*CHATS[2], {"role": "assistant", "content": "It is "}]]
    seen = called(trl, ANSWER, chats=chats)  # not continued: two assistant turns in a row
    assert seen["prompts"] == [CHATS[0], "two", chats[2]]
    assert seen["completions"][2] == [{"role": "assistant", "content": "<odd>\n"}]
    seen = called(trl, ANSWER, chats=chats, continued=[False, False, True])
    assert seen["prompts"] == [CHATS[0], "two", CHATS[2]]
    assert seen["completions"] == [
        [{"role": "assistant", "content": "a"}],
        "bb",
        [{"role": "assistant", "content": "It is <odd>\n"}],
    ]
    assert len(chats[2]) == 2


def destructive(prompts, responses, messages, answer):
    scores = [float(len(response)) for response in responses]
    prompts.clear()
    responses.sort(reverse=True)
    responses.pop()
    answer[0].clear()
    messages[0].clear()
    return scores


def test_functions_get_copies_of_their_arguments():
    """A function that sorts or pops its lists changes neither the other functions' arguments nor the data set."""
    columns, chats = {"answer": [["x"], ["y"], ["z"]]}, [list(CHATS[0]), None, None]
    prompts, responses = list(PROMPTS), list(RESPONSES)
    functions = [RewardFunction(destructive), RewardFunction(destructive), RewardFunction(length)]
    functions += [RewardFunction(lambda completion_ids, **kwargs: [ids.pop() * 0.0 for ids in completion_ids])] * 2
    ids = [list(row) for row in IDS]
    scores = score_texts(functions, prompts, responses, columns, chats=chats, completion_ids=ids)
    np.testing.assert_allclose(scores, [2.5 * len(response) for response in RESPONSES])
    assert (prompts, responses, columns["answer"][0], chats[0]) == (PROMPTS, RESPONSES, ["x"], CHATS[0])
    assert ids == IDS


def test_the_number_of_scores_must_equal_the_number_of_responses():
    def popping(prompts, responses):
        responses.pop()
        return [1.0] * len(responses)

    with pytest.raises(RewardError, match=r"'popping' returned shape \[2\] for 3 responses"):
        score_texts([RewardFunction(popping)], PROMPTS, RESPONSES, {})


def test_none_means_that_a_function_does_not_score_a_response():
    """As in TRL, functions for different tasks can share a data set."""
    functions = [RewardFunction(returning([1.0, None, None]), weight=2.0), RewardFunction(returning([None, 3.0, None]))]
    np.testing.assert_allclose(score_texts(functions, PROMPTS, RESPONSES, {}, unscored=0.0), [2.0, 3.0, 0.0])
    verdicts = score_texts(functions, PROMPTS, RESPONSES, {}, unscored=float("nan"))
    np.testing.assert_allclose(verdicts, [2.0, 3.0, np.nan])
    with pytest.raises(RewardError, match=r"named, named returned None for 1 of 3 .* row 2: prompt 'three'"):
        score_texts(functions, PROMPTS, RESPONSES, {})
    failures = Failures()
    on_failure = OnFailure(then="penalize", score=-7.0)
    np.testing.assert_allclose(score_texts(functions, PROMPTS, RESPONSES, {}, on_failure, failures), [2.0, 3.0, -7.0])
    assert failures == Failures(penalized=1)
    np.testing.assert_allclose(functions[0](PROMPTS, RESPONSES, {}), [2.0, np.nan, np.nan])


@pytest.mark.parametrize("timeout", [None, 5.0])
def test_async_functions_are_awaited(timeout):
    async def judge(completions, **kwargs):
        await asyncio.sleep(0.01)
        return [float(len(completion)) for completion in completions]

    functions = [RewardFunction(judge, timeout=timeout)]
    np.testing.assert_allclose(score_texts(functions, PROMPTS, RESPONSES, {}), [1, 2, 6])

    async def notebook():
        return score_texts(functions, PROMPTS, RESPONSES, {})

    np.testing.assert_allclose(asyncio.run(notebook()), [1, 2, 6])  # within a running event loop


def test_the_error_shows_how_the_function_was_called():
    with pytest.raises(RewardError, match=r"called as trl\(prompts=…, completions=…, completion_ids=…, id=…\)"):
        score_texts([RewardFunction(trl)], PROMPTS, RESPONSES, {"id": [1, 2, 3]})


class Flaky:
    """A reward function whose first calls return or raise the given faults."""

    def __init__(self, *failures):
        self.failures = list(failures)

    def __call__(self, prompts, responses, **columns):
        return self.failures.pop(0)() if self.failures else length(prompts, responses)


def raising(error):
    def fail():
        raise error

    return fail


def scored(function, *, timeout=0.3, **options):
    failures = Failures()
    functions = [RewardFunction(function, timeout=timeout, weight=2.0), RewardFunction(length)]
    return score_texts(functions, PROMPTS, RESPONSES, {}, OnFailure(**options), failures), failures


FAULTS = {
    "exception": raising(OSError("the judge is not at home")),
    "exit": raising(SystemExit(3)),
    "time-out": lambda: time.sleep(30),
    "nan": lambda: [0.5, float("nan"), 0.5],
    "inf": lambda: [0.5, float("inf"), 0.5],
    "count": lambda: [1.0],
    "no numbers": lambda: "good",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_failed_call_is_retried(fault, caplog):
    scores, failures = scored(Flaky(FAULTS[fault], FAULTS[fault]), retries=2)
    np.testing.assert_allclose(scores, 3 * np.array([0.5, 1.0, 3.0]))  # weights 2 and 1
    assert failures == Failures(failed_calls=2, timeouts=2 if fault == "time-out" else 0, penalized=0)
    assert "Attempt 1 of 3" in caplog.text
    assert "Attempt 2 of 3" in caplog.text


@pytest.mark.parametrize("fault", FAULTS)
def test_repeated_failures_raise_or_give_the_penalty_score(fault, caplog):
    with pytest.raises(RewardError):
        scored(Flaky(*[FAULTS[fault]] * 3), retries=2)
    scores, failures = scored(Flaky(*[FAULTS[fault]] * 3), retries=2, then="penalize", score=-7.0)
    lost = [1] if fault in ("nan", "inf") else [0, 1, 2]  # the others have a score
    np.testing.assert_array_equal(np.flatnonzero(scores == -7.0), lost)
    if fault in ("nan", "inf"):
        np.testing.assert_allclose(scores[[0, 2]], [2 * 0.5 + 0.5, 2 * 0.5 + 3.0])
    assert failures.penalized == len(lost)
    assert failures.failed_calls == 3
    assert "without a score get -7" in caplog.text
    if fault in ("nan", "inf", "count"):
        assert repr(RESPONSES[0 if fault == "count" else 1]) in caplog.text


def test_the_error_gives_the_file_and_line_of_an_exception():
    with pytest.raises(RewardError, match=r"OSError: the judge is not at home \(.*test_functions.py, line \d+\)"):
        scored(Flaky(FAULTS["exception"]))


def test_a_function_that_hangs_does_not_block_the_run():
    """Calls that hang do not accumulate threads without limit."""
    release = threading.Event()

    def hangs(prompts, responses, **columns):
        release.wait()

    started = time.time()
    scores, failures = scored(hangs, timeout=0.01, retries=40, then="penalize")
    assert time.time() - started < 10
    assert (failures.failed_calls, failures.timeouts) == (41, 16)
    assert threading.active_count() < 40
    assert np.all(scores == -1)
    release.set()
