"""Holds back the calls of a model whose provider has asked to wait.

A gate is a budget of the global scope like any other, so that it closes for all processes and nodes that share
budgets, at once: its bucket is put so far below zero that it takes as long as the provider asks for until a call
passes. It opens gently, for it fills no faster than calls were answered before; once that has gone well for a
while, it is removed.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable
from contextlib import suppress
from fractions import Fraction
from functools import partial
from typing import Any, NamedTuple

from tokenguard import arithmetic
from tokenguard.budgets import Budgets
from tokenguard.errors import BudgetNotFound, TokenGuardError
from tokenguard.headroom import Pace
from tokenguard.model import EVERYBODY, BucketName, Budget, Meter, Scale, Source
from tokenguard.plan import GATE_COST
from tokenguard.provider_limits.background import Background
from tokenguard.provider_limits.forked import ForkedLock
from tokenguard.provider_limits.seldom import Seldom

FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 60.0
"""How long a gate closes if the provider does not say, doubled each time; and at most: then one call is tried."""

GENTLE_S = 5.0
"""How long a gate that has opened lets calls pass one by one."""

_LEAST_PACE, _MOST_PACE = 1.0, 1000.0
_SLOWER = 0.9
_SAME = 1.1
"""Answers that ask for about the same wait close the gate once."""
_SOON_S = 0.25
"""A gate is not closed for less than that again and again: it lets calls pass one by one as it is."""

_KNOWN_S = 1.0
"""In so long whoever closes a gate knows that it is there."""

MAX_GATES = 1024
"""So many gates a process closes at a time at most: some who refuse calls do not look at the model's name."""

_log = logging.getLogger("tokenguard")


class _Closed(NamedTuple):
    """How a process has closed a gate, or found it.

    Attributes:
        at_s: When.
        until_s: Until when.
        times: How often in a row.
        scale: The budget's; None if it has not been looked at.
    """

    at_s: float
    until_s: float
    times: int
    scale: Scale | None


def gate_of(model: str) -> BucketName:
    """Return the name of a model's gate."""
    return BucketName(EVERYBODY, Meter.GATE, model, Source.GATE)


class Gates:
    """The gates of all models.

    Args:
        budgets: The use cases of budgets.
        pace: How fast calls were answered.
        background: Where gates are opened.
        apply: Carries out a change of budgets, at once or soon.
        processes: Returns how many processes share a pace.
        now_us: Returns the buckets' time; None is now, by their own clock.
    """

    def __init__(
        self,
        budgets: Budgets,
        pace: Pace,
        background: Background,
        apply: Callable[[Callable[[], None]], None],
        processes: Callable[[], int],
        now_us: Callable[[], int | None] = lambda: None,
    ) -> None:
        self._budgets = budgets
        self._pace = pace
        self._background = background
        self._apply = apply
        self._processes = processes
        self._now_us = now_us
        self._lock = ForkedLock()
        self._closed: dict[str, _Closed] = {}
        self._closing = Seldom()
        self._said: set[str] = set()
        self._failing = Seldom()

    def close(self, model: str, wait_s: float | None, why: str, now_s: float) -> asyncio.Future[Any] | None:
        """Close a model's gate; return what is done once it is closed for all, if that takes a while.

        Args:
            model: The model.
            wait_s: For how many seconds; None if the provider did not say.
            why: What it said instead.
            now_s: The time, by ``time.perf_counter``.
        """
        with self._lock:
            before = self._closed.get(model)
            if before is not None and (now_s > before.until_s + GENTLE_S or self._is_gone(model, before, now_s)):
                before = None
            if model not in self._closed and len(self._closed) >= MAX_GATES:
                return None
            times = 1 if before is None else before.times + 1
            if before is not None and _is_closed_for(before, wait_s, now_s):
                return None
            if wait_s is None:
                wait_s = FIRST_WAIT_S * 2 ** min(times - 1, 10)
            wait_s = min(wait_s, LONGEST_WAIT_S)
            pace = self._pace.rate(model, now_s) * self._processes() * _SLOWER
            budget, level = _closing(model, wait_s, min(max(pace, _LEAST_PACE), _MOST_PACE))
            closed = self._closed[model] = _Closed(now_s, now_s + wait_s, times, budget.scale)
        self._say(model, wait_s, why, now_s)
        self._background.after(wait_s + GENTLE_S, partial(self._remove, model, closed))
        if self._budgets.find(budget.name) is not None:
            self._apply(partial(self._put, budget, level, closed))
            return None
        return self._put_soon(budget, level, closed)

    def _is_gone(self, model: str, before: _Closed, now_s: float) -> bool:
        """Return whether somebody has removed a gate by hand; it takes a moment until one that closes is known."""
        return now_s - before.at_s >= _KNOWN_S and self._budgets.find(gate_of(model)) is None

    def _say(self, model: str, wait_s: float, why: str, now_s: float) -> None:
        """Log that a gate closes, once in a while for about the same wait."""
        if self._closing.is_due(f"{model} {math.frexp(wait_s)[1]}", now_s):
            _log.warning(
                "the provider asks to wait: calls of %s are held back for %.3g s (%s)", model, wait_s, why
            )
            self._said.add(model)

    def _put_soon(self, budget: Budget, level: int, closed: _Closed) -> asyncio.Future[Any] | None:
        """Close a gate that is not known to be there: at once, for calls go on until it is."""
        try:
            closing = self._budgets.put_soon(budget, level, self._now_us())
        except TokenGuardError as error:
            self._failed(budget.name, closed, error)
            return None
        if not isinstance(closing, bool):
            closing.add_done_callback(partial(self._closed_or_not, budget, level, closed))
            return closing
        if not closing:
            self._apply(partial(self._put, budget, level, closed))
        return None

    def _closed_or_not(self, budget: Budget, level: int, closed: _Closed, closing: asyncio.Future[bool]) -> None:
        if closing.cancelled():
            return
        if (error := closing.exception()) is not None:
            self._failed(budget.name, closed, error)
        elif not closing.result():  # somebody else has closed it, perhaps for longer
            self._apply(partial(self._put, budget, level, closed))

    def _failed(self, name: BucketName, closed: _Closed, error: BaseException) -> None:
        if self._failing.is_due(name.model or "", closed.at_s):
            _log.warning("the gate of %s stays open: %s", name.model, error)
        self._forget(name.model, closed)  # so that the next refusal closes it

    def sweep(self, gates: list[BucketName]) -> None:
        """See to it that gates are removed some time whose closer may be no more."""
        for name in gates:
            with self._lock:
                if name.model is None or name.model in self._closed:
                    continue
            self._look_again(name.model, _Closed(0.0, 0.0, 1, None), 0.0)

    def _put(self, budget: Budget, level: int, closed: _Closed) -> None:
        """Close a gate, unless it is closed for longer already: somebody else may have been told so."""
        name = budget.name
        try:
            if self._wait_s(name) < closed.until_s - closed.at_s:
                self._budgets.put(budget, level, self._now_us())
        except TokenGuardError as error:
            self._failed(name, closed, error)

    def _wait_s(self, name: BucketName) -> float:
        """Return how long a gate lets no call pass; below zero if there is none.

        Raises:
            TokenGuardError: That cannot be told.
        """
        try:
            state = self._budgets.get(name, self._now_us())
        except BudgetNotFound:
            return -1.0
        return (GATE_COST - state.level) / float(state.budget.scale.rate)

    def _remove(self, model: str, closed: _Closed) -> None:
        """Remove a gate, if it has been open for long enough."""
        if self._closed.get(model) is not closed:
            return  # it has been closed again, and will be removed in its time
        name = gate_of(model)
        with suppress(TokenGuardError):
            try:
                state = self._budgets.get(name, self._now_us())
                if state.level < 0:  # calls alone never bring it so low
                    self._background.after(GENTLE_S, partial(self._remove, model, closed))
                    return
                if state.budget.scale != closed.scale:  # somebody else has closed it again, and may be no more
                    self._look_again(model, closed._replace(scale=state.budget.scale), self._wait_s(name))
                    return
                self._budgets.delete(name, self._now_us())
            except BudgetNotFound:
                pass
        if model in self._said:
            _log.warning("calls of %s pass again", model)
        self._forget(model, closed)

    def _look_again(self, model: str, closed: _Closed, wait_s: float) -> None:
        """Remove a gate of somebody else's, if that one has not done so when its time has come."""
        with self._lock:
            self._closed[model] = closed
        self._background.after(max(0.0, wait_s) + 2 * GENTLE_S, partial(self._remove, model, closed))

    def _forget(self, model: str | None, closed: _Closed) -> None:
        with self._lock:
            if model is not None and self._closed.get(model) is closed:
                del self._closed[model]
                self._said.discard(model)


def _is_closed_for(before: _Closed, wait_s: float | None, now_s: float) -> bool:
    """Return whether a gate is closed for as long as is asked for, or was just now for as good as no time."""
    if wait_s is None:
        return now_s < before.until_s
    if now_s - before.at_s < _SOON_S and wait_s < _SOON_S:
        return True
    return wait_s <= (before.until_s - now_s) * _SAME


def _closing(model: str, wait_s: float, pace: float) -> tuple[Budget, int]:
    """Return the budget of a gate that lets so many calls a second pass, and the level that makes it wait."""
    refill = math.ceil(pace * GATE_COST)
    below = -(-round(wait_s * 1_000_000) * refill // 1_000_000)  # whole µs, for seconds in binary are a bit off
    scale = arithmetic.scale(max(GATE_COST, refill), Fraction(refill), below)
    return Budget(gate_of(model), scale), GATE_COST - below
