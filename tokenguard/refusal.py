"""How TokenGuard says no: from decisions and errors to status, header fields and body, for every driver.

Source: https://platform.openai.com/docs/guides/rate-limits and the retry rules of the official clients.
"""

from __future__ import annotations

import math

from tokenguard._limit_fields import add_fields, duration
from tokenguard.errors import (
    BackendDown,
    BodyTimeout,
    BodyTooLarge,
    BudgetNotFound,
    InvalidValue,
    ProviderError,
    StaleHandle,
    StateUnwritable,
    TableBusy,
    TableFull,
    TokenGuardError,
    UpstreamBusy,
    UpstreamError,
    UpstreamTimeout,
)
from tokenguard.model import NEVER_US, Answer, BucketState, Decision, Headers, Meter
from tokenguard.providers.openai import error_body

JSON = (b"content-type", b"application/json")
RETRY_WORTHWHILE_US = 60_000_000
"""Beyond this wait clients are told not to retry by themselves."""

_JITTER_FROM_US = 1_000_000
_JITTER = 0.1
_OURS = "This is a TokenGuard budget, not a limit of the provider."
_THEIRS = "This is the provider's own limit, which TokenGuard keeps calls within."


def refuse(decision: Decision, jitter: float) -> Answer:
    """Return the 429 for a refused call.

    Args:
        decision: The refusal.
        jitter: 0 to 1; how much of a tenth a wait over 1 s is prolonged by, so that a crowd that is refused
            together does not come back together.
    """
    binding = decision.binding
    if binding is None:
        raise ValueError("an allowed decision is not a refusal")
    wait_us = decision.retry_after_us
    if _JITTER_FROM_US < wait_us < NEVER_US:
        wait_us = min(wait_us + int(wait_us * _JITTER * jitter), NEVER_US - 1)
    body = error_body(
        _text(binding, wait_us),
        kind=Meter.REQUESTS if binding.name.meter is Meter.GATE else binding.name.meter,
        code="rate_limit_exceeded",
        tokenguard={
            "scope": str(binding.name.scope),
            "retryAfterMs": _ms(decision.retry_after_us),
            "buckets": [_bucket(state) for state in decision.buckets],
        },
    )
    headers = [JSON, *_retry_headers(wait_us, worthwhile=decision.retry_after_us <= RETRY_WORTHWHILE_US)]
    for state in _tightest(decision, binding):
        if state.name.meter is not Meter.GATE:
            add_fields(headers, state.name.meter, state.limit, state.level, state.full_in_us)
    return Answer(429, headers, body)


def explain(decision: Decision) -> str:
    """Return a refusal in words: whose limit it was, how things are with it, and what may help.

    Raises:
        ValueError: The decision is no refusal.
    """
    if decision.binding is None:
        raise ValueError("an allowed decision is not a refusal")
    return _text(decision.binding, decision.retry_after_us)


def error_answer(error: TokenGuardError) -> Answer:
    """Return the answer to a request that failed of itself, of us or of the provider."""
    if isinstance(error, BodyTooLarge):
        return problem(413, str(error), "invalid_request_error", "body_too_large")
    if isinstance(error, BodyTimeout):
        answer = problem(408, str(error), "invalid_request_error", "request_timeout")
        answer.headers.append((b"connection", b"close"))  # what may still come is no next request
        return answer
    if isinstance(error, InvalidValue):
        return problem(400, str(error), "invalid_request_error", "invalid_value", error.field)
    if isinstance(error, BudgetNotFound):
        return problem(404, str(error), "invalid_request_error", "budget_not_found")
    if isinstance(error, UpstreamBusy):
        return problem(503, str(error), "service_unavailable_error", "overloaded", retry_after_s=1)
    if isinstance(error, UpstreamTimeout):
        return problem(504, str(error), "upstream_error", "upstream_timeout")
    if isinstance(error, ProviderError):
        return problem(502, f"{error}. Nothing was changed.", "upstream_error", "provider_error")
    if isinstance(error, UpstreamError):
        return problem(502, str(error), "upstream_error", "upstream_unreachable")
    if isinstance(error, BackendDown):  # its whole text names our own hosts
        return problem(503, error.told, "service_unavailable_error", "backend_unavailable", retry_after_s=1)
    if isinstance(error, StateUnwritable):
        message = f"{error}. Nothing was changed."
        return problem(503, message, "service_unavailable_error", "state_unwritable", retry_after_s=1)
    if isinstance(error, TableFull | TableBusy | StaleHandle):
        message = f"{error}. Nothing was charged."
        return problem(503, message, "service_unavailable_error", "no_bucket", retry_after_s=1)
    return failed()


def is_worth_a_line(error: TokenGuardError, answer: Answer) -> bool:
    """Return whether whoever looks after the server is to hear of an error that was answered so."""
    return answer.status >= 500 and not isinstance(error, BackendDown)  # which logs its beginning and its end


def failed() -> Answer:
    """Return the answer to a request that failed for a reason that is nobody's business but ours."""
    return problem(500, "The request failed inside TokenGuard.", "server_error", None)


def stopping() -> Answer:
    """Return the answer to a call that a server which stops could not wait for."""
    return problem(503, "TokenGuard is stopping.", "service_unavailable_error", "stopping", retry_after_s=1)


def problem(
    status: int,
    message: str,
    kind: str,
    code: str | None,
    param: str | None = None,
    retry_after_s: int = 0,
) -> Answer:
    """Return an answer of ours in the provider's error shape."""
    headers = [JSON]
    if retry_after_s:
        headers.append((b"retry-after", b"%d" % retry_after_s))
    return Answer(status, headers, error_body(message, kind, code, param))


def _text(binding: BucketState, wait_us: int) -> str:
    return f"{_what(binding, wait_us)} {_OURS if binding.name.source is None else _THEIRS}"


def _what(bucket: BucketState, wait_us: int) -> str:
    if bucket.name.meter is Meter.GATE:
        return (
            f"The provider asked to wait: calls of {bucket.name.model} are held back. "
            f"Please try again in {duration(wait_us)}."
        )
    state = f"limit {bucket.limit}, remaining {bucket.remaining}, requested {bucket.cost}"
    if bucket.cost > bucket.limit:
        return f"Request too large for {bucket.name}: {state}. Waiting does not help: ask for fewer tokens."
    if wait_us >= NEVER_US:
        return f"Budget used up for {bucket.name}: {state}. It does not refill by itself."
    return f"Rate limit reached for {bucket.name}: {state}. Please try again in {duration(wait_us)}."


def _retry_headers(wait_us: int, *, worthwhile: bool) -> Headers:
    headers: Headers = []
    if wait_us < NEVER_US:
        headers.append((b"retry-after", b"%d" % max(1, math.ceil(wait_us / 1_000_000))))
        headers.append((b"retry-after-ms", b"%d" % math.ceil(wait_us / 1000)))
    if not worthwhile:
        headers.append((b"x-should-retry", b"false"))
    return headers


def _tightest(decision: Decision, binding: BucketState) -> list[BucketState]:
    """Return the binding bucket, and of each other meter the one with the least in it, the first of equals."""
    tightest: dict[Meter, BucketState] = {}
    for state in decision.buckets:
        meter = state.name.meter
        if meter not in tightest or state.level < tightest[meter].level:
            tightest[meter] = state
    del tightest[binding.name.meter]
    return [binding, *tightest.values()]


def _bucket(state: BucketState) -> dict[str, object]:
    ((kind, scope_id), meter, model, source), limit, level, cost, wait_us, _ = state
    return {
        "scope": kind,
        "id": scope_id,
        "meter": meter,
        "model": model,
        "source": source,
        "limit": limit,
        "remaining": max(0, level),
        "level": level,
        "requested": cost,
        "allowed": wait_us == 0,
        "retryAfterMs": _ms(wait_us),
    }


def _ms(wait_us: int) -> int | None:
    return None if wait_us >= NEVER_US else -(-wait_us // 1000)
