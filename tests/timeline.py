"""A backend that writes down what it was asked, so that the oracle can be asked the same."""

import threading
import time
from dataclasses import dataclass
from fractions import Fraction

from tests.oracle import OracleTable, Terms
from tokenguard.backends.memory import MemoryBackend


@dataclass(frozen=True)
class Step:
    """One operation, in the order in which it was carried out.

    Attributes:
        budgets: The plan's.
        amounts: Costs or deltas, one for each.
        now_us: When.
        result: What came of it: None for a settlement, else whether it was allowed and each bucket's level.
    """

    budgets: tuple
    amounts: tuple
    now_us: int
    result: tuple | None


class RecordingBackend(MemoryBackend):
    """Does what its base does, one operation at a time, and keeps the timeline.

    NOTE: the clock is read inside the lock, so that time and order agree.
    """

    def __init__(self, table, clock_us=lambda: time.time_ns() // 1000):
        super().__init__(table)
        self.timeline = []
        self._one_at_a_time = threading.Lock()
        self._clock_us = clock_us
        self._plans = {}
        self.reserve = self._reserve
        self.settle = self._settle

    def prepare(self, budgets, epoch=None):
        handle = super().prepare(budgets, epoch)
        self._plans[handle] = tuple(budgets)
        return handle

    def _reserve(self, handle, costs, now_us=None):
        assert now_us is None
        with self._one_at_a_time:
            now_us = self._clock_us()
            outcome = self.table.reserve(handle, costs, now_us)
            levels = tuple(outcome.level(i) for i in range(len(costs)))
            self.timeline.append(Step(self._plans[handle], costs, now_us, (outcome.allowed, levels)))
            return outcome

    def _settle(self, handle, deltas, now_us=None):
        assert now_us is None
        with self._one_at_a_time:
            now_us = self._clock_us()
            self.timeline.append(Step(self._plans[handle], deltas, now_us, None))
            return self.table.settle(handle, deltas, now_us)

    def state(self, name):
        return self.table.state(name.key)


def replay(timeline):
    """Ask the oracle the same; assert that it decides alike at every step, and return it."""
    oracle = OracleTable()
    for step in timeline:
        plan = tuple((budget.name.key, terms_of(budget.scale)) for budget in step.budgets)
        if step.result is None:
            oracle.settle(plan, step.amounts, step.now_us)
        else:
            expected = oracle.reserve(plan, step.amounts, step.now_us)
            assert step.result == (expected.allowed, expected.levels)
    return oracle


def terms_of(scale):
    return Terms(scale.capacity, scale.rate, scale.debt)


def worst_excess(timeline, name):
    """Return by how much sum(reserved - refunded) came to exceed capacity + rate * t, at the worst instant.

    Never above 0 for a bucket that keeps its promise. What usage exceeds a reservation by is debt, and no part
    of the sum.
    """
    spent, start_us, worst = 0, None, None
    for step in timeline:
        for budget, amount in zip(step.budgets, step.amounts, strict=True):
            if budget.name != name:
                continue
            start_us = step.now_us if start_us is None else start_us
            if step.result is None:
                spent += min(amount, 0)
            elif step.result[0]:
                spent += amount
            granted = budget.scale.capacity + budget.scale.rate * Fraction(step.now_us - start_us, 10**6)
            # NOTE: a tick may have begun just before the first step, and is credited whole.
            granted += Fraction(budget.scale.gain, budget.scale.unit)
            worst = spent - granted if worst is None else max(worst, spent - granted)
    return worst
