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
from contextlib import aclosing
from datetime import timedelta
from types import ModuleType
from typing import Any, ClassVar

from tokenguard import refusal
from tokenguard._heads import IDENTITY_HEADERS, NOT_TO_CALLER, REQUEST_ID
from tokenguard.api.call import Call, CallSoon, Guard, answer_to
from tokenguard.engine import Engine
from tokenguard.errors import TokenGuardError, UpstreamError
from tokenguard.library.call import Desk
from tokenguard.model import Answer, Headers, UpstreamRequest
from tokenguard.providers.openai import CHAT_PATH
from tokenguard.upstream import unusable, usable
from tokenguard.upstream.httpx_hop import broken_off, unanswered
from tokenguard.wiring import House

_UNCHARGED = ("GET", "HEAD", "OPTIONS", "DELETE")
"""Methods that run no model, whatever they are used upon."""

_NAMES = [name.decode() for name in IDENTITY_HEADERS]
_OF_THE_BODY = ("content-length", "transfer-encoding")
_THEIRS = frozenset((*NOT_TO_CALLER, REQUEST_ID))
"""Fields of an answer that a caller of the proxy's does not get: here, they are between provider and program."""


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

    def open(self) -> None:
        """Begin what goes on beside the calls, if it does not yet."""
        if self._house.provider_limits is not None:
            self._house.provider_limits.start()

    def close(self) -> None:
        """End what goes on beside the calls."""
        if self._house.provider_limits is not None:
            self._house.provider_limits.stop()


class _Told:
    """What a call is, where its program is told of all that happens by what is returned and raised.

    Args:
        guard: Guards it.
        desk: Where others may wait for what it gives back.
    """

    def __init__(self, guard: Guard, desk: Desk) -> None:
        super().__init__(guard, _new_id())  # type: ignore[call-arg]  # a call's
        self._desk = desk
        self._forks = desk.forks

    def _blame(self, what: str) -> None:
        """Log nothing."""

    def over(self) -> None:
        """Settle what is not settled, unless another process will; let those ask again who wait."""
        if self._forks == self._desk.forks:
            super().over()  # type: ignore[misc]  # a call's
            self._desk.line.stir()


class _Call(_Told, Call):
    """A call of a program's."""


class _CallSoon(_Told, CallSoon):
    """A call of a program's, with an event loop."""


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
        self._forwarded: Any = None
        own = [(name.lower(), value) for name, value in request.headers.raw]
        said = {name for name, _ in own if name in IDENTITY_HEADERS}
        self.headers: Headers = [*own, *((name, value) for name, value in who.items() if name not in said)]

    def forwarded(self, forward: UpstreamRequest) -> Any:  # noqa: ANN401 - a request of kin's
        """Return the request as it travels: without what says who calls, and so that its usage can be read."""
        request = self._request
        headers = request.headers.copy()
        for name in (*_NAMES, *_OF_THE_BODY):
            headers.pop(name, None)
        headers["accept-encoding"] = "identity"
        self._forwarded = self._kin.Request(
            request.method, request.url, headers=headers, content=forward.body, extensions=request.extensions
        )
        return self._forwarded

    def unanswered(self, error: Exception) -> None:
        """Take in that a client raised something of kin's instead of answering."""
        if isinstance(error, self._kin.HTTPStatusError):  # a hook's, which took no liking to an answer
            self._call.answered(error.response.status_code, _fields(error.response))
        else:
            self._call.failed(unanswered(error, self._kin))

    def answered(self, response: Any) -> Any:  # noqa: ANN401 - a response of kin's
        """Take in the head of the provider's answer; return the response with the head that the program sees."""
        if response.request is self._forwarded:
            response.request = self._request
        if not usable(response.status_code):  # whatever it is, it is the program's, and it tells of no usage
            self._call.failed(unusable(response.status_code))
            return response
        if response.is_closed:
            response = self._unread(response)
        told = _fields(response)
        passed = self._call.answered(response.status_code, told).headers
        response.headers = self._kin.Headers([*passed, *(field for field in told if field[0] in _THEIRS)])
        return response

    def _unread(self, response: Any) -> Any:  # noqa: ANN401 - likewise
        """Return a response that a transport, or a hook, has read in advance as one that is still to be read."""
        unread = self._kin.Response(
            response.status_code,
            headers=[(name, value) for name, value in response.headers.raw if name.lower() != b"content-encoding"],
            stream=self._kin.ByteStream(response.content),
            request=response.request,
            extensions=response.extensions,
            history=response.history,
            default_encoding=response.default_encoding,
        )
        unread.next_request = response.next_request
        return unread

    def response(self, answer: Answer) -> Any:  # noqa: ANN401 - likewise
        """Return an answer of ours as a response."""
        return _response(self._kin, answer, self._request)


def _fields(response: Any) -> Headers:  # noqa: ANN401 - kin's
    return [(name.lower(), value) for name, value in response.headers.raw]


def _response(kin: ModuleType, answer: Answer, request: Any) -> Any:  # noqa: ANN401 - kin's
    response = kin.Response(answer.status, headers=answer.headers, content=answer.body, request=request)
    response.elapsed = timedelta()  # it has not been anywhere
    return response


def _is_guarded(request: Any) -> bool:  # noqa: ANN401 - kin's
    return bool(request.method == "POST" and request.url.path.endswith(CHAT_PATH))


def _around(request: Any) -> Answer | None:  # noqa: ANN401 - kin's
    """Return the answer to what would get around the budgets: another call than those that can be guarded.

    What may pass travels without what says who calls.
    """
    if request.method in _UNCHARGED and "upgrade" not in request.headers:  # to a socket, over which models run too
        for name in _NAMES:
            request.headers.pop(name, None)
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


class _Body:
    """The body of an answer, read on the way.

    Args:
        kin: httpx, or its kin.
        call: The call.
        stream: What the body comes from.
    """

    def __init__(self, kin: ModuleType, call: Call, stream: Any) -> None:  # noqa: ANN401 - kin's
        self._kin = kin
        self._call = call
        self._stream = stream

    @property
    def elapsed(self) -> timedelta | None:
        """How long it took, once it is closed: where httpx2 looks for it."""
        elapsed: timedelta | None = getattr(self._stream, "elapsed", None)
        return elapsed

    def __del__(self) -> None:
        self._call.over()  # nobody closed it


class _Client:
    """What makes a client guard every chat completion.

    Args:
        guards: What guards them.
        desk: What the client needs to be open.
        who: The header fields that say who calls.
        options: What the client takes.
    """

    kin: ClassVar[ModuleType]
    is_closed: bool

    def __init__(self, guards: Guards, desk: Desk, who: Mapping[bytes, bytes], **options: Any) -> None:  # noqa: ANN401 - kin's
        super().__init__(**options)
        self._guard = guards.guard
        self._desk = desk
        self._who = who


class Sending(_Client):
    """What a client for threads does."""

    body: ClassVar[type[GuardedBody]]

    def send(self, request: Any, *, stream: bool = False, **options: Any) -> Any:  # noqa: ANN401 - kin's
        """Guard a request and send it; a refusal is a response."""
        if not _is_guarded(request):
            refused = _around(request)
            if refused is not None:
                return _response(self.kin, refused, request)
        if self.is_closed or not _is_guarded(request):  # what is closed says so, and takes nothing
            return super().send(request, stream=stream, **options)  # type: ignore[misc]  # a client's
        self._desk.check_open()
        call = _Call(self._guard, self._desk)
        try:
            response = self._passed(call, request, options)
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

    def _passed(self, call: _Call, request: Any, options: Mapping[str, Any]) -> Any:  # noqa: ANN401 - kin's
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
            response = super().send(passage.forwarded(forward), stream=True, **options)  # type: ignore[misc]
        except self.kin.HTTPError as error:
            passage.unanswered(error)
            raise
        response = passage.answered(response)
        response.stream = self.body(self.kin, call, response.stream)
        return response


class GuardedBody(_Body):
    """The same, for threads."""

    _call: _Call

    def __iter__(self) -> Iterator[bytes]:
        call = self._call
        try:
            for chunk in self._stream:
                if passed := call.feed(chunk):
                    yield passed
            if rest := call.finish():
                yield rest
        except self._kin.HTTPError as error:
            call.failed(broken_off(error, self._kin))
            raise
        except UpstreamError as error:  # it came, and cannot be decoded
            call.failed(error)
            raise self._kin.DecodingError(str(error)) from error
        finally:
            call.over()

    def close(self) -> None:
        """Settle what is not settled, and give the connection back."""
        try:
            self._call.over()
        finally:
            self._stream.close()


class SendingSoon(_Client):
    """What an asynchronous client does."""

    body: ClassVar[type[GuardedBodySoon]]

    async def send(self, request: Any, *, stream: bool = False, **options: Any) -> Any:  # noqa: ANN401 - kin's
        """Guard a request and send it; a refusal is a response."""
        if not _is_guarded(request):
            refused = _around(request)
            if refused is not None:
                return _response(self.kin, refused, request)
        if self.is_closed or not _is_guarded(request):  # what is closed says so, and takes nothing
            return await super().send(request, stream=stream, **options)  # type: ignore[misc]  # a client's
        self._desk.check_open()
        call = _CallSoon(self._guard, self._desk)
        try:
            response = await self._passed(call, request, options)
        except BaseException:
            call.over()
            await call.settled()
            raise
        if not stream:
            try:
                await response.aread()
            except BaseException:
                await response.aclose()
                raise
        return response

    async def _passed(self, call: _CallSoon, request: Any, options: Mapping[str, Any]) -> Any:  # noqa: ANN401 - kin's
        await request.aread()
        passage = _Passage(self.kin, call, request, self._who)
        try:
            forward = await call.begin_soon(passage.headers, request.content)
        except TokenGuardError as error:
            forward = answer_to(error, call.account.request_id)
        if isinstance(forward, Answer):
            call.over()
            return passage.response(forward)
        try:
            sent = super().send(passage.forwarded(forward), stream=True, **options)  # type: ignore[misc]
            response = await sent
        except self.kin.HTTPError as error:
            passage.unanswered(error)
            raise
        response = passage.answered(response)
        response.stream = self.body(self.kin, call, response.stream)
        return response


class GuardedBodySoon(_Body):
    """The same, for tasks."""

    _call: _CallSoon

    async def __aiter__(self) -> AsyncIterator[bytes]:
        call = self._call
        try:
            async with aclosing(self._stream.__aiter__()) as chunks:
                async for chunk in chunks:
                    if passed := call.feed(chunk):
                        await call.settled()
                        yield passed
            rest = call.finish()
            await call.settled()
            if rest:
                yield rest
        except self._kin.HTTPError as error:
            call.failed(broken_off(error, self._kin))
            raise
        except UpstreamError as error:  # it came, and cannot be decoded
            call.failed(error)
            raise self._kin.DecodingError(str(error)) from error
        finally:
            call.over()

    async def aclose(self) -> None:
        """Settle what is not settled, and give the connection back."""
        try:
            self._call.over()
            await self._call.settled()
        finally:
            await self._stream.aclose()
