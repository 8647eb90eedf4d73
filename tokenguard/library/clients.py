"""HTTP clients that guard the chat completions they are asked to send, in the process that sends them.

What the proxy does between two connections, these do between a program and httpx: the exchange is the same, and so
are estimates, settlement and refusals. The request travels as the program made it, with its own credentials.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any

import httpx

from tokenguard import refusal
from tokenguard._heads import IDENTITY_HEADERS, REQUEST_ID
from tokenguard.api.call import Call, CallSoon, answer_to
from tokenguard.engine import Engine
from tokenguard.errors import TokenGuardError, UpstreamError
from tokenguard.model import Answer, Headers, UpstreamRequest
from tokenguard.providers.openai import CHAT_PATH, read_chat
from tokenguard.upstream.httpx_hop import mapped, mapped_to_open
from tokenguard.wiring import House

_UNCHARGED = ("GET", "HEAD", "OPTIONS", "DELETE")
"""Methods that run no model, whatever they are used upon."""


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

    def estimate(self, body: bytes, team: str | None, user: str) -> int:
        """Return how many tokens a request is expected to take.

        Raises:
            InvalidRequest: The body is none.
        """
        return self._house.terms.estimate(read_chat(body), team, user).total

    def close(self) -> None:
        """End what goes on beside the calls."""
        if self._house.provider_limits is not None:
            self._house.provider_limits.stop()


class _Passage:
    """One request on its way through a client.

    Args:
        call: Its call.
        request: The request, whose body has been read.
        who: The header fields that say who calls, unless it says so itself.
    """

    def __init__(self, call: Call, request: httpx.Request, who: Mapping[bytes, bytes]) -> None:
        self.call = call
        self.request = request
        own = [(name.lower(), value) for name, value in request.headers.raw]
        said = {name for name, _ in own if name in IDENTITY_HEADERS}
        self.headers: Headers = [*own, *((name, value) for name, value in who.items() if name not in said)]

    def forwarded(self, forward: UpstreamRequest) -> httpx.Request:
        """Return the request as it travels: without what says who calls, and so that its usage can be read."""
        request = self.request
        headers = request.headers.copy()
        for name in (*IDENTITY_HEADERS, b"content-length"):
            headers.pop(name.decode(), None)
        headers["accept-encoding"] = "identity"
        return httpx.Request(
            request.method, request.url, headers=headers, content=forward.body, extensions=request.extensions
        )

    def answered(self, response: httpx.Response) -> httpx.Response:
        """Take in the head of the provider's answer; return the response with the head that the program sees."""
        if response.is_closed:
            response = _unread(response)
        theirs = response.headers.get(REQUEST_ID.decode())
        told = [(name.lower(), value) for name, value in response.headers.raw]
        passed = self.call.answered(response.status_code, told).headers
        response.headers = httpx.Headers(passed)
        if theirs is not None:
            response.headers[REQUEST_ID.decode()] = theirs  # by which the provider can be asked about it
        return response


def _unread(response: httpx.Response) -> httpx.Response:
    """Return a response that a transport has read in advance, as one that is still to be read."""
    fields = [(name, value) for name, value in response.headers.raw if name.lower() != b"content-encoding"]
    return httpx.Response(
        response.status_code,
        headers=fields,
        stream=httpx.ByteStream(response.content),
        request=response.request,
        extensions=response.extensions,
        history=response.history,
    )


def _is_guarded(request: httpx.Request) -> bool:
    return request.method == "POST" and request.url.path.endswith(CHAT_PATH)


def _refused_path(request: httpx.Request) -> Answer | None:
    """Return the answer to what would get around the budgets: other calls than those that can be guarded."""
    if request.method in _UNCHARGED:
        return None
    return refusal.problem(
        404,
        f"{request.method} {request.url.path} is not guarded: TokenGuard guards POST …{CHAT_PATH} only. Use "
        "another client for what is not to be charged",
        "invalid_request_error",
        "unknown_url",
    )


def _response(answer: Answer, request: httpx.Request) -> httpx.Response:
    return httpx.Response(answer.status, headers=answer.headers, content=answer.body, request=request)


def _request_id() -> str:
    return os.urandom(16).hex()


class GuardedClient(httpx.Client):
    """An ``httpx.Client`` that guards every chat completion.

    Args:
        guards: What guards them.
        who: The header fields that say who calls.
        options: What ``httpx.Client`` takes.
    """

    def __init__(self, guards: Guards, who: Mapping[bytes, bytes], **options: Any) -> None:  # noqa: ANN401 - httpx's own
        super().__init__(**options)
        self._guard = guards.guard
        self._who = who

    def send(self, request: httpx.Request, *, stream: bool = False, **options: Any) -> httpx.Response:  # noqa: ANN401 - likewise
        """Guard a request and send it; a refusal is a response."""
        if not _is_guarded(request):
            refused = _refused_path(request)
            return _response(refused, request) if refused else super().send(request, stream=stream, **options)
        call = Call(self._guard, _request_id())
        try:
            response = self._send(call, request, options)
        except BaseException:
            call.over()
            raise
        if not stream:
            try:
                response.read()
            except BaseException:
                response.close()
                raise
        return response

    def _send(self, call: Call, request: httpx.Request, options: Mapping[str, Any]) -> httpx.Response:
        request.read()
        passage = _Passage(call, request, self._who)
        try:
            forward = call.begin(passage.headers, request.content)
        except TokenGuardError as error:
            forward = answer_to(error, call.account.request_id)
        if isinstance(forward, Answer):
            call.over()
            return _response(forward, request)
        try:
            with mapped_to_open():
                response = super().send(passage.forwarded(forward), stream=True, **options)
        except UpstreamError as error:
            call.failed(error)
            raise error.__cause__ or error from None
        response = passage.answered(response)
        response.stream = _GuardedStream(call, response.stream)  # type: ignore[arg-type]  # of a client: a sync one
        return response


class _GuardedStream(httpx.SyncByteStream):
    """The body of an answer, read on the way."""

    def __init__(self, call: Call, stream: httpx.SyncByteStream) -> None:
        self._call = call
        self._stream = stream

    def __iter__(self) -> Iterator[bytes]:
        call = self._call
        try:
            with mapped():
                for chunk in self._stream:
                    if passed := call.feed(chunk):
                        yield passed
            if rest := call.finish():
                yield rest
        except UpstreamError as error:
            call.failed(error)
            raise _unreadable(error) from None

    def close(self) -> None:
        self._call.over()
        self._stream.close()


class AsyncGuardedClient(httpx.AsyncClient):
    """An ``httpx.AsyncClient`` that guards every chat completion.

    Args:
        guards: What guards them.
        who: The header fields that say who calls.
        options: What ``httpx.AsyncClient`` takes.
    """

    def __init__(self, guards: Guards, who: Mapping[bytes, bytes], **options: Any) -> None:  # noqa: ANN401 - httpx's own
        super().__init__(**options)
        self._guard = guards.guard
        self._who = who

    async def send(self, request: httpx.Request, *, stream: bool = False, **options: Any) -> httpx.Response:  # noqa: ANN401 - likewise
        """Guard a request and send it; a refusal is a response."""
        if not _is_guarded(request):
            refused = _refused_path(request)
            if refused:
                return _response(refused, request)
            return await super().send(request, stream=stream, **options)
        call = CallSoon(self._guard, _request_id())
        try:
            response = await self._send(call, request, options)
        except BaseException:
            call.over()
            await _settled(call)
            raise
        if not stream:
            try:
                await response.aread()
            except BaseException:
                await response.aclose()
                raise
        return response

    async def _send(self, call: CallSoon, request: httpx.Request, options: Mapping[str, Any]) -> httpx.Response:
        await request.aread()
        passage = _Passage(call, request, self._who)
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
            return _response(forward, request)
        try:
            with mapped_to_open():
                response = await super().send(passage.forwarded(forward), stream=True, **options)
        except UpstreamError as error:
            call.failed(error)
            raise error.__cause__ or error from None
        response = passage.answered(response)
        response.stream = _AsyncGuardedStream(call, response.stream)  # type: ignore[arg-type]  # of an async client
        return response


class _AsyncGuardedStream(httpx.AsyncByteStream):
    """The body of an answer, read on the way."""

    def __init__(self, call: CallSoon, stream: httpx.AsyncByteStream) -> None:
        self._call = call
        self._stream = stream

    async def __aiter__(self) -> AsyncIterator[bytes]:
        call = self._call
        try:
            with mapped():
                async for chunk in self._stream:
                    if passed := call.feed(chunk):
                        await _settled(call)
                        yield passed
            rest = call.finish()
            await _settled(call)
            if rest:
                yield rest
        except UpstreamError as error:
            call.failed(error)
            raise _unreadable(error) from None

    async def aclose(self) -> None:
        self._call.over()
        await _settled(self._call)
        await self._stream.aclose()


async def _settled(call: CallSoon) -> None:
    """Wait until the buckets are up to date: whoever has the answer may look."""
    if call.settling is not None:
        await call.settling


def _unreadable(error: UpstreamError) -> Exception:
    """Return what httpx raised, or what it would raise for an answer that cannot be read."""
    cause = error.__cause__
    return cause if isinstance(cause, httpx.HTTPError) else httpx.DecodingError(str(error))
