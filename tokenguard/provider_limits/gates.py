"""Holds back the calls of a model whose provider has asked to wait.

A gate is a budget of the global scope like any other, so that it closes for all processes and nodes that share
budgets, at once: its bucket is put so far below zero that it takes as long as the provider asks for until a call
passes. It opens gently, for it fills no faster than calls were answered before; once that has gone well for a
while, it is removed.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from contextlib import suppress
from fractions import Fraction
from functools import partial
from typing import NamedTuple

from tokenguard import arithmetic
from tokenguard.budgets import Budgets
from tokenguard.errors import BudgetNotFound, TokenGuardError
from tokenguard.headroom import Pace
from tokenguard.model import GLOBAL, GLOBAL_ID, BucketName, Budget, Meter, Scope, Source
from tokenguard.plan import GATE_COST
from tokenguard.provider_limits.background import Background

FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 60.0
"""How long a gate closes if the provider does not say, doubled each time; and at most: then one call is tried."""

GENTLE_S = 5.0
"""How long a gate that has opened lets calls pass one by one."""

_LEAST_PACE, _MOST_PACE = 1.0, 1000.0
_SLOWER = 0.9
_SAME = 1.1
"""Answers that ask for about the same wait close the gate once."""

_SCOPE = Scope(GLOBAL, GLOBAL_ID)
_log = logging.getLogger("tokenguard")


class _Closed(NamedTuple):
    until_s: float
    times: int


def gate_of(model: str) -> BucketName:
    """Return the name of a model's gate."""
    return BucketName(_SCOPE, Meter.GATE, model, Source.GATE)


class Gates:
    """The gates of all models.

    Args:
        budgets: The use cases of budgets.
        pace: How fast calls were answered.
        background: Where gates are opened.
        apply: Carries out a change of budgets, at once or soon.
        processes: Returns how many processes share a pace.
    """

    def __init__(
        self,
        budgets: Budgets,
        pace: Pace,
        background: Background,
        apply: Callable[[Callable[[], None]], None],
        processes: Callable[[], int],
    ) -> None:
        self._budgets = budgets
        self._pace = pace
        self._background = background
        self._apply = apply
        self._processes = processes
        self._closed: dict[str, _Closed] = {}

    def close(self, model: str, wait_s: float | None, why: str, now_s: float) -> None:
        """Close a model's gate.

        Args:
            model: The model.
            wait_s: For how many seconds; None if the provider did not say.
            why: What it said instead.
            now_s: The time, by ``time.perf_counter``.
        """
        before = self._closed.get(model)
        if before is not None and now_s > before.until_s + GENTLE_S:
            before = None
        if before is not None and now_s < before.until_s and wait_s is None:
            return
        times = 1 if before is None else before.times + 1
        if wait_s is None:
            wait_s = FIRST_WAIT_S * 2 ** min(times - 1, 10)
        wait_s = min(wait_s, LONGEST_WAIT_S)
        if before is not None and wait_s <= (before.until_s - now_s) * _SAME:
            return
        self._closed[model] = _Closed(now_s + wait_s, times)
        if before is None:
            _log.warning(
                "the provider asks to wait for %.3g s (%s): calls of %s are held back", wait_s, why, model
            )
        pace = self._pace.rate(model, now_s) * self._processes() * _SLOWER
        budget, level = _closing(model, wait_s, min(max(pace, _LEAST_PACE), _MOST_PACE))
        self._apply(partial(self._put, budget, level))
        self._background.after(wait_s + GENTLE_S, partial(self._remove, model))

    def sweep(self, gates: list[BucketName]) -> None:
        """See to it that gates are removed some time whose closer may be no more."""
        for name in gates:
            if name.model is not None and name.model not in self._closed:
                self._closed[name.model] = _Closed(0.0, 1)
                self._background.after(LONGEST_WAIT_S + GENTLE_S, partial(self._remove, name.model))

    def _put(self, budget: Budget, level: int) -> None:
        try:
            self._budgets.put(budget, level)
        except TokenGuardError as error:
            _log.warning("the gate of %s stays open: %s", budget.name.model, error)

    def _remove(self, model: str) -> None:
        """Remove a gate, if it has been open for long enough."""
        with suppress(TokenGuardError):
            try:
                if self._budgets.get(gate_of(model)).level < 0:  # calls alone never bring it so low
                    self._background.after(GENTLE_S, partial(self._remove, model))
                    return
                self._budgets.delete(gate_of(model))
            except BudgetNotFound:
                pass
        self._closed.pop(model, None)


def _closing(model: str, wait_s: float, pace: float) -> tuple[Budget, int]:
    """Return the budget of a gate that lets so many calls a second pass, and the level that makes it wait."""
    refill = math.ceil(pace * GATE_COST)
    below = math.ceil(wait_s * refill)
    scale = arithmetic.scale(max(GATE_COST, refill), Fraction(refill), below)
    return Budget(gate_of(model), scale), GATE_COST - below
