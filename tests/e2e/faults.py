"""What providers do wrong, byte for byte, and what comes of it: behind the proxy, and behind a guarded client."""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass

from tests.e2e.rogue import EVENTS, LAST, answer, chunk, head
from tests.oracle import OracleTable, Terms

MESSAGES = [{"role": "user", "content": "Say hello"}]
PROMPT = 3 + 3 + 3
"""Nine bytes of text, the framing of a message and of the prompt."""
RESERVED = PROMPT + 50
USED = 30
CAPACITY = 10**6
"""Of the user's and of the team's bucket, which hold that much and do not refill."""

CUT = "the connection breaks off"


def usage(prompt=10, completion=20, total=30):
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": total}


def completion(usage):
    return json.dumps(
        {"choices": [{"message": {"content": "Hello"}, "finish_reason": "stop"}], "usage": usage}
    ).encode()


def event(content=None, usage=None, reason=None):
    choices = [{"index": 0, "delta": {"content": content} if content else {}, "finish_reason": reason}]
    chunk = {"choices": [] if usage else choices, "usage": usage}
    return b"data: %s\n\n" % json.dumps(chunk).encode()


DONE = b"data: [DONE]\n\n"
WHOLE = completion(usage())
TWO_WORDS = event("one") + event(" two")


def streamed(*events, cut=False):
    """Return an answer that streams events, and ends as it should unless it is cut."""
    return EVENTS + b"".join(map(chunk, events)) + (b"" if cut else LAST)


@dataclass
class Fault:
    """What the provider sends, and what comes of it.

    Attributes:
        name: What is wrong.
        sent: The bytes that the provider sends before it hangs up.
        gets: The status that the caller is answered, or ``CUT``.
        charged: What the user's and the team's bucket pay.
        code: The code of our error, if it is ours.
        stream: Whether a stream was asked for.
    """

    name: str
    sent: bytes
    gets: int | str
    charged: int
    code: str | None = None
    stream: bool = False


def stream(name, sent, gets, charged):
    return Fault(name, sent, gets, charged, stream=True)


BROKEN = "upstream_unreachable"
ODD_USAGES = {
    "null": None,
    "negative": usage(prompt=-1),
    "10^18": usage(total=10**18),
    "text": usage(total="30"),
    "a fraction": usage(total=30.5),
    "true": usage(total=True),
    "a list": [1],
    "empty": {},
}
FAULTS = [
    Fault("hangs up without a word", b"", 502, RESERVED, BROKEN),
    Fault("garbage", b"\x00\xffgarbage\r\n\r\n", 502, RESERVED, BROKEN),
    Fault("status 799", head("content-length: 0", status="799 Odd"), 502, RESERVED, BROKEN),
    Fault("status 101", head(status="101 Switching Protocols"), 502, RESERVED, BROKEN),
    Fault("cut in the head", b"HTTP/1.1 200 OK\r\ncontent-ty", 502, RESERVED, BROKEN),
    Fault("two content-lengths", head("content-length: 5", "content-length: 6") + b"12345", 502, RESERVED, BROKEN),
    *(
        Fault(
            f"status {status}",
            answer(b'{"error":{"message":"no"}}', "retry-after: 7", status=f"{status} No"),
            status,
            0,
        )
        for status in (302, 400, 401, 404, 429, 500, 503)
    ),
    Fault("JSON that is cut", answer(WHOLE[:-20]), 200, RESERVED),
    Fault("no JSON", answer(b"<html>502 Bad Gateway</html>"), 200, RESERVED),
    Fault("an empty body", answer(b""), 200, RESERVED),
    Fault("a content-length that is too large", answer(WHOLE, length=len(WHOLE) + 1), CUT, USED),
    Fault("a content-length that is too small", answer(WHOLE, length=len(WHOLE) - 20), 200, RESERVED),
    Fault("no content-length", head("content-type: application/json") + WHOLE, 200, USED),
    Fault("chunks that are cut", head("transfer-encoding: chunked") + chunk(WHOLE[:50]), CUT, RESERVED),
    Fault("chunks that are garbage", head("transfer-encoding: chunked") + b"zz\r\nhello", CUT, RESERVED),
    *(Fault(f"usage: {name}", answer(completion(told)), 200, RESERVED) for name, told in ODD_USAGES.items()),
    Fault("usage: no total", answer(completion({"prompt_tokens": 10, "completion_tokens": 20})), 200, USED),
    Fault("gzip all the same", answer(gzip.compress(WHOLE), "content-encoding: gzip"), 200, USED),
    Fault("gzip that is damaged", answer(b"\x1f\x8bdamaged!", "content-encoding: gzip"), CUT, RESERVED),
    Fault("gzip that is cut", answer(gzip.compress(WHOLE)[:-40], "content-encoding: gzip"), CUT, RESERVED),
    Fault("gzip that blows up", answer(gzip.compress(bytes(2**26)), "content-encoding: gzip"), CUT, RESERVED),
    Fault("another encoding", answer(b"\x0b\x02\x80{}\x03", "content-encoding: br"), 200, RESERVED),
    stream("a stream cut before any output", streamed(cut=True), CUT, RESERVED),
    stream("a stream cut after output", streamed(TWO_WORDS, cut=True), CUT, PROMPT + 2),
    stream("a stream cut within an event", streamed(TWO_WORDS, b'data: {"choi', cut=True), CUT, PROMPT + 2),
    stream("a stream cut at its finish", streamed(TWO_WORDS, event(reason="stop"), cut=True), CUT, PROMPT + 2),
    stream(
        "a stream cut after its usage",
        streamed(TWO_WORDS, event(reason="stop"), event(usage=usage()), cut=True),
        CUT,
        USED,
    ),
    stream("a stream without usage", streamed(TWO_WORDS, DONE), 200, PROMPT + 2),
    stream("a stream without output or usage", streamed(DONE), 200, RESERVED),
    stream(
        "a stream with garbage in between",
        streamed(
            b": comment\n\nnonsense\n\ndata: {not json\n\ndata:\n\n\xff\xfe\n\n",
            TWO_WORDS,
            event(usage=usage()),
            DONE,
        ),
        200,
        USED,
    ),
    stream("an event without end", streamed(b"data: " + b"x" * 2**21), 200, RESERVED),
    *(
        stream(
            f"a stream's usage: {name}", streamed(TWO_WORDS, event(usage=told or "null"), DONE), 200, PROMPT + 2
        )
        for name, told in ODD_USAGES.items()
    ),
    stream(
        "a stream that is gzip",
        answer(
            gzip.compress(TWO_WORDS + event(usage=usage()) + DONE),
            "content-encoding: gzip",
            kind="text/event-stream",
        ),
        200,
        USED,
    ),
    stream("JSON instead of a stream", answer(WHOLE), 200, USED),
]


def levels_after(charged):
    """Return where the oracle has the team's and the user's level, once that much was settled for a call."""
    oracle = OracleTable()
    plan = tuple((key, Terms(CAPACITY, 0, 10 * CAPACITY)) for key in (b"team", b"user"))
    assert oracle.reserve(plan, (RESERVED,) * 2, 0).allowed
    oracle.settle(plan, (charged - RESERVED,) * 2, 0)
    return oracle.peek(plan, 0).levels
