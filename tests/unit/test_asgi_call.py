"""A chat completion over ASGI is answered alike past Falcon, where it is plain, and through it, where not."""

import asyncio
import json

import pytest

from tokenguard.asgi import create_app
from tokenguard.config import read_config
from tokenguard.errors import UpstreamError

CHAT = "/v1/chat/completions"
USAGE = {"prompt_tokens": 10, "completion_tokens": 20, "total_tokens": 30}
WHOLE = json.dumps({"choices": [{"message": {"content": "Hello"}}], "usage": USAGE}).encode()
EVENTS = [b'data: {"choices":[{"index":0,"delta":{"content":"word"}}],"usage":null}\n\n', b"data: [DONE]\n\n"]
LENGTH = (b"content-length", b"%d" % len(WHOLE))
JSON = (b"content-type", b"application/json")
EVENT_STREAM = (b"content-type", b"text/event-stream")
CUT = UpstreamError("it broke off", sent=True)


class Saying:
    """A provider that says one thing: an ``Upstream`` and its response."""

    def __init__(self, status, headers, *pieces):
        self.status, self.headers, self.pieces = status, list(headers), pieces
        self.closed = 0

    async def open(self, _):
        return self

    async def chunks(self):
        for piece in self.pieces:
            if isinstance(piece, Exception):
                raise piece
            yield piece

    async def close(self):
        self.closed += 1


SAYINGS = {
    "whole": ((200, [JSON, LENGTH], WHOLE), 1),
    "in pieces": ((200, [JSON, LENGTH], WHOLE[:9], WHOLE[9:]), 2),
    "of no length": ((200, [JSON], WHOLE), 2),
    "a stream": ((200, [EVENT_STREAM], *EVENTS), 3),
    "without a type": ((200, [LENGTH], WHOLE), 1),
    "a field twice": ((200, [JSON, (b"x-a", b"1"), (b"x-a", b"2"), LENGTH], WHOLE), 1),
    "an error": ((500, [JSON], b'{"error":{"message":"no"}}'), 2),
    "nothing": ((204, []), 1),
    "cut": ((200, [JSON, LENGTH], WHOLE[:9], CUT), 1),
}
"""What the provider says, and by how many events its body is sent on, past Falcon."""


def answered(path, saying, body=b'{"model":"m","messages":[]}', user=b"alice"):
    """Return the events by which a call is answered, and the provider."""
    provider = Saying(*saying)
    app = create_app(read_config({"CAP_GLOBAL": "1000", "RATE_GLOBAL": "0"}), provider)
    fields = [(b"x-request-id", b"mine"), (b"content-length", b"%d" % len(body))]
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "path": path,
        "query_string": b"",
        "headers": [*fields, (b"x-user-id", user)] if user else fields,
    }
    coming = [
        {"type": "http.request", "body": body[:5], "more_body": True},
        {"type": "http.request", "body": body[5:]},
    ]
    events = []

    async def receive():
        return coming.pop(0)

    async def send(event):
        events.append(event)

    asyncio.run(app(scope, receive, send))
    return events, provider


def seen(events):
    """Return what a caller sees: status, fields, body, and whether that ended."""
    start, *rest = events
    body = b"".join(event.get("body", b"") for event in rest)
    return start["status"], start["headers"], body, bool(rest) and not rest[-1].get("more_body")


@pytest.mark.parametrize("name", SAYINGS)
def test_answer_is_the_same_past_falcon_and_through_it(name):
    """Whatever the provider says is passed on alike, in no more events than it takes, and it is left once."""
    saying, pieces = SAYINGS[name]

    past, provider = answered(CHAT, saying)
    through, _ = answered(f"/{CHAT}", saying)

    assert seen(past) == seen(through)
    assert len(past) == 1 + pieces
    assert provider.closed == 1


@pytest.mark.parametrize(
    "odd",
    [
        {"body": b"{}"},
        {"body": b""},
        {"body": b"what"},
        {"user": None},
        {"user": b""},
        {"body": b"x" * 20_000_000},
    ],
    ids=["no call", "nothing", "no JSON", "nobody", "an empty user", "too much"],
)
def test_refusal_is_the_same_past_falcon_and_through_it(odd):
    """What cannot be forwarded is refused alike."""
    past, through = (seen(answered(path, SAYINGS["whole"][0], **odd)[0]) for path in (CHAT, f"/{CHAT}"))

    assert past == through
    assert past[0] in (400, 413)
