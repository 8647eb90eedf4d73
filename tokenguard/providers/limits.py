"""What OpenAI, and who is compatible with it, tells of its own limits: in header fields, and in its refusals.

Source: https://platform.openai.com/docs/guides/rate-limits and https://learn.microsoft.com/azure/ai-services/openai
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from email.utils import parsedate_to_datetime
from enum import Enum
from typing import Any, NamedTuple

import msgspec

MINUTE_S, DAY_S = 60, 86_400

_MS = 0.001
_TOLERANCE = 0.05
"""How far a reset may be from what the amounts say, beside what is lost where a remainder is rounded down."""

_DURATION = re.compile(
    rb"(?:(\d{1,9})h)?(?:(\d{1,9})m)?(?:(\d{1,9}(?:\.\d{1,9})?)s)?(?:(\d{1,9}(?:\.\d{1,9})?)ms)?"
)
_SECONDS = re.compile(rb"\d{1,18}(?:\.\d{1,9})?")
_WORDED_WAIT = re.compile(r"(?:try again in|retry after) (?:(\d+) sec|((?:[\d.]{1,20}(?:h|ms?|s))+))")
_WORDED_SIZES = re.compile(r"Limit:? (\d{1,18}),.*Requested:? (\d{1,18})\b")
_MOST_WORDS = 2000
"""So much of a message is looked at: whoever writes one that is far longer does not word a wait."""

QUOTA_CODES = frozenset(
    (
        "insufficient_quota",
        "credit_balance_exhausted",
        "organization_spend_limit_exceeded",
        "project_spend_limit_exceeded",
        "organization_usage_limit_exceeded",
        "billing_hard_limit_reached",
    )
)
"""Codes of a 429 that no waiting helps against: somebody has to pay, or to raise a limit."""

_ONE_CALL_CODES = frozenset(("flex_unavailable", "resource_unavailable"))
"""Codes that speak of the one call, and of how it was to be served."""


def window_s(limit: int, remaining: int, reset: bytes) -> int | None:
    """Return in what time a bucket that is empty fills: a minute or a day; None if that cannot be told.

    Args:
        limit: What the bucket holds.
        remaining: What it holds now, at most ``limit``.
        reset: When it is full again: a Go duration such as ``6m0s`` or ``12ms``, or plain seconds.
    """
    plain = _SECONDS.fullmatch(reset) is not None
    reset_s = float(reset) if plain else duration_s(reset)
    if reset_s is None or remaining == limit:
        return None
    grain_s = 1.0 if plain and b"." not in reset else _MS
    most = (limit - remaining) / limit
    least = max(most - 1 / limit, most / 2)
    fits = [
        window
        for window in (MINUTE_S, DAY_S)
        if least * window * (1 - _TOLERANCE) - grain_s <= reset_s <= most * window * (1 + _TOLERANCE) + grain_s
    ]
    if len(fits) == 1:
        return fits[0]
    # Whoever tells whole seconds (Azure) counts in windows, and tells the end of this one.
    return MINUTE_S if not fits and plain and 0 < reset_s <= MINUTE_S else None


def duration_s(text: bytes) -> float | None:
    """Return the seconds that a Go duration means; None if it is none."""
    found = _DURATION.fullmatch(text)
    if not text or found is None:
        return None
    hours, minutes, seconds, ms = (float(part or 0) for part in found.groups())
    return hours * 3600 + minutes * 60 + seconds + ms / 1000


class Kind(Enum):
    """What a 429 of the provider asks for."""

    WAIT = "wait"
    PAY = "pay"
    SHORTEN = "shorten"


class Refusal(NamedTuple):
    """A 429 of the provider.

    Attributes:
        kind: What it asks for.
        code: The provider's code; empty if it told none.
        wait_s: How long it asks to wait; None if it does not say.
    """

    kind: Kind
    code: str
    wait_s: float | None


def read_refusal(
    body: bytes, retry_after_ms: Sequence[bytes] = (), retry_after: Sequence[bytes] = (), now_s: float = 0.0
) -> Refusal:
    """Read a 429 of the provider.

    Args:
        body: Its body, or what came of it.
        retry_after_ms: The values of the field ``retry-after-ms``.
        retry_after: The values of the field ``retry-after``.
        now_s: The time since the epoch, for a field that tells a date.
    """
    error = _error_of(body)
    code, kind, message = (_text(error, name)[:_MOST_WORDS] for name in ("code", "type", "message"))
    if code in QUOTA_CODES or kind in QUOTA_CODES:
        return Refusal(Kind.PAY, code or kind, None)
    sizes = _WORDED_SIZES.search(message)
    if message.startswith("Request too large") or (sizes and int(sizes[2]) > int(sizes[1])):
        return Refusal(Kind.SHORTEN, code, None)
    if code in _ONE_CALL_CODES:
        return Refusal(Kind.SHORTEN, code, None)
    return Refusal(Kind.WAIT, code, _wait_s(retry_after_ms, retry_after, message, now_s))


def _wait_s(in_ms: Sequence[bytes], plain: Sequence[bytes], message: str, now_s: float) -> float | None:
    for values, unit_s in ((in_ms, _MS), (plain, 1.0)):
        for value in values:
            if _SECONDS.fullmatch(value.strip()):
                return float(value) * unit_s
    for value in plain:
        try:
            return max(0.0, parsedate_to_datetime(value.decode("latin-1")).timestamp() - now_s)
        except (ValueError, TypeError, OverflowError):
            continue
    worded = _WORDED_WAIT.search(message)
    if worded is None:
        return None
    return duration_s(f"{worded[1]}s".encode() if worded[1] else worded[2].encode())


def _error_of(body: bytes) -> dict[str, Any]:
    try:
        whole = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return {}
    error = whole.get("error", whole) if isinstance(whole, dict) else {}
    return error if isinstance(error, dict) else {"message": error}


def _text(error: dict[str, Any], name: str) -> str:
    value = error.get(name)
    return "" if value is None or isinstance(value, dict | list) else str(value)


def error_text(body: bytes) -> str:
    """Return what an error's body says, in one line of at most 500 characters; empty if it says nothing."""
    error = _error_of(body)
    said = _text(error, "message") or body.decode(errors="replace")
    return " ".join(said.split())[:500]


class AdminLimit(NamedTuple):
    """What the admin API tells of one model and meter.

    Attributes:
        model: The model's name.
        meter: ``requests`` or ``tokens``.
        limit: How many.
        window_s: In how many seconds.
    """

    model: str
    meter: str
    limit: int
    window_s: int


_ADMIN_FIELDS = (
    ("max_requests_per_1_minute", "requests", MINUTE_S),
    ("max_requests_per_1_day", "requests", DAY_S),
    ("max_tokens_per_1_minute", "tokens", MINUTE_S),
)


def read_page(body: bytes) -> tuple[list[AdminLimit], str | None]:
    """Read a page of ``GET /organization/projects/{id}/rate_limits``; return it, and where the next begins.

    Raises:
        ValueError: It is no such page.
    """
    try:
        page = msgspec.json.decode(body)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(page, dict) or not isinstance(page.get("data"), list):
        raise ValueError("it is not a list of limits")
    limits = [limit for entry in page["data"] for limit in _limits_of(entry)]
    following = page.get("last_id") if page.get("has_more") is True else None
    if page.get("has_more") is True and not isinstance(following, str):
        raise ValueError("there is more, but it does not say where")
    return limits, following


def _limits_of(entry: Any) -> Iterator[AdminLimit]:  # noqa: ANN401 - any JSON
    """Yield the limits of a model; what limits nothing is none."""
    if not isinstance(entry, dict) or not isinstance(entry.get("model"), str):
        raise ValueError("a limit names no model")
    for field, meter, span_s in _ADMIN_FIELDS:
        value: Any = entry.get(field)
        if type(value) in (int, float) and math.isfinite(value) and value >= 1:
            yield AdminLimit(entry["model"], meter, int(value), span_s)
