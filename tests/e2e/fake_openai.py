"""An upstream of the tests' own that speaks OpenAI's wire, and keeps what it was sent."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import uvicorn

RATE_LIMITS = [
    (b"x-ratelimit-limit-requests", b"10000"),
    (b"x-ratelimit-remaining-requests", b"9999"),
    (b"x-ratelimit-reset-requests", b"8.64s"),
]
JSON = [(b"content-type", b"application/json")]
EVENTS = [(b"content-type", b"text/event-stream; charset=utf-8")]


@dataclass
class Received:
    """One request as it came."""

    method: str
    path: str
    headers: list[tuple[bytes, bytes]]
    body: bytes
    query: str = ""

    @property
    def json(self):
        """The body, decoded."""
        return json.loads(self.body)

    def header(self, name):
        """All values of a header field."""
        return [value.decode() for key, value in self.headers if key == name.encode()]


@dataclass
class Reply:
    """How one request is to be answered; given to a test's script, which may hold it back or break it off."""

    received: Received
    _send: Callable[[dict], Awaitable[None]]
    _receive: Callable[[], Awaitable[dict]]

    async def head(self, status=200, headers=None):
        """Send the head."""
        headers = RATE_LIMITS + JSON if headers is None else headers
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    async def piece(self, data):
        """Send a piece of the body."""
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def end(self):
        """End the body."""
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def whole(self, status, headers, body):
        """Send a whole answer."""
        await self.head(status, headers)
        await self.piece(body)
        await self.end()

    async def until_gone(self):
        """Wait until TokenGuard closes the connection."""
        while (await self._receive())["type"] != "http.disconnect":
            pass


def usage_of(prompt, completion):
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def completion(received, usage):
    message = {"role": "assistant", "content": "Hello there", "refusal": None}
    choice = {"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}
    return json.dumps(
        {
            "id": "chatcmpl-1",
            "object": "chat.completion",
            "created": 1,
            "model": received.json["model"],
            "choices": [choice],
            "usage": usage,
        }
    ).encode()


def event(received, choices, usage=None):
    chunk = {
        "id": "chatcmpl-1",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": received.json["model"],
        "choices": choices,
        "usage": usage,
    }
    return b"data: %s\n\n" % json.dumps(chunk).encode()


def delta(content, reason=None):
    return [{"index": 0, "delta": {"content": content} if content else {}, "finish_reason": reason}]


WORDS = ("Hello", " there", ", world")
DONE = b"data: [DONE]\n\n"


def in_two_parts(first, second, go_on):
    """Return a script that streams ``first``, and ``second`` once the event ``go_on`` is set."""

    async def script(reply):
        await reply.head(headers=EVENTS)
        await reply.piece(event(reply.received, delta(first)))
        await go_on.wait()
        await reply.piece(event(reply.received, delta(second)) + DONE)
        await reply.end()

    return script


async def complete(reply, usage, fields=RATE_LIMITS, service_s=0):
    """Answer with a completion, as a stream if one was asked for; a stream has its head before it is served."""
    received = reply.received
    if received.json.get("stream"):
        await reply.head(headers=fields + EVENTS)
        await asyncio.sleep(service_s)
        await _stream(reply, usage)
    else:
        await asyncio.sleep(service_s)
        await reply.whole(200, fields + JSON, completion(received, usage))


async def _stream(reply, usage):
    """Stream a completion, with its usage at the end if it was asked for."""
    for word in WORDS:
        await reply.piece(event(reply.received, delta(word)))
    await reply.piece(event(reply.received, delta(None, "stop")))
    if (reply.received.json.get("stream_options") or {}).get("include_usage"):
        await reply.piece(event(reply.received, [], usage))
    await reply.piece(DONE)
    await reply.end()


@dataclass
class FakeOpenAI:
    """Answers as OpenAI does, with the usage that the test sets, or by a script of the test's."""

    usage: dict = field(default_factory=lambda: usage_of(10, 20))
    script: Callable[[Reply], Awaitable[None]] | None = None
    received: list[Received] = field(default_factory=list)
    open_replies: int = 0

    async def __call__(self, scope, receive, send):
        """Answer one request (an ASGI app)."""
        body, more = b"", True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        path, query = scope["raw_path"].decode(), scope["query_string"].decode()
        received = Received(scope["method"], path, scope["headers"], body, query)
        self.received.append(received)
        self.open_replies += 1
        try:
            await (self.script or self.answer)(Reply(received, send, receive))
        finally:
            self.open_replies -= 1

    async def answer(self, reply):
        """Answer as OpenAI does."""
        received = reply.received
        if received.path == "/v1/models":
            await reply.whole(200, JSON, b'{"object":"list","data":[]}')
        elif received.path.startswith("/v1/models/"):
            await reply.whole(200, JSON, json.dumps({"id": received.path[11:]}).encode())
        else:
            await complete(reply, self.usage)


class Serving:
    """Serves an ASGI app on a free port of the loopback, in a thread of its own."""

    def __init__(self, app):
        config = uvicorn.Config(
            app, port=0, log_level="critical", lifespan="off", access_log=False, timeout_graceful_shutdown=1
        )
        self._server = uvicorn.Server(config)
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self):
        asyncio.run(self._serve())

    async def _serve(self):
        self.loop = asyncio.get_running_loop()
        self._server.config.load()
        self._server.lifespan = self._server.config.lifespan_class(self._server.config)
        await self._server.startup()
        self.port = self._server.servers[0].sockets[0].getsockname()[1]
        self._started.set()
        await self._server.main_loop()
        await self._server.shutdown()

    def __enter__(self):
        self._thread.start()
        assert self._started.wait(10)
        return self

    def __exit__(self, *error):
        self._server.should_exit = True
        self._thread.join(10)
