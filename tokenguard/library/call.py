"""One guarded call of somebody's own: reserved at the beginning of a block, settled by its end."""

from __future__ import annotations

import asyncio
import logging
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache, partial
from queue import Empty, SimpleQueue
from time import monotonic
from types import TracebackType
from typing import Any, Self

from tokenguard import refusal
from tokenguard.backends import loop_runs
from tokenguard.errors import AlreadySettled, InvalidValue, TableBusy, TokenGuardError
from tokenguard.library.waiting import Line, Turn
from tokenguard.limiter import Limiter, Refusal, Reservation
from tokenguard.model import BucketName, Decision, Headers, Identity, checked_name
from tokenguard.plan import Plan

MAX_TOKENS = 10**12
LONGEST_SLEEP_S = 3600.0
FOR_EVER_S = 1e18
_ONE_BLOCK = "the call has been settled, refunded or kept before, and guards no further block: reserve anew"

_log = logging.getLogger("tokenguard")


class BudgetExceeded(TokenGuardError):
    """A call was refused: a bucket on its path holds too little. Nothing was charged.

    Attributes:
        decision: Which bucket it was, and how things are with every one on the path.
    """

    def __init__(self, decision: Decision) -> None:
        super().__init__(decision)
        self.decision = decision

    def __str__(self) -> str:
        return refusal.explain(self.decision)

    @property
    def scope(self) -> str:
        """Whose budget it was: ``user:alice``, ``global:*``."""
        binding = self.decision.binding
        return "" if binding is None else str(binding.name.scope)

    @property
    def retry_after(self) -> float | None:
        """How many seconds until the same call would pass if nobody else is admitted; None for never."""
        return self.decision.retry_after


class Unsettled(UserWarning):
    """A block was left, and nobody had said what its call took; or it was never begun."""


class Desk:
    """Where calls are reserved.

    Args:
        limiter: Reserves and settles.
        end: Ends what a thread needs to do so, which begins anew by itself.

    Attributes:
        limiter: Likewise.
        line: Those who wait.
        is_closed: Whether nothing is reserved anymore.
        forks: How many times the process was forked off another since it was made.
    """

    def __init__(self, limiter: Limiter, end: Callable[[], None]) -> None:
        self.limiter = limiter
        self.line = Line()
        self.is_closed = False
        self.forks = 0
        self._end = end

    def close(self) -> None:
        """Reserve nothing anymore, and let those know who wait."""
        self.is_closed = True
        self.line.stir()

    def check_open(self) -> None:
        """Refuse to go on if it is closed.

        Raises:
            RuntimeError: It is.
        """
        if self.is_closed:
            raise RuntimeError("the limiter is closed")

    def take(self, who: Identity, model: str, prompt: int, tokens: int, wait_s: float) -> Reservation | Decision:
        """Reserve, and wait for it if need be; return the last refusal if that was in vain."""
        if not wait_s:
            return self._reserve(who, model, prompt, tokens)
        told: SimpleQueue[None] = SimpleQueue()  # whose put may come out of a finaliser, in the midst of a get
        with self._turn(who, model, wait_s, partial(told.put, None)) as turn:
            while (pause_s := turn.pause_s(monotonic())) >= 0:
                if pause_s:
                    _sleep(told, min(pause_s, LONGEST_SLEEP_S))
                else:
                    taken = self._reserve(who, model, prompt, tokens)
                    if isinstance(taken, Reservation) or not turn.refused(taken, monotonic()):
                        return taken
            seen = turn.in_vain(self.limiter.look(who, model, prompt, tokens), monotonic())
        return self._reserve(who, model, prompt, tokens) if seen.allowed else seen

    async def take_soon(
        self, who: Identity, model: str, prompt: int, tokens: int, wait_s: float
    ) -> Reservation | Decision:
        """Do what ``take`` does, without holding up an event loop; if it is cancelled, nothing is taken."""
        if not wait_s:
            return await self._reserve_soon(who, model, prompt, tokens)
        told, loop = asyncio.Event(), asyncio.get_running_loop()

        def tell() -> None:
            with suppress(RuntimeError):  # its loop was closed just now
                loop.call_soon_threadsafe(told.set)

        with self._turn(who, model, wait_s, tell, loop.is_closed) as turn:
            while (pause_s := turn.pause_s(monotonic())) >= 0:
                if pause_s:
                    await _sleep_soon(told, min(pause_s, LONGEST_SLEEP_S))
                else:
                    taken = await self._reserve_soon(who, model, prompt, tokens)
                    if isinstance(taken, Reservation) or not turn.refused(taken, monotonic()):
                        return taken
            if self.limiter.waits:
                seen = await asyncio.to_thread(self.limiter.look, who, model, prompt, tokens)
            else:
                seen = self.limiter.look(who, model, prompt, tokens)
            seen = turn.in_vain(seen, monotonic())
        return await self._reserve_soon(who, model, prompt, tokens) if seen.allowed else seen

    def _reserve(self, who: Identity, model: str, prompt: int, tokens: int) -> Reservation | Decision:
        self.check_open()
        return _told(self.limiter.reserve(who, model, prompt, tokens))

    async def _reserve_soon(self, who: Identity, model: str, prompt: int, tokens: int) -> Reservation | Decision:
        if not self.limiter.waits:
            return self._reserve(who, model, prompt, tokens)
        self.check_open()
        return _told(await self.limiter.reserve_soon(who, model, prompt, tokens))

    def _turn(
        self,
        who: Identity,
        model: str,
        wait_s: float,
        tell: Callable[[], object],
        is_gone: Callable[[], bool] = lambda: False,
    ) -> Turn:
        names = names_of(self.limiter.plan(who, model))
        return self.line.enter(names, monotonic() + wait_s, tell, is_gone)

    def given_back(self, reservation: Reservation) -> None:
        """Let those who wait know that buckets may hold more than they did."""
        if self.line:
            self.line.stir(names_of(reservation.plan))
        if self.is_closed and self.limiter.waits:
            self._end()


def _told(taken: Reservation | Refusal) -> Reservation | Decision:
    """Return what came of reserving as callers are told of it."""
    return taken.decision if isinstance(taken, Refusal) else taken


def names_of(plan: Plan) -> list[BucketName]:
    """Return the buckets that a call must pass."""
    return [budget.name for budget in plan.budgets]


def _sleep(told: SimpleQueue[None], seconds: float) -> None:
    with suppress(Empty):
        told.get(timeout=seconds)
        while True:
            told.get_nowait()


async def _sleep_soon(told: asyncio.Event, seconds: float) -> None:
    try:
        async with asyncio.timeout(seconds):
            await told.wait()
    except TimeoutError:
        pass
    told.clear()


class Call:
    """A call that is reserved when its block begins, and settled, refunded or kept by the time that it ends.

    ``with`` and ``async with`` do the same; within ``async with`` nothing holds up the event loop, and the block's
    end waits until the buckets are up to date. An exception gives everything back but the request itself, unless
    the call had been settled before; a block that is ended from outside, as by a cancelled task, a generator that
    is closed or Ctrl-C, keeps the estimate as spent.

    Attributes:
        tokens: The estimate, in tokens.
    """

    def __init__(
        self, desk: Desk, who: Identity, model: str | None, prompt: int | None, tokens: int, wait: float
    ) -> None:
        check_tokens("tokens", tokens)
        if prompt is not None:
            check_tokens("prompt", prompt)
            if prompt > tokens:
                raise InvalidValue("prompt", f"prompt must be at most tokens, {tokens}, got {prompt}")
        check_model(model)
        self._wait_s = _seconds(wait)
        self.tokens = tokens
        self._prompt = tokens if prompt is None else prompt
        self._desk = desk
        self._who = who
        self._model = model or ""
        self._reservation: Reservation | None = None
        self._settling: asyncio.Future[Any] | None = None
        self._spent = False
        self._soon = False
        self._is_asked_for = False
        self._forks = 0
        self._is_made = True  # whose arguments were in order

    def __repr__(self) -> str:
        taken = self._reservation
        state = "not reserved yet" if taken is None else "open" if taken.is_open else "settled"
        return f"<Call of {self._who.user} for {self.tokens} tokens, {state}>"

    @property
    def decision(self) -> Decision:
        """The decision that let it pass: every bucket on its path as the reserve left it."""
        return self._taken().decision

    @property
    def is_open(self) -> bool:
        """Whether it is reserved, and still to be settled, refunded or kept."""
        return self._reservation is not None and self._reservation.is_open

    def limit_headers(self) -> Headers:
        """Return the ``x-ratelimit-*`` fields for an answer: of each meter's tightest bucket."""
        return self._taken().limit_headers()

    def settle(self, tokens: int) -> None:
        """Replace the estimate by what the call really took.

        Args:
            tokens: What it took in all, at least 0; what is beyond the estimate is charged too.

        Raises:
            AlreadySettled: It has been settled, refunded or kept before; nothing was changed.
            InvalidValue: ``tokens`` is no whole number of at least 0; the estimate stays spent.
            TableBusy: The buckets were locked; nothing was changed, and it can be tried again.
        """
        try:
            check_tokens("tokens", tokens)
        except InvalidValue:
            self._spent = True  # a call whose usage is not to be had was made all the same
            raise
        self._settle(self._taken(), tokens)

    def refund(self) -> None:
        """Give all tokens back, for the call was never made; its request stays counted.

        Raises:
            AlreadySettled: It has been settled, refunded or kept before; nothing was changed.
        """
        taken = self._taken()
        taken.unsent = True
        self._settle(taken, 0)

    def keep(self) -> None:
        """Leave what was reserved as spent, for what the call took cannot be told.

        Raises:
            AlreadySettled: It has been settled, refunded or kept before; nothing was changed.
        """
        self._taken().close()

    async def settled(self) -> None:
        """Wait until the buckets are up to date: of a call that an event loop reserved, ``settle`` does not."""
        if self._settling is not None:
            await asyncio.shield(self._settling)  # whoever waits may be cancelled, and somebody else may wait too

    def _taken(self) -> Reservation:
        if self._reservation is None:
            raise RuntimeError("nothing is reserved yet: a call begins with its `with` or `async with`")
        return self._reservation

    def _settle(self, taken: Reservation, tokens: int) -> None:
        limiter = self._desk.limiter
        if self._soon and limiter.waits and loop_runs():
            self._settling = limiter.settle_soon(taken, tokens)
            self._settling.add_done_callback(partial(_given_back, self._desk, taken))
        else:
            limiter.settle(taken, tokens)
            self._desk.given_back(taken)

    def attempt(self) -> Self | Decision:
        """Reserve; return the call, or the decision that refused it. A call is reserved once."""
        self._ask()
        return self._begun(self._desk.take(self._who, self._model, self._prompt, self.tokens, self._wait_s))

    async def attempt_soon(self) -> Self | Decision:
        """Do so without holding up an event loop."""
        desk = self._desk
        if not self._wait_s and not desk.limiter.waits:
            return self.attempt()  # PERF: two coroutines take as long as to reserve; row "library, async with"
        self._ask()
        self._soon = True
        return self._begun(await desk.take_soon(self._who, self._model, self._prompt, self.tokens, self._wait_s))

    def _ask(self) -> None:
        if self._is_asked_for:
            raise RuntimeError("a call is reserved once, and this one was, or is being: ask for another")
        self._is_asked_for = True
        self._forks = self._desk.forks

    def _begun(self, taken: Reservation | Decision) -> Self | Decision:
        if isinstance(taken, Decision):
            return taken
        self._reservation = taken
        return self

    def __enter__(self) -> Self:
        if self._reservation is None:
            begun = self.attempt()
            if isinstance(begun, Decision):
                raise BudgetExceeded(begun)
        elif not self._reservation.is_open:
            raise AlreadySettled(_ONE_BLOCK)
        return self

    async def __aenter__(self) -> Self:
        if self._reservation is None:
            begun = await self.attempt_soon()
            if isinstance(begun, Decision):
                raise BudgetExceeded(begun)
        elif not self._reservation.is_open:
            raise AlreadySettled(_ONE_BLOCK)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end(kind)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end(kind)
        if self._settling is not None:
            await self.settled()

    def __del__(self) -> None:
        if self._is_made and not self._is_asked_for:
            warnings.warn(
                "a call that reserve() returned was never begun: nothing was reserved, and nothing guarded. Use "
                "`with` or `async with`",
                Unsettled,
                stacklevel=1,
            )
        self._end(None)

    def _end(self, kind: type[BaseException] | None) -> None:
        """See to what nobody has said what to do with.

        What ends a block from outside, such as a cancelled task or a generator that nobody reads on, is as if a
        caller hung up: the provider may have been paid.
        """
        taken = self._reservation
        if taken is None or not taken.is_open or self._forks != self._desk.forks:  # it is the parent process's
            return
        if kind is not None and issubclass(kind, Exception) and not self._spent:
            try:
                self._settle(taken, 0)
            except TableBusy as busy:
                _log.warning("%s: %d tokens that were reserved for %s stay spent", busy, self.tokens, self._who)
            return
        taken.close()
        if kind is None:
            warnings.warn(
                "a call ended without call.settle(): its estimate stays spent. Settle it at what it took, or say "
                "call.keep()",
                Unsettled,
                stacklevel=1,  # compiled, nothing stands between here and whoever left the block
            )


def _given_back(desk: Desk, taken: Reservation, _: object) -> None:
    desk.given_back(taken)


def check_tokens(field: str, tokens: int) -> None:
    """Refuse what is no number of tokens.

    Raises:
        InvalidValue: It is not.
    """
    if type(tokens) is not int or not 0 <= tokens <= MAX_TOKENS:
        raise InvalidValue(field, f"{field} must be a whole number from 0 to 10^12, got {tokens!r}")


def check_model(model: str | None) -> None:
    """Refuse what is no model.

    Raises:
        InvalidValue: It is not.
    """
    if model is not None:
        try:
            _checked_model(model)
        except TypeError:  # it cannot even be looked up
            raise InvalidValue("model", f"model must be a string, got {model!r}") from None


@lru_cache(1024)
def _checked_model(model: str) -> None:
    if not isinstance(model, str):
        raise InvalidValue("model", f"model must be a string, got {model!r}")
    checked_name("model", model)


def _seconds(wait: object) -> float:
    """Return how long to wait; 10^18 s and more are for ever."""
    if isinstance(wait, bool) or not isinstance(wait, int | float) or not wait >= 0:
        raise InvalidValue("wait", f"wait must be seconds, at least 0, got {wait!r}")
    return float(min(wait, FOR_EVER_S))
