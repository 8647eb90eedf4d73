"""The wire of OpenAI's chat completions, as OpenAI and everybody compatible with it speaks it.

Source: https://platform.openai.com/docs/api-reference/chat
"""

from __future__ import annotations

import json

import msgspec

from tokenguard.providers import careful
from tokenguard.providers._chat import (
    MAX_ANSWER_BYTES,
    MAX_EVENT_BYTES,
    ChatRequest,
    EventStream,
    JsonAnswer,
    scan_chat,
)
from tokenguard.providers.careful import FULL_IMAGE_TOKENS, TOKENS_PER_MESSAGE, TOKENS_PER_PROMPT, read_usage

__all__ = [
    "CHAT_PATH",
    "FULL_IMAGE_TOKENS",
    "MAX_ANSWER_BYTES",
    "MAX_EVENT_BYTES",
    "TOKENS_PER_MESSAGE",
    "TOKENS_PER_PROMPT",
    "ChatRequest",
    "EventStream",
    "JsonAnswer",
    "error_body",
    "read_chat",
    "read_usage",
]

CHAT_PATH = "/chat/completions"


def read_chat(raw: bytes) -> ChatRequest:
    """Read a request for a chat completion.

    Raises:
        InvalidRequest: The body is not one, or a member that matters cannot be.
    """
    return scan_chat(raw) or ChatRequest(*careful.read_chat(raw))


def error_body(message: str, kind: str, code: str | None, param: str | None = None, **more: object) -> bytes:
    """Return an error of a kind (its ``type``) as OpenAI words it; ``more`` are members beside ``error``."""
    error = {"message": message, "type": kind, "param": param, "code": code}
    try:
        return msgspec.json.encode({"error": error, **more}) + b"\n"
    except UnicodeEncodeError:  # a lone surrogate that somebody sent, and that the message shows
        return json.dumps({"error": error, **more}).encode() + b"\n"
