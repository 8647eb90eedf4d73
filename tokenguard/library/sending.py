"""Guards the chat completions that a client of httpx's kind is asked to send, in the process that sends them.

What the proxy does between two connections is done here between a program and its client: the exchange is the
same, and so are estimates, settlement and refusals. A request travels as the program made it, with its own
credentials.

There is httpx, and there is httpx2, which has the same classes; openai's SDK is built upon either, by its version.
What follows is of neither: ``clients`` and ``clients2`` are what it comes to.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator, Mapping
from types import ModuleType
from typing import Any, ClassVar

from tokenguard import refusal
from tokenguard._heads import IDENTITY_HEADERS, REQUEST_ID
from tokenguard.api.call import Call, CallSoon, answer_to
from tokenguard.engine import Engine
from tokenguard.errors import TokenGuardError, UpstreamError
from tokenguard.estimate import Estimate
from tokenguard.model import Answer, Headers, UpstreamRequest
from tokenguard.providers.openai import CHAT_PATH, read_chat
from tokenguard.upstream.httpx_hop import mapped, mapped_to_open
from tokenguard.wiring import House

_UNCHARGED = ("GET", "HEAD", "OPTIONS", "DELETE")
"""Methods that run no model, whatever they are used upon."""

_ID = REQUEST_ID.decode()


class Guards:
    """What guards the calls of all clients.

    Args:
        engine: What decides.

    Attributes:
        guard: Guards a call.
    """

    def __init__(self, engine: Engine) -> None:
        self._house = House(engine)
        self.guard = self._house.guard
        if self._house.provider_limits is not None:
            self._house.provider_limits.start()

    def estimate(self, body: bytes, team: str | None, user: str) -> tuple[str, Estimate]:
        """Return which model a request asks, and what it is expected to take.

        Raises:
            InvalidRequest: The body is none.
        """
        request = read_chat(body)
        return request.model, self._house.terms.estimate(request, team, user)

    def close(self) -> None:
        """End what goes on beside the calls."""
        if self._house.provider_limits is not None:
            self._house.provider_limits.stop()


class _Passage:
    """One request on its way through a client.

    Args:
        kin: httpx, or its kin.
        call: The request's call.
        request: The request, whose body has been read.
        who: The header fields that say who calls, unless the request says so itself.

    Attributes:
        headers: The request's header fields, with those.
    """

    def __init__(self, kin: ModuleType, call: Call, request: Any, who: Mapping[bytes, bytes]) -> None:  # noqa: ANN401 - kin's
        self._kin = kin
        self._call = call
        self._request = request
        own = [(name.lower(), value) for name, value in request.headers.raw]
        said = {name for name, _ in own if name in IDENTITY_HEADERS}
        self.headers: Headers = [*own, *((name, value) for name, value in who.items() if name not in said)]

    def forwarded(self, forward: UpstreamRequest) -> Any:  # noqa: ANN401 - a request of kin's
        """Return the request as it travels: without what says who calls, and so that its usage can be read."""
        request = self._request
        headers = request.headers.copy()
        for name in (*IDENTITY_HEADERS, b"content-length"):
            headers.pop(name.decode(), None)
        headers["accept-encoding"] = "identity"
        return self._kin.Request(
            request.method, request.url, headers=headers, content=forward.body, extensions=request.extensions
        )

    def answered(self, response: Any) -> Any:  # noqa: ANN401 - a response of kin's
        """Take in the head of the provider's answer; return the response with the head that the program sees."""
        if response.is_closed:
            response = self._unread(response)
        theirs = response.headers.get(_ID)
        told = [(name.lower(), value) for name, value in response.headers.raw]
        response.headers = self._kin.Headers(self._call.answered(response.status_code, told).headers)
        if theirs is not None:
            response.headers[_ID] = theirs  # by which the provider can be asked about it
        return response

    def _unread(self, response: Any) -> Any:  # noqa: ANN401 - likewise
        """Return a response that a transport has read in advance, as one that is still to be read."""
        return self._kin.Response(
            response.status_code,
            headers=[(name, value) for name, value in response.headers.raw if name.lower() != b"content-encoding"],
            stream=self._kin.ByteStream(response.content),
            request=response.request,
            extensions=response.extensions,
            history=response.history,
        )

    def response(self, answer: Answer) -> Any:  # noqa: ANN401 - likewise
        """Return an answer of ours as a response."""
        return _response(self._kin, answer, self._request)

    def unreadable(self, error: UpstreamError) -> Exception:
        """Return what was raised, or what would be for an answer that cannot be read."""
        cause = error.__cause__
        unreadable: Exception = self._kin.DecodingError(str(error))
        return cause if isinstance(cause, self._kin.HTTPError) else unreadable


def _response(kin: ModuleType, answer: Answer, request: Any) -> Any:  # noqa: ANN401 - kin's
    return kin.Response(answer.status, headers=answer.headers, content=answer.body, request=request)


def _is_guarded(request: Any) -> bool:  # noqa: ANN401 - kin's
    return bool(request.method == "POST" and request.url.path.endswith(CHAT_PATH))


def _around(request: Any) -> Answer | None:  # noqa: ANN401 - kin's
    """Return the answer to what would get around the budgets: another call than those that can be guarded."""
    if request.method in _UNCHARGED:
        return None
    return refusal.problem(
        404,
        f"{request.method} {request.url.path} is not guarded: TokenGuard guards POST …{CHAT_PATH} only. Use "
        "another client for what is not to be charged",
        "invalid_request_error",
        "unknown_url",
    )


def _new_id() -> str:
    return os.urandom(16).hex()


class Sending:
    """Makes a client guard every chat completion.

    Args:
        guards: What guards them.
        who: The header fields that say who calls.
        options: What the client takes.
    """

    kin: ClassVar[ModuleType]
    body: ClassVar[type[GuardedBody]]

    def __init__(self, guards: Guards, who: Mapping[bytes, bytes], **options: Any) -> None:  # noqa: ANN401 - kin's
        super().__init__(**options)
        self._guard = guards.guard
        self._who = who

    def send(self, request: Any, *, stream: bool = False, **options: Any) -> Any:  # noqa: ANN401 - kin's
        """Guard a request and send it; a refusal is a response."""
        if not _is_guarded(request):
            refused = _around(request)
            if refused is not None:
                return _response(self.kin, refused, request)
            return super().send(request, stream=stream, **options)  # type: ignore[misc]  # a client's
        call = Call(self._guard, _new_id())
        try:
            response = self._passed(call, request, options)
            if not stream:
                response.read()
        except BaseException:
            call.over()
            raise
        return response

    def _passed(self, call: Call, request: Any, options: Mapping[str, Any]) -> Any:  # noqa: ANN401 - kin's
        request.read()
        passage = _Passage(self.kin, call, request, self._who)
        try:
            forward = call.begin(passage.headers, request.content)
        except TokenGuardError as error:
            forward = answer_to(error, call.account.request_id)
        if isinstance(forward, Answer):
            call.over()
            return passage.response(forward)
        try:
            with mapped_to_open(self.kin):
                response = super().send(passage.forwarded(forward), stream=True, **options)  # type: ignore[misc]
        except UpstreamError as error:
            call.failed(error)
            raise error.__cause__ or error from None
        response = passage.answered(response)
        response.stream = self.body(self.kin, passage, call, response.stream)
        return response


class GuardedBody:
    """The body of an answer, read on the way."""

    def __init__(self, kin: ModuleType, passage: _Passage, call: Call, stream: Any) -> None:  # noqa: ANN401 - kin's
        self._kin = kin
        self._passage = passage
        self._call = call
        self._stream = stream

    def __iter__(self) -> Iterator[bytes]:
        call = self._call
        try:
            with mapped(self._kin):
                for chunk in self._stream:
                    if passed := call.feed(chunk):
                        yield passed
            if rest := call.finish():
                yield rest
        except UpstreamError as error:
            call.failed(error)
            raise self._passage.unreadable(error) from None

    def close(self) -> None:
        """Settle what is not settled, and give the connection back."""
        self._call.over()
        self._stream.close()


class SendingSoon:
    """Makes an asynchronous client guard every chat completion.

    Args:
        guards: What guards them.
        who: The header fields that say who calls.
        options: What the client takes.
    """

    kin: ClassVar[ModuleType]
    body: ClassVar[type[GuardedBodySoon]]

    def __init__(self, guards: Guards, who: Mapping[bytes, bytes], **options: Any) -> None:  # noqa: ANN401 - kin's
        super().__init__(**options)
        self._guard = guards.guard
        self._who = who

    async def send(self, request: Any, *, stream: bool = False, **options: Any) -> Any:  # noqa: ANN401 - kin's
        """Guard a request and send it; a refusal is a response."""
        if not _is_guarded(request):
            refused = _around(request)
            if refused is not None:
                return _response(self.kin, refused, request)
            return await super().send(request, stream=stream, **options)  # type: ignore[misc]  # a client's
        call = CallSoon(self._guard, _new_id())
        try:
            response = await self._passed(call, request, options)
            if not stream:
                await response.aread()
        except BaseException:
            call.over()
            await settled(call)
            raise
        return response

    async def _passed(self, call: CallSoon, request: Any, options: Mapping[str, Any]) -> Any:  # noqa: ANN401 - kin's
        await request.aread()
        passage = _Passage(self.kin, call, request, self._who)
        forward: UpstreamRequest | Answer
        try:
            asked = call.exchange.begin(passage.headers, request.content)
            if isinstance(asked, Answer):
                forward = asked
            else:
                forward = call.reserved(await self._guard.limiter.reserve_soon(*asked))
        except TokenGuardError as error:
            forward = answer_to(error, call.account.request_id)
        if isinstance(forward, Answer):
            call.over()
            return passage.response(forward)
        try:
            with mapped_to_open(self.kin):
                sent = super().send(passage.forwarded(forward), stream=True, **options)  # type: ignore[misc]
                response = await sent
        except UpstreamError as error:
            call.failed(error)
            raise error.__cause__ or error from None
        response = passage.answered(response)
        response.stream = self.body(self.kin, passage, call, response.stream)
        return response


class GuardedBodySoon:
    """The body of an answer, read on the way."""

    def __init__(self, kin: ModuleType, passage: _Passage, call: CallSoon, stream: Any) -> None:  # noqa: ANN401 - kin's
        self._kin = kin
        self._passage = passage
        self._call = call
        self._stream = stream

    async def __aiter__(self) -> AsyncIterator[bytes]:
        call = self._call
        try:
            with mapped(self._kin):
                async for chunk in self._stream:
                    if passed := call.feed(chunk):
                        await settled(call)
                        yield passed
            rest = call.finish()
            await settled(call)
            if rest:
                yield rest
        except UpstreamError as error:
            call.failed(error)
            raise self._passage.unreadable(error) from None

    async def aclose(self) -> None:
        """Settle what is not settled, and give the connection back."""
        self._call.over()
        await settled(self._call)
        await self._stream.aclose()


async def settled(call: CallSoon) -> None:
    """Wait until the buckets are up to date: whoever has the answer may look."""
    if call.settling is not None:
        await call.settling
