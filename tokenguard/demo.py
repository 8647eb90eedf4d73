"""A provider that needs no key: it says that it is a demo, in the provider's own wire format."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

from tokenguard.model import Headers, UpstreamRequest
from tokenguard.providers.openai import CHAT_PATH, error_body

MODEL = "tokenguard-demo"

_SAYS = (
    "This is TokenGuard's demo upstream, not a language model. Your call passed every budget on its path; "
    "its tokens were reserved before it was forwarded and settled to the usage below."
)


class DemoResponse:
    """A canned answer."""

    def __init__(self, status: int, content_type: str, body: list[bytes]) -> None:
        self.status = status
        self.headers: Headers = [(b"content-type", content_type.encode())]
        self._body = body

    async def chunks(self) -> AsyncIterator[bytes]:
        """Yield the body in pieces."""
        for piece in self._body:
            yield piece

    async def close(self) -> None:
        """There is nothing to close."""


class DemoUpstream:
    """Answers every chat with one sentence, plain or streamed, and counts about four bytes a token."""

    def describe(self) -> str:
        """Return what it is."""
        return "built-in demo"

    async def open(self, request: UpstreamRequest) -> DemoResponse:
        """Answer a request."""
        if request.path == CHAT_PATH:
            return _chat(json.loads(request.body))
        model = {"id": MODEL, "object": "model", "created": 0, "owned_by": "tokenguard"}
        if request.path == "/models":
            return _document(200, {"object": "list", "data": [model]})
        if request.path == f"/models/{MODEL}":
            return _document(200, model)
        message = f"The model {request.path.removeprefix('/models/')!r} does not exist: this is a demo."
        return DemoResponse(
            404, "application/json", [error_body(message, "invalid_request_error", "model_not_found")]
        )

    async def close(self) -> None:
        """There is nothing to close."""


def _document(status: int, value: object) -> DemoResponse:
    return DemoResponse(status, "application/json", [json.dumps(value, indent=2).encode() + b"\n"])


def _chat(asked: dict[str, Any]) -> DemoResponse:
    choices = int(asked.get("n") or 1)
    words = _SAYS.split(" ")
    cap = asked.get("max_completion_tokens") or asked.get("max_tokens")
    if cap is not None and cap < len(words):
        words, reason = words[: int(cap)], "length"
    else:
        reason = "stop"
    prompt = max(1, len(json.dumps(asked["messages"])) // 4)
    completion = len(words) * choices
    usage = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
    base = {"id": "chatcmpl-demo", "created": int(time.time()), "model": asked["model"]}
    if asked.get("stream"):
        events = _events({**base, "object": "chat.completion.chunk"}, words, choices, reason)
        if (asked.get("stream_options") or {}).get("include_usage"):
            last = [{**base, "object": "chat.completion.chunk", "choices": [], "usage": usage}]
        else:
            last = []
        pieces = [b"data: %s\n\n" % json.dumps(event).encode() for event in (*events, *last)]
        return DemoResponse(200, "text/event-stream", [*pieces, b"data: [DONE]\n\n"])
    message = {"role": "assistant", "content": " ".join(words), "refusal": None}
    answers = [{"index": i, "message": message, "logprobs": None, "finish_reason": reason} for i in range(choices)]
    return _document(200, {**base, "object": "chat.completion", "choices": answers, "usage": usage})


def _events(base: dict[str, Any], words: list[str], choices: int, reason: str) -> Iterator[dict[str, Any]]:
    for i in range(choices):
        for number, word in enumerate(words):
            delta = {"content": word if number == 0 else f" {word}"}
            if number == 0:
                delta["role"] = "assistant"
            yield {**base, "choices": [{"index": i, "delta": delta, "finish_reason": None}]}
        yield {**base, "choices": [{"index": i, "delta": {}, "finish_reason": reason}]}
