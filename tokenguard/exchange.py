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
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from tokenguard import refusal
from tokenguard.account import Account, Outcome
from tokenguard.errors import InvalidRequest, InvalidValue, TokenGuardError, UpstreamError
from tokenguard.estimate import Estimate, Estimator
from tokenguard.limiter import Reservation
from tokenguard.model import Answer, Decision, Head, Headers, Identity, UpstreamRequest, Usage, checked_name
from tokenguard.providers.openai import CHAT_PATH, ChatRequest, EventStream, JsonAnswer, read_chat

IDENTITY_HEADERS = {
    b"x-user-id": "user",
    b"x-team-id": "team",
    b"x-role": "role",
    b"x-llm-rolegroup": "rolegroup",
}

REQUEST_ID = b"x-request-id"
"""The header field that one call is known by, from the caller to the provider and back."""

_HOP_BY_HOP = frozenset(
    (b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"proxy-connection", b"te",
     b"trailer", b"transfer-encoding", b"upgrade")
)  # fmt: skip
_NOT_TO_UPSTREAM = _HOP_BY_HOP | frozenset(
    (
        # what the hop to the provider sets itself
        *(b"host", b"content-length", b"content-type", b"accept-encoding", b"expect"),
        # the caller's credentials, and the choice of the account that pays
        *(b"authorization", b"cookie", b"api-key", b"x-api-key", b"openai-organization", b"openai-project"),
        *(b"x-goog-api-key", b"ocp-apim-subscription-key"),
        # what could turn the request into another one
        *(b"x-http-method-override", b"x-http-method", b"x-method-override"),
        # who calls, and from where: nobody else's business
        *IDENTITY_HEADERS,
        REQUEST_ID,
        *(b"forwarded", b"via", b"x-real-ip"),
    )
)
_NOT_TO_CALLER = _HOP_BY_HOP | frozenset(
    # what speaks of the provider's host, where the caller sees ours
    (b"date", b"server", b"location", b"set-cookie", b"alt-svc", b"strict-transport-security")
)


class Ask(NamedTuple):
    """What to reserve: the arguments of ``Limiter.reserve``."""

    identity: Identity
    model: str
    prompt: int
    total: int


@dataclass(frozen=True, slots=True)
class Settlement:
    """What is to become of a reservation.

    Attributes:
        reservation: The reservation.
        account: The call's.
        tokens: What the call took; 0 gives everything back but the request; None leaves all of it spent.
        learn: Takes in what the estimate should have been.
    """

    reservation: Reservation
    account: Account
    tokens: int | None
    learn: Callable[[], None] | None = None

    def settled(self, forgiven: int) -> None:
        """Enter into the account that the reservation has been settled at ``tokens``."""
        tokens = self.tokens or 0
        self.account.forgiven = forgiven
        self.account.charged = tokens
        self.account.outcome = Outcome.SETTLED if tokens else Outcome.REFUNDED
        if self.learn is not None:
            self.account.usage_told = True
            self.learn()

    def keep(self) -> None:
        """Leave all of it spent, whatever else was meant to become of it."""
        self.reservation.close()
        self.account.charged = self.account.estimate
        self.account.outcome = Outcome.KEPT


class End(NamedTuple):
    """How a call ended.

    Attributes:
        settlement: What to do with the reservation; None if that has been said before.
        rest: Bytes still to be passed on to the caller.
        answer: What to answer instead, if nothing has been passed on yet.
    """

    settlement: Settlement | None = None
    rest: bytes = b""
    answer: Answer | None = None


@dataclass(frozen=True, slots=True)
class Terms:
    """What is the same for all exchanges.

    Attributes:
        credentials: Header fields that authenticate us to the provider.
        estimator: Estimates calls, and learns from them.
        ask_for_usage: Whether to ask for a stream's usage where the caller did not.
        jitter: Returns a number from 0 to 1 for each refusal.
    """

    credentials: Headers
    estimator: Estimator
    ask_for_usage: bool = True
    jitter: Callable[[], float] = random.random


class Exchange:
    """One call for a chat completion.

    Args:
        terms: What is the same for all calls.
        request_id: What the call is known by.

    Attributes:
        account: What became of the call so far.
    """

    def __init__(self, terms: Terms, request_id: str) -> None:
        self.account = Account(request_id)
        self._terms = terms
        self._body: bytes
        self._request: ChatRequest
        self._identity: Identity
        self._estimate: Estimate
        self._forwarded: Headers
        self._reservation: Reservation | None = None
        self._reader: JsonAnswer | EventStream | None = None
        self._decoder: Decoder | None = None
        self._refused = False
        self._bytes_left: int | None = None

    @property
    def stream(self) -> bool:
        """Whether the caller asked for a stream."""
        return self._request.stream

    def begin(self, headers: Headers, body: bytes) -> Ask | Answer:
        """Read a request; return what to reserve for it, or the answer if it cannot be one."""
        try:
            self._identity = self.account.identity = read_identity(headers)
            if any(name == b"content-encoding" for name, _ in headers):
                return refusal.problem(
                    415, "a body with a content-encoding is not read; send it plain", "invalid_request_error",
                    "unsupported_content_encoding", "content-encoding",
                )  # fmt: skip
            request = self._request = read_chat(body)
        except InvalidValue as error:
            return refusal.error_answer(error)
        self._body = body
        self._forwarded = forwarded_headers(headers, self._terms.credentials, self.account.request_id)
        self._estimate = self._terms.estimator.estimate(
            request.model,
            self._identity.user,
            text_bytes=request.text_bytes,
            extra_tokens=request.extra_tokens,
            choices=request.choices,
            output_cap=request.output_cap,
        )
        self.account.model, self.account.stream = request.model, request.stream
        self.account.estimate = self._estimate.total
        return Ask(self._identity, request.model, *self._estimate)

    def reserved(self, reserved: Reservation | Decision) -> UpstreamRequest | Answer:
        """Take in what came of reserving; return the request to forward, or the refusal."""
        if isinstance(reserved, Decision):
            self.account.refused_by = reserved.binding and reserved.binding.name
            return refusal.refuse(reserved, self._terms.jitter())
        self._reservation = reserved
        self.account.admitted = True
        body = self._request.body_with_usage() if self._adds_usage else self._body
        headers = [*self._forwarded, (b"content-type", b"application/json")]
        return UpstreamRequest("POST", CHAT_PATH, headers, body, stream=self._request.stream)

    @property
    def _adds_usage(self) -> bool:
        return self._terms.ask_for_usage and self._request.stream and not self._request.asks_for_usage

    def answered(self, status: int, headers: Headers) -> Head:
        """Take in the head of the provider's answer; return the head to pass on."""
        self.account.upstream_status = status
        fields = dict(headers)
        encoding = fields.get(b"content-encoding", b"identity").strip().lower()
        self._refused = status >= 300  # a redirect has run no model either
        if (length := fields.get(b"content-length", b"")).isdigit():
            self._bytes_left = int(length)
        self._decoder = decoder_for(encoding)
        readable = encoding == b"identity" or self._decoder is not None
        if readable and fields.get(b"content-type", b"").lower().startswith(b"text/event-stream"):
            self._reader = EventStream(swallow_usage=self._adds_usage)
        else:
            self._reader = JsonAnswer()
        changed = self._decoder is not None or isinstance(self._reader, EventStream)
        passed = returned_headers(headers, drop_length=changed, drop_encoding=self._decoder is not None)
        if self._reservation is not None:
            passed += refusal.limit_headers(self._reservation.decision)
        return Head(status, passed)

    def feed(self, chunk: bytes) -> bytes:
        """Take in a piece of the provider's body; return what to pass on, which may be nothing.

        Raises:
            UpstreamError: The piece cannot be decoded.
        """
        if self._bytes_left is not None:
            self._bytes_left -= len(chunk)
        if self._decoder is not None:
            chunk = self._decoder.decode(chunk)
        return self._reader.feed(chunk) if self._reader is not None else chunk

    @property
    def complete(self) -> bool:
        """Whether all bytes that the provider announced have come: then nothing is to be waited for."""
        return self._bytes_left is not None and self._bytes_left <= 0

    def finish(self) -> End:
        """The provider's answer has come to its end.

        Raises:
            UpstreamError: It has not: it was compressed, and more must have followed.
        """
        if self._decoder is not None:
            self._decoder.finish()
        rest = self._reader.rest() if self._reader is not None else b""
        return End(self._settlement(ended=True), rest)

    def abort(self, error: TokenGuardError | None = None) -> End:
        """The call broke off.

        Args:
            error: What failed; None if the caller went away.
        """
        never_sent = isinstance(error, UpstreamError) and not error.sent
        settlement = self._settlement(refund=never_sent)
        if settlement is not None and self.account.failure is None:
            self.account.failure = "the caller went away" if error is None else str(error)
        if error is None or self._reader is not None:
            return End(settlement)
        return End(settlement, answer=refusal.error_answer(error))

    def _settlement(self, *, ended: bool = False, refund: bool = False) -> Settlement | None:
        reservation, self._reservation = self._reservation, None
        if reservation is None:
            return None
        if refund or self._refused:
            return Settlement(reservation, self.account, 0)
        if self._reader is None:
            return Settlement(reservation, self.account, None)
        if usage := self._reader.final_usage(ended=ended):
            return Settlement(reservation, self.account, usage.total, partial(self._learn, usage))
        if streamed := self._reader.streamed_tokens:
            told = self._reader.usage or Usage(self._estimate.prompt, 0, 0)
            return Settlement(reservation, self.account, max(told.total, told.prompt + streamed))
        return Settlement(reservation, self.account, None)

    def _learn(self, usage: Usage) -> None:
        request = self._request
        self._terms.estimator.learn(
            request.model,
            self._identity.user,
            text_bytes=0 if request.attachments else request.text_bytes,
            prompt_tokens=usage.prompt - request.extra_tokens,
            choices=request.choices,
            output_tokens=usage.completion,
        )


def read_identity(headers: Headers) -> Identity:
    """Return who calls.

    Raises:
        InvalidRequest: A field is malformed or given twice, or the user is missing.
    """
    found: dict[str, str] = {}
    for name, value in headers:
        if (part := IDENTITY_HEADERS.get(name)) is None:
            continue
        shown = name.decode()
        if part in found:
            raise InvalidRequest(shown, f"header {shown} is given more than once")
        try:
            found[part] = checked_name(shown, value.strip(b" \t").decode())
        except UnicodeDecodeError:
            raise InvalidRequest(shown, f"header {shown} must be UTF-8, got {value[:80]!r}") from None
    if "user" not in found:
        raise InvalidRequest("x-user-id", "header x-user-id is required: it names the user who calls")
    return Identity(**found)


def forwarded_headers(headers: Headers, credentials: Headers, request_id: str) -> Headers:
    """Return what travels to the provider: the caller's fields but those between us two, and our credentials."""
    dropped = _NOT_TO_UPSTREAM | _listed_in_connection(headers)
    kept = [
        (name, value)
        for name, value in headers
        if name not in dropped and not name.startswith((b"x-forwarded-", b"x-tokenguard-"))
    ]
    return [*kept, (REQUEST_ID, request_id.encode()), (b"accept-encoding", b"identity"), *credentials]


def returned_headers(headers: Headers, *, drop_length: bool, drop_encoding: bool) -> Headers:
    """Return what travels back to the caller; the provider's own limits and id under names of their own."""
    dropped = _NOT_TO_CALLER | _listed_in_connection(headers)
    if drop_length:
        dropped |= {b"content-length"}
    if drop_encoding:
        dropped |= {b"content-encoding"}
    return [
        (b"x-upstream" + name[1:] if name == REQUEST_ID or name.startswith(b"x-ratelimit-") else name, value)
        for name, value in headers
        if name not in dropped
    ]


def _listed_in_connection(headers: Headers) -> frozenset[bytes]:
    listed = (value.lower().split(b",") for name, value in headers if name == b"connection")
    return frozenset(name.strip() for names in listed for name in names)


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
    match encoding:
        case b"gzip" | b"x-gzip":
            return Decoder(gzip=True)
        case b"deflate":
            return Decoder(gzip=False)
    return None
