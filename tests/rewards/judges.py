"""Reward functions for tests of isolation. Many of them harm their own process."""

import asyncio
import contextlib
import ctypes
import datetime
import decimal
import os
import signal
import sys
import time


def lengths(prompts, responses, bonus=None):
    del prompts
    return [float(len(response)) + (bonus[row] if bonus else 0) for row, response in enumerate(responses)]


def trl(completions, when, data, price, **columns):
    assert isinstance(when[0], datetime.datetime)
    assert data[0] == b"\xff"
    assert price[0] == decimal.Decimal("1.5")
    assert columns["nested"][0] == {"a": [1, {"b": None}]}
    return [1.0 if completion[0]["role"] == "assistant" else 0.0 for completion in completions]


async def slowly(prompts, responses):
    return [2.0 for _ in responses]


def with_special(prompts, responses, responses_with_special_tokens):
    return [float(text.endswith("<eos>")) for text in responses_with_special_tokens]


def some(prompts, responses):
    return [None, 1, True]


def exits(prompts, responses):
    sys.exit(0)


def exits_at_once(prompts, responses):
    os._exit(0)


def crashes(prompts, responses):
    ctypes.string_at(0)


def kills_itself(prompts, responses):
    os.kill(os.getpid(), signal.SIGKILL)


def forks(prompts, responses):
    """The forked child returns too, with other scores."""
    child = os.fork() == 0
    return [9.0 if child else 3.0 for _ in responses]


def leaves_a_child(prompts, responses):
    """Exits while a child process keeps the inherited files open."""
    if os.fork() == 0:
        time.sleep(60)
        os._exit(0)
    os._exit(7)


def leaves_a_daemon(prompts, responses):
    """Starts a daemon in another session. The score is the daemon's process id."""
    there, back = os.pipe()
    if os.fork() == 0:
        os.setsid()
        daemon = os.fork()
        if daemon == 0:
            time.sleep(600)
        os.write(back, str(daemon).encode())
        os._exit(0)
    return [float(os.read(there, 100))] * len(responses)


def says_much(prompts, responses):
    return [[]] * 1_000_000


def waits(prompts, responses):
    time.sleep(0.05)
    return [float(response) for response in responses]


def is_cancelled(prompts, responses):
    raise asyncio.CancelledError


class WithoutWords(Exception):
    def __str__(self):
        raise KeyError


def has_no_words(prompts, responses):
    raise WithoutWords


def prints(prompts, responses):
    print("\x1b[31mred", flush=True)
    os.write(1, b"{}" * 50_000 + b"\n")
    os.system("echo from a shell")
    return [4.0 for _ in responses]


def closes(prompts, responses):
    os.closerange(0, 1000)
    return [5.0 for _ in responses]


def hangs(prompts, responses):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    while True:
        time.sleep(60)


def takes_memory(prompts, responses):
    return [float(len(bytearray(4_000_000_000)))] * len(responses)


def raises(prompts, responses):
    raise KeyError("\x1b[31m")


def wrong(prompts, responses):
    return {"a": 1}


def texts(prompts, responses):
    return ["much"] * len(responses)


def not_numbers(prompts, responses):
    return [float("nan")] * len(responses)


def writes_into_its_socket(prompts, responses):
    for number in range(3, 20):
        with contextlib.suppress(OSError):
            os.write(number, b"\x03\x00\x00\x00\x00\x00\x00\x00xyz")
    return [1.0] * len(responses)


CALLS = []


def counts(prompts, responses):
    CALLS.append(1)
    return [float(len(CALLS))] * len(responses)
