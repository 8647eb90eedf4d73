"""How a guarded request ends: settled once, by the app, by the usage in its answer, or at what was reserved."""

from __future__ import annotations

import logging

from tokenguard import refusal
from tokenguard.errors import BackendDown, TableBusy, TokenGuardError
from tokenguard.library.call import Call
from tokenguard.model import Answer, Headers
from tokenguard.providers.openai import EventStream, JsonAnswer

_PLAIN = (b"", b"identity")
_log = logging.getLogger("tokenguard")


class Ending:
    """A guarded request, from its admission to its settlement.

    Args:
        call: Its call.
        reads_usage: Whether the answer's usage counts.

    Attributes:
        call: Likewise.
        began: Whether an answer has begun.
        left: Whether the caller has hung up.
    """

    def __init__(self, call: Call, *, reads_usage: bool) -> None:
        self.call = call
        self.began = False
        self.left = False
        self._reads_usage = reads_usage
        self._reader: JsonAnswer | EventStream | None = None
        self._failed = False

    def answered(self, status: int, headers: Headers) -> Headers:
        """Take in the head of the app's answer; return the fields to add to it."""
        self.began = True
        self._failed = status >= 500
        found = {name.lower(): value for name, value in headers}
        if self._reads_usage and found.get(b"content-encoding", b"") in _PLAIN:
            events = found.get(b"content-type", b"").startswith(b"text/event-stream")
            self._reader = EventStream(swallow_usage=False) if events else JsonAnswer()
        if any(name.startswith(b"x-ratelimit-") for name in found):
            return []  # the app tells of limits of its own
        return self.call.limit_headers()

    def feed(self, chunk: bytes) -> None:
        """Take in a piece of the answer's body."""
        if self._reader is not None and chunk:
            self._reader.feed(chunk)

    def over(self, *, ended: bool) -> None:
        """Settle what is not settled. A request that the app failed, and its caller waited for, costs no tokens.

        Args:
            ended: Whether the answer has come to its end.
        """
        if not self.call.is_open:
            return
        try:
            if not self.left and (self._failed or not self.began):
                self.call.refund()
                return
            usage = None if self._reader is None else self._reader.final_usage(ended)
            if usage is not None:
                self.call.settle(usage.total)
                return
        except TableBusy as error:
            _log.warning("%s: what was reserved stays spent", error)
        self.call.keep()


def error_answer(error: TokenGuardError) -> Answer:
    """Return the answer to a request that cannot be decided upon; log the error if it is not the caller's."""
    answer = refusal.error_answer(error)
    if answer.status >= 500 and not isinstance(error, BackendDown):  # the backend logs its beginning and its end
        _log.warning("%s", error)
    return answer


def fields_of(answer: Answer) -> Headers:
    """Return the header fields of an answer of ours."""
    return [*answer.headers, (b"content-length", b"%d" % len(answer.body))]
