"""How TokenGuard says no: from decisions and errors to status, header fields and body, for every driver.

Source: https://platform.openai.com/docs/guides/rate-limits and the retry rules of the official clients.
"""

from __future__ import annotations

from tokenguard._refusal import explain, refuse
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
from tokenguard.model import Answer
from tokenguard.providers.openai import error_body

__all__ = [
    "JSON",
    "error_answer",
    "explain",
    "failed",
    "is_worth_a_line",
    "problem",
    "refuse",
    "stopping",
]

JSON = (b"content-type", b"application/json")


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
        return problem(502, f"{str(error).rstrip('.')}. Nothing was changed.", "upstream_error", "provider_error")
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
