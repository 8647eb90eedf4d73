"""What it costs to read what comes over the wire: a request, an answer, a stream.

Each row is measured twice: as the server reads, and as the careful readers do, which decode everything.
"""

import json

import pytest

from tests import slow_wire
from tokenguard.providers import careful
from tokenguard.providers.openai import EventStream, JsonAnswer, read_chat

pytestmark = pytest.mark.benchmark(group="reading")

SYSTEM = {"role": "system", "content": "You are a helpful assistant."}
SETTINGS = {"model": "gpt-4o-mini", "temperature": 0.7, "max_tokens": 256, "stream": True}
TALK = 'Words, now and then "quoted", and a line\'s end.\n' * 40
SMALL = json.dumps({**SETTINGS, "messages": [SYSTEM, {"role": "user", "content": "word " * 80}]}).encode()
LARGE = json.dumps({**SETTINGS, "messages": [SYSTEM, *[{"role": "user", "content": TALK}] * 48]}).encode()

USAGE = {
    "prompt_tokens": 19,
    "completion_tokens": 29,
    "total_tokens": 48,
    "prompt_tokens_details": {"cached_tokens": 0, "audio_tokens": 0},
    "completion_tokens_details": {"reasoning_tokens": 0, "audio_tokens": 0},
}
HEAD = {"id": "chatcmpl-B9MBs8CjcvOU2jLn4n570S5qMJKcT", "created": 1741569952, "model": "gpt-4o-mini-2024-07-18"}
MESSAGE = {"role": "assistant", "content": "word " * 50, "refusal": None, "annotations": []}
CHOICE = {"index": 0, "logprobs": None, "finish_reason": "stop"}
ANSWER = json.dumps({**HEAD, "choices": [{**CHOICE, "message": MESSAGE}], "usage": USAGE}).encode()


def event(delta, **more):
    """Return a chunk of an answer as an event."""
    chunk = {**HEAD, "choices": [{**CHOICE, "finish_reason": None, "delta": delta}], "usage": None, **more}
    return b"data: " + json.dumps(chunk, separators=(",", ":")).encode() + b"\n\n"


WORDS = [event({"content": " word"}) for _ in range(28)]
EVENTS = [
    event({"role": "assistant", "content": ""}),
    *WORDS,
    event({}, choices=[], usage=USAGE),
    b"data: [DONE]\n\n",
]


def answered(reader, pieces):
    """Return the usage that a reader finds."""
    for piece in pieces:
        reader.feed(piece)
    reader.rest()
    return reader.final_usage(ended=True)


ROWS = {
    "request of 600 bytes": (lambda: read_chat(SMALL), lambda: careful.read_chat(SMALL), 2_000, 1),
    "request of 100 kB": (lambda: read_chat(LARGE), lambda: careful.read_chat(LARGE), 20, 1),
    "answer of 800 bytes": (
        lambda: answered(JsonAnswer(), [ANSWER]),
        lambda: answered(slow_wire.JsonAnswer(), [ANSWER]),
        2_000,
        1,
    ),
    "event of 31 in one piece": (
        lambda: answered(EventStream(swallow_usage=True), [b"".join(EVENTS)]),
        lambda: answered(slow_wire.EventStream(swallow_usage=True), [b"".join(EVENTS)]),
        50,
        31,
    ),
    "event of 31 in 31 pieces": (
        lambda: answered(EventStream(swallow_usage=True), EVENTS),
        lambda: answered(slow_wire.EventStream(swallow_usage=True), EVENTS),
        50,
        31,
    ),
}
"""What is read, as the server does it and carefully; how often in a round, and how much of it each time."""


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("careful_one", [False, True], ids=["quick", "careful"])
def test_reading(benchmark, name, careful_one):
    quick, slow, times, each = ROWS[name]
    read = slow if careful_one else quick
    benchmark.name = f"baseline: {name}, carefully" if careful_one else name
    benchmark.extra_info["calls"] = times * each

    def work():
        for _ in range(times):
            read()

    assert read()
    benchmark(work)
