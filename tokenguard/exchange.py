"""One proxied call, from request to settlement, WITHOUT I/O.

A driver (ASGI, WSGI, the fast lane) moves the bytes and asks the exchange what they mean::

    asked = exchange.begin(headers, body)         # Ask, or an Answer: done
    reserved = limiter.reserve(*asked)
    request = exchange.reserved(reserved)         # UpstreamRequest, or an Answer: done
    head = exchange.answered(status, headers)     # of the provider's answer; pass it on
    passed = exchange.feed(chunk)                 # for each piece of its body; pass it on
    end = exchange.finish()                       # or abort(error): pass on end.rest, carry out end.settlement

However a call ends, exactly one of ``finish`` and ``abort`` yields its settlement; asked again, they yield none.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

from tokenguard import refusal
from tokenguard._fields import Fields
from tokenguard._heads import Asked, Told
from tokenguard._refusal import refuse
from tokenguard.account import Account, Outcome
from tokenguard.errors import InvalidValue, TokenGuardError, UpstreamError
from tokenguard.estimate import Estimate, Estimator, least_counted
from tokenguard.limiter import Refusal, Reservation
from tokenguard.model import (
    Answer,
    Head,
    Headers,
    Identity,
    UpstreamRequest,
    Usage,
)
from tokenguard.plan import Plan
from tokenguard.providers._chat import ChatRequest
from tokenguard.providers.openai import CHAT_PATH, EventStream, JsonAnswer, read_chat

MAX_REFUSAL_BYTES = 65_536
"""So much of a 429's body is looked at, or a piece more."""

_UNKNOWN = -1
"""So many bytes of an answer are left whose length nobody has told."""

_SETTLED, _REFUNDED, _KEPT = Outcome.SETTLED, Outcome.REFUNDED, Outcome.KEPT


class Ask(NamedTuple):
    """What to reserve: the arguments of ``Limiter.reserve``."""

    identity: Identity
    model: str
    prompt: int
    total: int
    most: int


class Settlement:
    """What is to become of a reservation.

    Attributes:
        reservation: The reservation.
        account: The call's.
        tokens: What the call took; 0 gives everything back but the request; None leaves all of it spent.
        usage: What the provider told of it, if it told all.
    """

    def __init__(
        self, exchange: Exchange, reservation: Reservation, tokens: int | None, usage: Usage | None = None
    ) -> None:
        self.reservation = reservation
        self.account = exchange.account
        self.tokens = tokens
        self._exchange = exchange
        self.usage = usage

    def settled(self, forgiven: int) -> None:
        """Enter into the account that the reservation has been settled at ``tokens``."""
        account, tokens = self.account, self.tokens or 0
        account.forgiven = forgiven
        account.charged = tokens
        account.outcome = _SETTLED if tokens else _REFUNDED
        if self.usage is not None:
            account.usage_told = True
            account.prompt = self.usage.prompt
            self._exchange.learn(self.usage)

    def keep(self) -> None:
        """Leave all of it spent, whatever else was meant to become of it."""
        self.reservation.close()
        self.account.charged = self.account.estimate
        self.account.outcome = _KEPT


class End:
    """How a call ended.

    Attributes:
        settlement: What to do with the reservation; None if that has been said before.
        rest: Bytes still to be passed on to the caller.
        answer: What to answer instead, if nothing has been passed on yet.
    """

    def __init__(
        self, settlement: Settlement | None = None, rest: bytes = b"", answer: Answer | None = None
    ) -> None:
        self.settlement = settlement
        self.rest = rest
        self.answer = answer


class Terms:
    """What is the same for all exchanges.

    Attributes:
        credentials: Header fields that authenticate us to the provider.
        estimator: Estimates calls, and learns from them.
        ask_for_usage: Whether to ask for a stream's usage where the caller did not.
        jitter: Returns a number from 0 to 1 for each refusal.
        lines: The fields of ours that a request in lines ends its head with.
    """

    def __init__(
        self,
        credentials: Headers,
        estimator: Estimator,
        ask_for_usage: bool = True,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self.credentials = credentials
        self.estimator = estimator
        self.ask_for_usage = ask_for_usage
        self.jitter = jitter
        ours = [(b"accept-encoding", b"identity"), *credentials, refusal.JSON]
        self.lines = b"".join([b"%b: %b\r\n" % field for field in ours])

    def estimate(self, request: ChatRequest, team: str | None, user: str) -> Estimate:
        """Return what a request of somebody's is expected to take."""
        return self.estimator.estimate(
            request.model,
            team,
            user,
            text_bytes=request.text_bytes,
            text_256ths=request.text_256ths,
            extra_tokens=request.extra_tokens,
            choices=request.choices,
            output_cap=request.output_cap,
        )


class Exchange:
    """One call for a chat completion.

    Args:
        terms: What is the same for all calls.
        request_id: What the call is known by.

    Attributes:
        account: What became of the call so far.
        told: What the provider's head told, as long as something is to be done about its limits: they are others
            than those that are known, or they cannot be used, or the call was refused.
        lowering: What buckets have to be lowered by because the provider told that less remains; None for nothing.
        refused_upstream: Whether the provider's answer is a 429.
        refusal: Its body then, of which this much has come.
        is_outsize: Whether the provider may count the call for more than its limit holds.
    """

    def __init__(self, terms: Terms, request_id: str) -> None:
        self.account = Account(request_id)
        self._terms = terms
        self._body: bytes
        self._request: ChatRequest
        self._identity: Identity
        self._estimate: Estimate
        self._asked: Asked
        self._in_lines = False
        self._reservation: Reservation | None = None
        self._reader: Any = None  # a Reader
        self._decoder: Decoder | None = None
        self._refused = False
        self._bytes_left = _UNKNOWN
        self._stream = False
        self.told: Told | None = None
        self.lowering: tuple[int, ...] | None = None
        self.refusal = b""
        self.refused_upstream = False
        self.is_outsize = False

    @property
    def model(self) -> str:
        """Which model was asked."""
        return self._request.model

    @property
    def reservation(self) -> Reservation | None:
        """What is neither settled nor kept yet."""
        return self._reservation

    @property
    def stream(self) -> bool:
        """Whether the caller asked for a stream."""
        return self._stream

    def begin(self, headers: Headers | Fields, body: bytes) -> Ask | Answer:
        """Read a request; return what to reserve for it, or the answer if it cannot be one.

        Where the fields stand in the bytes of a connection, what is to be passed on is put in lines too.
        """
        try:
            asked = self._asked = Asked(headers)
            self._identity = self.account.identity = asked.identity()
            if asked.encoded:
                return refusal.problem(
                    415, "a body with a content-encoding is not read; send it plain", "invalid_request_error",
                    "unsupported_content_encoding", "content-encoding",
                )  # fmt: skip
            request = self._request = read_chat(body)
        except InvalidValue as error:
            return refusal.error_answer(error)
        self._body = body
        self._in_lines = isinstance(headers, Fields)
        model = request.model
        prompt, total, most = self._estimate = self._terms.estimate(
            request, self._identity.team, self._identity.user
        )
        self._stream = request.stream
        self.account.model, self.account.stream = model, self._stream
        self.account.estimate = total
        return tuple.__new__(Ask, (self._identity, model, prompt, total, most))  # PERF: half of what its own takes

    def reserved(self, reserved: Reservation | Refusal) -> UpstreamRequest | Answer:
        """Take in what came of reserving; return the request to forward, or the refusal."""
        if isinstance(reserved, Refusal):
            self.account.refused_by = reserved.binding
            return refuse(reserved, self._terms.jitter())
        self._reservation = reserved
        self.is_outsize = self._estimate.most > reserved.plan.largest
        if reserved.plan.tokens_room is not None:
            request = self._request
            reserved.expect(least_counted(request.text_bytes, request.choices, request.output_cap))
        self.account.admitted = True
        body = self._request.body_with_usage() if self._adds_usage() else self._body
        terms, request_id = self._terms, self.account.request_id
        if self._in_lines:
            block = self._asked.forwarded_block(terms.lines, request_id)
            return UpstreamRequest("POST", CHAT_PATH, [], body, self._stream, block)
        headers = self._asked.forwarded(terms.credentials, request_id)
        return UpstreamRequest("POST", CHAT_PATH, [*headers, refusal.JSON], body, self._stream)

    def _adds_usage(self) -> bool:
        return self._stream and self._terms.ask_for_usage and not self._request.asks_for_usage

    def answered(self, status: int, headers: Headers | Fields) -> Head:
        """Take in the head of the provider's answer; return the head to pass on."""
        self.account.upstream_status = status
        self._refused = status >= 300  # a redirect has run no model either
        told = Told(headers)
        self._bytes_left = told.length
        if told.encoding is not None:
            self._decoder = decoder_for(told.encoding)
        decoded = self._decoder is not None
        events = told.events and (decoded or told.encoding is None or told.encoding == b"identity")
        self._reader = EventStream(swallow_usage=self._adds_usage()) if events else JsonAnswer()
        reservation = self._reservation
        self.refused_upstream = status == 429
        if reservation is not None and (status < 300 or self.refused_upstream):
            self._weigh(told, reservation.plan, reservation)
        if not self._in_lines:
            passed = told.returned(events or decoded, decoded)
            return Head(status, passed if reservation is None else passed + reservation.limit_headers())
        limits = b"" if reservation is None else reservation.limit_lines()
        block = told.returned_block(events or decoded, decoded, limits)
        return Head(status, [], block, told.typed, told.measured)

    def _weigh(self, told: Told, plan: Plan, reservation: Reservation) -> None:
        """See what the provider tells of its own limits."""
        if told.usable and plan.mirrors:
            self.lowering = reservation.lowering(told.tokens_left, told.requests_left, told.in_windows)
        if (
            self.refused_upstream
            or not told.usable
            or (told.tokens_limit > 0 and told.tokens_limit != plan.limit_at(plan.tokens_at))
            or (told.requests_limit > 0 and told.requests_limit != plan.limit_at(plan.requests_at))
        ):
            self.told = told

    def feed(self, chunk: bytes) -> bytes:
        """Take in a piece of the provider's body; return what to pass on, which may be nothing.

        Raises:
            UpstreamError: The piece cannot be decoded.
        """
        if self._bytes_left != _UNKNOWN:
            self._bytes_left = max(0, self._bytes_left - len(chunk))
        if self._decoder is not None:
            chunk = self._decoder.decode(chunk)
        if self.refused_upstream and len(self.refusal) < MAX_REFUSAL_BYTES:
            self.refusal += chunk
        return self._reader.feed(chunk) if self._reader is not None else chunk

    @property
    def complete(self) -> bool:
        """Whether all bytes that the provider announced have come: then nothing is to be waited for."""
        return self._bytes_left == 0

    def finish(self) -> End:
        """The provider's answer has come to its end.

        Raises:
            UpstreamError: It has not: it was compressed, and more must have followed.
        """
        if self._decoder is not None:
            self._decoder.finish()
        rest = self._reader.rest() if self._reader is not None else b""
        return End(self._settlement(True, False), rest)

    def abort(self, error: TokenGuardError | None = None) -> End:
        """The call broke off.

        Args:
            error: What failed; None if the caller went away.
        """
        never_sent = isinstance(error, UpstreamError) and not error.sent
        settlement = self._settlement(False, never_sent)
        if settlement is not None and self.account.failure is None:
            if error is not None:
                self.account.failure = str(error)
            elif settlement.usage is None:  # or the caller has all of it, and did not wait for the end's end
                self.account.failure = "the caller went away"
        if error is None or self._reader is not None:
            return End(settlement)
        return End(settlement, answer=refusal.error_answer(error))

    def _settlement(self, ended: bool, refund: bool) -> Settlement | None:
        reservation, self._reservation = self._reservation, None
        if reservation is None:
            return None
        if refund or self._refused:
            reservation.unsent = refund
            return Settlement(self, reservation, 0)
        if self._reader is None:
            return Settlement(self, reservation, None)
        if usage := self._reader.final_usage(ended):
            return Settlement(self, reservation, usage.total, usage)
        if streamed := self._reader.streamed_tokens:
            told = self._reader.usage or Usage(self._estimate.prompt, 0, 0)
            return Settlement(self, reservation, max(told.total, told.prompt + streamed))
        return Settlement(self, reservation, None)

    def learn(self, usage: Usage) -> None:
        """Take in what the estimate should have been."""
        request = self._request
        self._terms.estimator.learn(
            request.model,
            self._identity.team,
            self._identity.user,
            text_256ths=0 if request.attachments else request.text_256ths,
            prompt_tokens=usage.prompt - request.extra_tokens,
            choices=request.choices,
            output_tokens=usage.completion,
        )


MAX_PIECE_BYTES = 2**24
"""The most that one piece of a compressed answer may come to; no text shrinks its 64 kB from more."""
_GZIP = b"\x1f"
"""How a member of a gzip stream begins."""


class Decoder:
    """Undoes a compression that the provider applied though we asked for none.

    Args:
        gzip: Whether it is gzip, of one or several members; else deflate, with zlib's header as the standard says
            or without it as some send it.
    """

    def __init__(self, *, gzip: bool) -> None:
        self._head = b""
        self._empty = True
        self._window_bits = 16 + zlib.MAX_WBITS if gzip else 0
        self._zlib = zlib.decompressobj(self._window_bits) if gzip else None

    def decode(self, chunk: bytes) -> bytes:
        """Return what ``chunk`` adds to the plain text.

        Raises:
            UpstreamError: It is not what it says it is.
        """
        self._empty = self._empty and not chunk
        if self._zlib is None:
            chunk = self._head = self._head + chunk
            if len(chunk) < 2:
                return b""
            zlib_header = chunk[0] & 15 == 8 and int.from_bytes(chunk[:2]) % 31 == 0
            self._window_bits = zlib.MAX_WBITS if zlib_header else -zlib.MAX_WBITS
            self._zlib = zlib.decompressobj(self._window_bits)
        plain = []
        while chunk:
            try:
                plain.append(self._zlib.decompress(chunk, MAX_PIECE_BYTES))
            except zlib.error as error:
                raise UpstreamError(f"the provider's compressed answer is damaged: {error}", sent=True) from None
            if self._zlib.unconsumed_tail:
                raise UpstreamError("the provider's compressed answer blows up to too much", sent=True)
            chunk = self._zlib.unused_data
            if not chunk.startswith(_GZIP):
                break  # nothing, or padding behind the end
            self._zlib = zlib.decompressobj(self._window_bits)
        return b"".join(plain)

    def finish(self) -> None:
        """Check that nothing is missing.

        Raises:
            UpstreamError: Something is.
        """
        if not self._empty and (self._zlib is None or not self._zlib.eof):
            raise UpstreamError("the provider's compressed answer ended too early", sent=True)


def decoder_for(encoding: bytes) -> Decoder | None:
    """Return what decodes a content-encoding; None for none, and for one that is passed on as it is."""
    if encoding in (b"gzip", b"x-gzip"):
        return Decoder(gzip=True)
    return Decoder(gzip=False) if encoding == b"deflate" else None
