"""One guarded call as both drivers see it: all of it but the moving of bytes."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

from tokenguard import refusal
from tokenguard.account import Account
from tokenguard.backends import loop_runs
from tokenguard.errors import InvalidRequest, TableBusy, TokenGuardError, UpstreamError
from tokenguard.exchange import End, Exchange, Settlement, Terms
from tokenguard.headroom import Pace
from tokenguard.limiter import Limiter, Refusal, Reservation
from tokenguard.metrics import Metrics
from tokenguard.model import Answer, Head, Headers, UpstreamRequest, checked_name
from tokenguard.provider_limits import News, ProviderLimits

CALL = "tokenguard.exchange"
"""Where in the ASGI scope, or in the WSGI environment, a request's call is."""

SETTLE_TRIES = 3
"""How often settling is tried while the buckets are locked; each try waits for a second."""

_log = logging.getLogger("tokenguard")

_REDIRECTS = "OPENAI_BASE_URL may not be quite the provider's address"
_CREDENTIALS = "it may not accept our credentials"
_TELLING = {**dict.fromkeys((301, 302, 303, 307, 308), _REDIRECTS), **dict.fromkeys((401, 403), _CREDENTIALS)}
"""Answers that speak of our configuration rather than of the call."""


class Guard:
    """What guards all calls.

    Attributes:
        limiter: Reserves and settles.
        terms: What is the same for all exchanges.
        metrics: Counts.
        log: Is told of every call that is over; None to tell nobody.
        max_body_bytes: A longer body is refused with 413.
        caller_timeout_s: How long a caller may take to send, or to take, the next piece.
        watch: Heeds what the provider tells of its own limits; None if nobody does.
        pace: Counts what the provider answers, for ``watch``.
    """

    def __init__(
        self,
        limiter: Limiter,
        terms: Terms,
        metrics: Metrics,
        log: Callable[[Account], None] | None,
        max_body_bytes: int,
        caller_timeout_s: float,
        watch: ProviderLimits | None = None,
    ) -> None:
        self.limiter = limiter
        self.terms = terms
        self.metrics = metrics
        self.log = log
        self.max_body_bytes = max_body_bytes
        self.caller_timeout_s = caller_timeout_s
        self.watch = watch
        self.pace = Pace() if watch is None else watch.pace


class Call:
    """An exchange, its reservation and its account, from the request's head until nothing is left to do.

    A driver calls ``begin``, then ``answered``, ``feed`` and ``finish`` as the provider's answer comes and ends,
    or ``failed`` or ``leave`` if it does not, and ``over`` however all that went.

    Attributes:
        settling: What is done once the buckets are up to date: whoever has the answer may look, so that its end
            waits for this. None if there is nothing to wait for.
    """

    def __init__(self, guard: Guard, request_id: str) -> None:
        self.exchange = Exchange(guard.terms, request_id)
        self.account = self.exchange.account
        self._guard = guard
        self._began_s = time.perf_counter()
        self._forwarded_s = 0.0
        self._over = False
        self._heard = False
        self.settling: asyncio.Future[Any] | None = None
        guard.metrics.began()

    def begin(self, headers: Headers, body: bytes) -> UpstreamRequest | Answer:
        """Read a request and reserve for it; return what to forward, or the answer."""
        asked = self.exchange.begin(headers, body)
        if isinstance(asked, Answer):
            return asked
        identity, model, prompt, total, most = asked
        return self.reserved(self._guard.limiter.reserve(identity, model, prompt, total, most))

    def reserved(self, reserved: Reservation | Refusal) -> UpstreamRequest | Answer:
        """Take in what came of reserving; return what to forward, or the refusal."""
        forward = self.exchange.reserved(reserved)
        if self.account.admitted:
            self._guard.metrics.admitted(self.account)
        self._forwarded_s = time.perf_counter()
        return forward

    def answered(self, status: int, headers: Headers) -> Head:
        """Take in the head of the provider's answer; return the head to pass on."""
        now_s = time.perf_counter()
        self.account.upstream_s = now_s - self._forwarded_s
        head = self.exchange.answered(status, headers)
        self._guard.metrics.upstream_answered(self.account)
        watch = self._guard.watch
        if watch is not None:
            if status < 300:
                self._guard.pace.passed(self.exchange.model, now_s)
                if watch.alarmed:
                    watch.passed()
            self._heed(watch, now_s)
        if not self.exchange.refused_upstream:
            self.exchange.told = None  # it holds the whole head
        if status in _TELLING:
            self._blame(f"the provider answered {status}: {_TELLING[status]}")
        return head

    def _heed(self, watch: ProviderLimits, now_s: float) -> None:
        """Act upon what the provider told of its own limits."""
        exchange = self.exchange
        told, model = exchange.told, exchange.model
        reservation = exchange.reservation
        if exchange.lowering is not None and reservation is not None:
            watch.lowered()
            self._lower(reservation, exchange.lowering)
        if told is None:
            return
        if not told.usable:
            self._guard.metrics.provider_told("unusable" if told.limits else "missing")
            return
        # PERF: some tell the same on every answer, and nothing that could be learned; benchmarks/gateway, json
        if self._guard.pace.rests(model, now_s):
            if self._guard.pace.rests_unclear(model):
                self._guard.metrics.provider_told("unclear")
            return
        news = watch.told(model, told)
        if news is not News.SOME:
            self._guard.pace.rest(model, now_s, news is News.UNCLEAR)

    def _lower(self, reservation: Reservation, deltas: tuple[int, ...]) -> None:
        """Lower our level of the provider's buckets."""
        try:
            self._guard.limiter.lower(reservation, deltas)
        except TableBusy as error:
            self._warn(f"{error}: a bucket stays fuller than the provider's")

    def _hear(self) -> None:
        """Act upon the provider's 429, of which there is nothing more to come."""
        exchange = self.exchange
        told = exchange.told
        if self._guard.watch is not None and told is not None and not self._heard:
            self._heard = True
            heeded = self._guard.watch.refused(exchange.model, told, exchange.refusal, exchange.is_outsize)
            if heeded is not None:
                self._wait_for(heeded)

    def _wait_for(self, heeded: asyncio.Future[Any]) -> None:
        """Let the answer's end wait for something else; here, nothing takes a while."""

    def feed(self, chunk: bytes) -> bytes:
        """Take in a piece of the provider's body; return what to pass on, which may be nothing.

        The last piece is settled before it is passed on: when the caller has it, its buckets are up to date.

        Raises:
            UpstreamError: The piece cannot be decoded.
        """
        passed = self.exchange.feed(chunk)
        return passed + self.finish() if self.exchange.complete else passed

    def failed(self, error: UpstreamError) -> Answer | None:
        """Settle a call that the provider failed; return what to answer, if nothing has been passed on yet."""
        self._guard.metrics.upstream_failed()
        end = self.exchange.abort(error)
        self._settle(end.settlement)
        self._blame(str(error) if end.answer else f"{error}; the caller's connection was closed")
        return end.answer

    def finish(self) -> bytes:
        """Settle a call whose answer has come to its end; return the rest of what to pass on.

        Raises:
            UpstreamError: It has not come to its end.
        """
        rest = self._end(self.exchange.finish())
        if self.exchange.refused_upstream:
            self._hear()
        return rest

    def leave(self) -> None:
        """Settle a call that the caller left, if it is not settled."""
        self._end(self.exchange.abort())

    def over(self) -> None:
        """Whatever happened: settle what is not settled, and tell of the call."""
        if self._over:
            return
        self._over = True
        if self.account.admitted:
            self.leave()
        if self.exchange.refused_upstream:
            self._hear()
        self.account.seconds = time.perf_counter() - self._began_s
        self._guard.metrics.ended(self.account)
        if self._guard.log is not None:
            self._guard.log(self.account)

    def _end(self, end: End) -> bytes:
        self._settle(end.settlement)
        return end.rest

    def _settle(self, settlement: Settlement | None) -> None:
        """Carry out a settlement."""
        if settlement is None:
            return
        if settlement.tokens is None:
            settlement.keep()
        else:
            self._settle_at(settlement, settlement.tokens)
        self._guard.metrics.settled(self.account)

    def _settle_at(self, settlement: Settlement, tokens: int) -> None:
        for tries_left in reversed(range(SETTLE_TRIES)):
            try:
                forgiven = self._guard.limiter.settle(settlement.reservation, tokens)
            except TableBusy as error:
                if not tries_left:
                    settlement.keep()
                    self._guard.metrics.settlement_lost()
                    self._warn(f"{error}: the reservation stays spent")
            else:
                settlement.settled(forgiven)
                break

    def _blame(self, what: str) -> None:
        """Tell whoever looks after this process what the provider did."""
        self._warn(what)

    def _warn(self, what: str) -> None:
        _log.warning("%s (request %s)", what, self.account.request_id)


class CallSoon(Call):
    """A call for drivers with an event loop, which settling must not hold up where the backend waits."""

    async def begin_soon(self, headers: Headers, body: bytes) -> UpstreamRequest | Answer:
        """Do what ``begin`` does, while others run."""
        asked = self.exchange.begin(headers, body)
        if isinstance(asked, Answer):
            return asked
        return self.reserved(await self._guard.limiter.reserve_soon(*asked))

    async def settled(self) -> None:
        """Wait until the buckets are up to date: whoever has the answer may look."""
        if self.settling is not None:
            await self.settling

    def _settle(self, settlement: Settlement | None) -> None:
        """Carry out a settlement; it goes on by itself where that takes a while."""
        if settlement is None or settlement.tokens is None or not self._guard.limiter.waits or not loop_runs():
            Call._settle(self, settlement)  # noqa: SLF001 - of its own base; compiled, super() finds no C
        else:
            self._settle_soon(settlement, settlement.tokens)

    def _lower(self, reservation: Reservation, deltas: tuple[int, ...]) -> None:
        """Lower our level of the provider's buckets; it goes on by itself where that takes a while."""
        if self._guard.limiter.waits:
            self._guard.limiter.lower_soon(reservation, deltas)
        else:
            Call._lower(self, reservation, deltas)  # noqa: SLF001 - as above

    def _wait_for(self, heeded: asyncio.Future[Any]) -> None:
        """Let the answer's end wait for something else too."""
        waited_for = [heeded] if self.settling is None else [self.settling, heeded]
        self.settling = asyncio.gather(*waited_for, return_exceptions=True)

    def _settle_soon(self, settlement: Settlement, tokens: int) -> None:
        def settled(settling: asyncio.Future[int]) -> None:
            settlement.settled(0 if settling.cancelled() else settling.result())
            self._guard.metrics.settled(self.account)

        self.settling = self._guard.limiter.settle_soon(settlement.reservation, tokens)
        if self.settling.done():
            settled(self.settling)
        else:
            self.settling.add_done_callback(settled)


def answer_to(error: TokenGuardError, request_id: str) -> Answer:
    """Return the answer to a request that failed; log the error if it is not the caller's."""
    answer = refusal.error_answer(error)
    if refusal.is_worth_a_line(error, answer):
        _log.warning("%s (request %s)", error, request_id)
    return answer


def path_of(model: str | None) -> str:
    """Return the provider's path of a model, or of all; it stays where it is put: our key opens no other doors.

    Raises:
        InvalidRequest: It is no model's id.
    """
    if model is None:
        return "/models"
    if not {"", ".", ".."}.isdisjoint(model.split("/")):
        raise InvalidRequest("model", f"model must be the id of a model, got {model!r}")
    return f"/models/{quote(checked_name('model', model), safe='/:')}"
