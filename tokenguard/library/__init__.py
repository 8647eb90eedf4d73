"""The limiter that programs import: the same engine, budgets and Redis as the proxy's, in a process of one's own.

A composition root: here the environment is read, and everything is put together.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import threading
import weakref
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import lru_cache
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypedDict, TypeVar, Unpack
from urllib.parse import unquote

from tokenguard._heads import IDENTITY_HEADERS
from tokenguard.config import Config, read_config
from tokenguard.engine import Engine, environment
from tokenguard.errors import InvalidSetting, InvalidValue
from tokenguard.exchange import Terms
from tokenguard.library.budgets import Budgets
from tokenguard.library.call import Call, Desk, check_model
from tokenguard.library.decorating import Guarding
from tokenguard.library.settings import Settings, as_typed
from tokenguard.model import BucketState, Decision, Identity, checked_name
from tokenguard.providers.openai import read_chat

if TYPE_CHECKING:
    import httpx
    import httpx2

    from tokenguard.library.sending import Guards

R = TypeVar("R")


class Ask(TypedDict):
    """What to reserve for a call: arguments of ``Limiter.reserve``.

    Attributes:
        tokens: What it is expected to take.
        prompt: How many of these are the prompt's.
        model: Which model is called.
    """

    tokens: int
    prompt: int
    model: str


class Limiter:
    """Guards calls by budgets, from any thread and any event loop.

    It opens what it needs when it is first used, in every process that was forked off too, and closes it with the
    process, unless ``close`` or ``aclose`` does before.

    Args:
        url: Where buckets and budgets live: ``memory://`` (in this process, and those forked off it),
            ``file:///a/path`` (likewise, and kept in that file for the next start), or ``redis://…`` and its kin
            (shared with all who use the same Redis and realm).
        settings: Other settings, by the names that they have in the environment: ``CAP_USER=1000``,
            ``TOKENGUARD_REALM="staging"``. What is not given is at its default; the environment is not read.

    Attributes:
        budgets: Sets, lists and removes budgets.

    Raises:
        InvalidSetting: The URL or a setting cannot be used.

    Source: docs/library.md, docs/settings.md
    """

    def __init__(self, url: str = "memory://", **settings: Unpack[Settings]) -> None:
        place, typed = _place(url), as_typed(settings)
        try:
            self._set_up(read_config({**typed, **place}))
        except InvalidSetting as error:
            if error.field not in place:
                raise
            raise InvalidSetting("url", str(error).replace(error.field, "url")) from None

    @classmethod
    def from_env(cls) -> Self:
        """Return a limiter as the environment, and ``.env``, describe it: what the proxy goes by too.

        Raises:
            InvalidSetting: A setting cannot be used.
        """
        limiter = cls.__new__(cls)
        limiter._set_up(read_config(environment()))  # noqa: SLF001 - its own
        return limiter

    def _set_up(self, config: Config) -> None:
        self._engine = Engine(config)
        self._terms = Terms([], self._engine.estimator)
        self._desk = Desk(self._engine.limiter, self._engine.backend.close)
        self.budgets = Budgets(self._engine.budgets, self._desk)
        self._opening = threading.Lock()
        self._is_open = False
        self._guards: Guards | None = None
        self._to_close: list[Callable[[], None]] = [self._engine.backend.close]
        self._finalizer = weakref.finalize(self._desk, _close, self._to_close)  # a call needs it as long as we do
        _limiters.add(self)
        _desks.add(self._desk)

    def __repr__(self) -> str:
        closed = "closed, " if self._desk.is_closed else ""
        return f"<Limiter {closed}on {self._engine.backend.describe()}>"

    # --- calls ------------------------------------------------------------------------------------------------

    def reserve(
        self,
        *,
        user: str,
        tokens: int,
        team: str | None = None,
        role: str | None = None,
        rolegroup: str | None = None,
        model: str | None = None,
        prompt: int | None = None,
        wait: float = 0.0,
    ) -> Call:
        """Guard a block: ``with limiter.reserve(user="alice", tokens=1200) as call: ...``, or ``async with``.

        When the block begins, the estimate is taken from every bucket on the call's path, or from none of them.

        Args:
            user: Who calls: 1 to 256 bytes of UTF-8, like all names.
            tokens: What the call is expected to take, 0 to 10^12. A bucket that cannot hold so much is asked for
                all that it can hold, and the rest becomes debt; more than twice of that can never pass.
            team: The user's team, if any.
            role: Likewise.
            rolegroup: Likewise.
            model: Which model is called, for budgets of models.
            prompt: How many of the tokens are the prompt's; all of them by default. A bucket is asked for these,
                and for the rest only up to half of what it can hold: a guess at an answer keeps nobody out.
            wait: How many seconds to wait for the budget at most. Whoever comes first is served first, among those
                who wait in this process; a call that does not wait takes what is there.

        Returns:
            The call, of which nothing is reserved before its block begins. That may raise BudgetExceeded, or
            TableFull, TableBusy or BackendDown; nothing is charged in any of these cases.

        Raises:
            InvalidValue: An argument is out of bounds.
        """
        return self._call(_identity_of(user, team, role, rolegroup), tokens, model, prompt, wait)

    def reserve_for(
        self, who: Identity, *, tokens: int, model: str | None = None, prompt: int | None = None, wait: float = 0.0
    ) -> Call:
        """Do what ``reserve`` does, of an identity.

        Args:
            who: Who calls.
            tokens: As for ``reserve``, and so is what follows.
            model: Likewise.
            prompt: Likewise.
            wait: Likewise.

        Raises:
            InvalidValue: An argument is out of bounds.
        """
        return self._call(_identity_of(*who), tokens, model, prompt, wait)

    def try_reserve(
        self,
        *,
        user: str,
        tokens: int,
        team: str | None = None,
        role: str | None = None,
        rolegroup: str | None = None,
        model: str | None = None,
        prompt: int | None = None,
        wait: float = 0.0,
    ) -> Call | Decision:
        """Reserve at once, and return the refusal rather than raise it.

        Takes what ``reserve`` takes, and raises what it and its block do, but for BudgetExceeded.

        Returns:
            The call, which is to be settled, refunded or kept, be it by ``with``; or the decision that refused it.
        """
        call = self._call(_identity_of(user, team, role, rolegroup), tokens, model, prompt, wait)
        return call.attempt()

    async def try_reserve_async(
        self,
        *,
        user: str,
        tokens: int,
        team: str | None = None,
        role: str | None = None,
        rolegroup: str | None = None,
        model: str | None = None,
        prompt: int | None = None,
        wait: float = 0.0,
    ) -> Call | Decision:
        """Do what ``try_reserve`` does, without holding up the event loop; cancelled, it takes nothing.

        Takes what ``reserve`` takes, and raises what ``try_reserve`` does.

        Returns:
            Likewise.
        """
        call = self._call(_identity_of(user, team, role, rolegroup), tokens, model, prompt, wait)
        return await call.attempt_soon()

    def _call(self, who: Identity, tokens: int, model: str | None, prompt: int | None, wait: float) -> Call:
        if not self._is_open:
            self._open()
        return Call(self._desk, who, model, prompt, tokens, wait)

    def peek(
        self,
        *,
        user: str,
        team: str | None = None,
        role: str | None = None,
        rolegroup: str | None = None,
        model: str | None = None,
    ) -> tuple[BucketState, ...]:
        """Return every bucket on a call's path as it is now, from ``global`` down to the user's; change nothing.

        Takes what ``reserve`` takes to say who calls which model.

        Raises:
            InvalidValue: An argument is out of bounds.
            BackendDown: The buckets cannot be reached.
        """
        if not self._is_open:
            self._open()
        check_model(model)
        return self._engine.limiter.peek(_identity_of(user, team, role, rolegroup), model or "")

    def estimate(
        self, request: bytes | bytearray | str | Mapping[str, Any], *, user: str = "", team: str | None = None
    ) -> Ask:
        """Return what to reserve for a chat completion, as the proxy estimates it.

        That is ``tokens``, ``prompt`` and ``model``, for ``limiter.reserve(user="alice", **limiter.estimate(…))``.

        Args:
            request: What is asked of the provider: a body, or what it is made of. Without ``max_tokens`` the
                answer counts for what answers took, of calls through this limiter's clients; 250 or so at first.
            user: Who calls, for what was learned of that user's calls.
            team: Likewise.

        Raises:
            InvalidValue: It is no request for a chat completion.
        """
        asked = read_chat(_body_of(request))
        estimate = self._terms.estimate(asked, team, user)
        return {"tokens": estimate.total, "prompt": estimate.prompt, "model": asked.model}

    def guard(
        self,
        *,
        user: str | Callable[..., str],
        tokens: int | Callable[..., int],
        team: str | Callable[..., str | None] | None = None,
        role: str | Callable[..., str | None] | None = None,
        rolegroup: str | Callable[..., str | None] | None = None,
        model: str | Callable[..., str | None] | None = None,
        wait: float = 0.0,
        used: Callable[[Any], int] | None = None,
    ) -> Guarding:
        """Return a decorator that guards every call of a function, plain or ``async``.

        Args:
            user: What ``reserve`` takes, or a function that is given the call's arguments and returns it; likewise
                ``team``, ``role``, ``rolegroup``, ``model`` and ``tokens``.
            tokens: Likewise.
            team: Likewise.
            role: Likewise.
            rolegroup: Likewise.
            model: Likewise.
            wait: As for ``reserve``.
            used: Returns the tokens that a call took, given what the function returned. By default that is its
                ``usage.total_tokens``, which the openai SDK's answers have; what has none is charged the estimate.

        Raises:
            TypeError: The function is a generator, which runs on after it was called: guard its body by ``with``.
                Likewise, when it is called, a plain function that returns a coroutine: guard one that awaits it.
        """
        who = {"user": user, "team": team, "role": role, "rolegroup": rolegroup, "model": model, "tokens": tokens}
        return Guarding(self.reserve, who, wait, used)

    # --- clients of the provider's ----------------------------------------------------------------------------

    def httpx_client(
        self,
        *,
        user: str | None = None,
        team: str | None = None,
        role: str | None = None,
        rolegroup: str | None = None,
        **options: Any,  # noqa: ANN401 - its own
    ) -> httpx.Client:
        """Return an ``httpx.Client`` that guards every chat completion: ``OpenAI(http_client=…)``.

        Calls are estimated, reserved and settled as the proxy does it, by the usage that the provider tells,
        streams included. A refusal is a response with the status 429, which the SDKs read as the provider's own.

        Args:
            user: Who calls. A call may say so itself, in the header ``x-user-id`` and those that go with it, which
                do not travel on; if neither does, it is answered by a 400.
            team: The user's team, or the header ``x-team-id``.
            role: Likewise, ``x-role``.
            rolegroup: Likewise, ``x-llm-rolegroup``.
            options: What ``httpx.Client`` takes.

        Raises:
            InvalidValue: A name is out of bounds.
        """
        from tokenguard.library.clients import GuardedClient  # whoever has no use for it need not load it

        return self._client(GuardedClient, _fields(user, team, role, rolegroup), options)

    def httpx_async_client(
        self,
        *,
        user: str | None = None,
        team: str | None = None,
        role: str | None = None,
        rolegroup: str | None = None,
        **options: Any,  # noqa: ANN401 - its own
    ) -> httpx.AsyncClient:
        """Return an ``httpx.AsyncClient`` that guards every chat completion: ``AsyncOpenAI(http_client=…)``.

        Takes what ``httpx_client`` takes, and raises what that does.
        """
        from tokenguard.library.clients import AsyncGuardedClient  # whoever has no use for it need not load it

        return self._client(AsyncGuardedClient, _fields(user, team, role, rolegroup), options)

    def httpx2_client(
        self,
        *,
        user: str | None = None,
        team: str | None = None,
        role: str | None = None,
        rolegroup: str | None = None,
        **options: Any,  # noqa: ANN401 - its own
    ) -> httpx2.Client:
        """Return an ``httpx2.Client`` that guards every chat completion, for openai's SDK from its version 3 on.

        Takes what ``httpx_client`` takes, and does what that does.

        Raises:
            InvalidValue: A name is out of bounds.
            ModuleNotFoundError: httpx2 is not installed; it comes with that SDK.
        """
        from tokenguard.library.clients2 import GuardedClient  # whoever has no use for it need not load it

        return self._client(GuardedClient, _fields(user, team, role, rolegroup), options)

    def httpx2_async_client(
        self,
        *,
        user: str | None = None,
        team: str | None = None,
        role: str | None = None,
        rolegroup: str | None = None,
        **options: Any,  # noqa: ANN401 - its own
    ) -> httpx2.AsyncClient:
        """Return an ``httpx2.AsyncClient`` that guards every chat completion: ``AsyncOpenAI(http_client=…)``.

        Takes what ``httpx_client`` takes, and raises what ``httpx2_client`` does.
        """
        from tokenguard.library.clients2 import AsyncGuardedClient  # whoever has no use for it need not load it

        return self._client(AsyncGuardedClient, _fields(user, team, role, rolegroup), options)

    def _client(self, kind: Callable[..., R], who: Mapping[bytes, bytes], options: Mapping[str, Any]) -> R:
        return kind(self._guards_of_clients(), self._desk, who, **options)

    def _guards_of_clients(self) -> Guards:
        from tokenguard.library.sending import Guards  # likewise

        if not self._is_open:
            self._open()
        with self._opening:
            self._desk.check_open()
            if self._guards is None:
                self._guards = Guards(self._engine)
                self._guards.open()
                self._to_close.insert(0, self._guards.close)
            return self._guards

    # --- its life ---------------------------------------------------------------------------------------------

    def _open(self) -> None:
        with self._opening:
            self._desk.check_open()
            if not self._is_open:
                self._engine.backend.open()
                if self._guards is not None:
                    self._guards.open()  # of the process that this one was forked off
                self._is_open = True

    def close(self) -> None:
        """Save what is to be kept, and close what is open; the limiter is of no more use.

        Whoever waits for a budget is told so by a RuntimeError, and so is whoever comes later. A call that is open
        can still be settled; what it took is not saved anymore.
        """
        with self._opening:
            self._is_open = False
            self._desk.close()
            self._finalizer()

    async def aclose(self) -> None:
        """Do so without holding up the event loop, and close what was open for that."""
        with self._opening:
            self._is_open = False
            self._desk.close()
            closes = self._finalizer.detach() is not None
        if closes:
            try:
                if self._guards is not None:
                    await asyncio.to_thread(self._guards.close)
            finally:
                await self._engine.backend.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()


def _body_of(request: bytes | bytearray | str | Mapping[str, Any]) -> bytes:
    """Return a request as it travels.

    Raises:
        InvalidValue: It cannot.
    """
    try:
        if isinstance(request, bytes | bytearray):
            return bytes(request)
        return (request if isinstance(request, str) else json.dumps(dict(request))).encode()
    except (TypeError, ValueError) as error:
        raise InvalidValue("request", f"request must be what JSON can say: {error}") from None


def _close(what: list[Callable[[], None]]) -> None:
    if threading.current_thread().name.startswith("tokenguard-"):
        # NOTE: it is one of those that are to end, and came upon a limiter that is garbage.
        threading.Thread(target=_close, args=(what,), name="closing-tokenguard").start()
        return
    with ExitStack() as closing:
        for close in reversed(what):
            closing.callback(close)  # all of them, whatever one raises


def _place(url: str) -> dict[str, str]:
    """Return the settings that a URL stands for.

    Raises:
        InvalidSetting: It is none.
    """
    allowed = "url must be memory://, file:///a/path, or a URL of Redis such as redis://host:6379/0"
    if isinstance(url, str):
        if url == "memory://":
            return {}
        if "://" in url and not url.startswith(("memory:", "file:")):
            return {"REDIS_URL": url}
        if found := re.fullmatch(r"file:(?://(?:localhost)?)?(/(?!/)[^?#]*)", url):
            return {"TOKENGUARD_STATE": unquote(found[1])}
    shown = "a value" if "@" in str(url) else repr(url)  # it may hold a password
    raise InvalidSetting("url", f"{allowed}; got {shown}")


def _identity_of(user: str, team: str | None, role: str | None, rolegroup: str | None) -> Identity:
    try:
        return _identity(user, team, role, rolegroup)
    except TypeError:  # what cannot be looked up is no name, and what it is it says by itself
        return _identity.__wrapped__(user, team, role, rolegroup)


@lru_cache(8192)
def _identity(user: str, team: str | None, role: str | None, rolegroup: str | None) -> Identity:
    """Return who calls; PERF: remembered, for to check four names takes as long as to reserve."""
    for field, value in (("user", user), ("team", team), ("role", role), ("rolegroup", rolegroup)):
        if value is not None or field == "user":
            _checked(field, value)
    return Identity(user, team, role, rolegroup)


def _checked(field: str, value: object) -> str:
    if not isinstance(value, str):
        raise InvalidValue(field, f"{field} must be a string, got {value!r}")
    return checked_name(field, value)


def _fields(*parts: str | None) -> dict[bytes, bytes]:
    """Return the header fields that say who calls."""
    given = dict(zip(IDENTITY_HEADERS, parts, strict=True))
    return {
        name: _checked(IDENTITY_HEADERS[name], value).encode()
        for name, value in given.items()
        if value is not None
    }


_limiters: weakref.WeakSet[Limiter] = weakref.WeakSet()
_desks: weakref.WeakSet[Desk] = weakref.WeakSet()


def _after_fork() -> None:
    for limiter in list(_limiters):
        limiter._opening = threading.Lock()  # noqa: SLF001 - of this module
        limiter._is_open = False  # noqa: SLF001 - of this module
    for desk in list(_desks):
        desk.forks += 1
        desk.line.forget()


os.register_at_fork(after_in_child=_after_fork)
