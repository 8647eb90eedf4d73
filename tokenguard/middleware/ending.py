"""How a guarded request ends: settled once, by the app, by the usage in its answer, or at what was reserved."""

from __future__ import annotations

import logging
import random
from contextlib import suppress

from tokenguard import refusal
from tokenguard.errors import AlreadySettled, TableBusy, TokenGuardError
from tokenguard.library.call import BudgetExceeded, Call
from tokenguard.model import Answer, Decision, Headers
from tokenguard.providers.openai import EventStream, JsonAnswer

_PLAIN = (b"", b"identity")
_log = logging.getLogger("tokenguard")


class Ending:
    """A guarded request, from its admission to its settlement.

    Args:
        call: Its call.
        reads_usage: Whether the answer's usage counts.

    Attributes:
        began: Whether something has been passed on that no other answer can take the place of. A head has not: a
            server keeps it until there is more.
    """

    def __init__(self, call: Call, *, reads_usage: bool) -> None:
        self.began = False
        self._call = call
        self._reads_usage = reads_usage
        self._reader: JsonAnswer | EventStream | None = None
        self._status = 0
        self._ended = False
        self._left = False

    def answered(self, status: int, headers: Headers) -> Headers:
        """Take in the head of the app's answer, or another in its place; return the fields to add to it."""
        if self.began:
            return []  # it comes too late, which the server will say
        self._status = status
        found = {name.lower(): value for name, value in headers}
        self._reader = self._reader_of(found) if self._reads_usage else None
        for name in found:
            if name.startswith(b"x-ratelimit-"):
                return []  # the app tells of limits of its own
        return self._call.limit_headers()

    @staticmethod
    def _reader_of(fields: dict[bytes, bytes]) -> JsonAnswer | EventStream | None:
        kind = fields.get(b"content-type", b"").lower()
        if fields.get(b"content-encoding", b"").lower() not in _PLAIN:
            return None
        if kind.startswith(b"text/event-stream"):
            return EventStream(swallow_usage=False)
        return JsonAnswer() if b"json" in kind else None

    def feed(self, chunk: bytes | bytearray | memoryview) -> None:
        """Take in a piece of the answer's body."""
        if chunk:
            if self._reader is not None:
                self._reader.feed(bytes(chunk))
            self.began = True

    def leave(self) -> None:
        """Take in that the caller has hung up: what the app fails from now on is paid for."""
        self._left = self._left or self._status < 500

    def ended(self) -> None:
        """Take in that the answer has come to its end; settle what is known by now.

        Else what was reserved is spent anyway, and the app may settle it until it is over.
        """
        self._ended = True
        self._settle(for_good=False)

    def over(self) -> None:
        """Settle what is not settled. What the app failed costs no tokens, if its caller waited for it."""
        self._settle(for_good=True)

    def _settle(self, *, for_good: bool) -> None:
        if not self._call.is_open:
            return
        failed = self._status >= 500 or not (self._status and (self.began or self._ended))
        usage = None if self._reader is None else self._reader.final_usage(self._ended)
        with suppress(AlreadySettled):  # by the app, in another thread
            try:
                if failed and not self._left:
                    self._call.refund()
                elif usage is not None:
                    self._call.settle(usage.total)
                elif for_good:
                    self._call.keep()
            except TableBusy as error:
                _log.warning("%s: what was reserved stays spent", error)
                self._call.keep()


def error_answer(error: TokenGuardError) -> Answer:
    """Return the answer to a request that cannot be decided upon; log the error if it is not the caller's."""
    if isinstance(error, BudgetExceeded):  # of an app that reserves by itself, to know who asks
        return refuse(error.decision)
    answer = refusal.error_answer(error)
    if refusal.is_worth_a_line(error, answer):
        _log.warning("%s", error)
    return answer


def refuse(decision: Decision) -> Answer:
    """Return the 429 for a refused request."""
    return refusal.refuse(decision, random.random())  # noqa: S311 - no secret


def fields_of(answer: Answer) -> Headers:
    """Return the header fields of an answer of ours."""
    return [*answer.headers, (b"content-length", b"%d" % len(answer.body))]
