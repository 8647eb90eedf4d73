"""Timelines that the oracle decided upon once, kept as they were: every engine must still decide so.

A file holds the budgets at first, what was counted by the end, and the steps, each of which is
``[now_us, act, subject, result, stored]``:

    reserve    [plan, costs]           [allowed, binding, retry_after_us, levels, waits_us, full_in_us], or "stale"
    peek       [plan, []]              the same
    settle     [plan, deltas]          the tokens forgiven
    configure  [key, budget, level]    sets a budget at once, and the level unless it is null
    default    [key, budget]           plans have it from now on
    remove     [key]

A plan is a list of keys under the budgets of that moment, or the number of an earlier step whose handle is used
again. A budget is [capacity, tokens per second, floor of debt]. ``stored`` are the buckets that the step changed,
as ``BucketTable.state`` has them. ``python -m tests.golden.record`` writes the files anew.
"""

import json
from fractions import Fraction
from pathlib import Path

from tests.engines import found
from tests.oracle import Terms
from tests.strategies import prepared, scale_of
from tokenguard.errors import StaleHandle

FOLDER = Path(__file__).parent
TIMELINES = sorted(path.stem for path in FOLDER.glob("*.json"))


def read(name):
    """Return a timeline."""
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def replay(timeline, table):
    """Play a timeline to an engine; results and stored integers must be the recorded ones, step by step."""
    player = Player(table, timeline["budgets"])
    for number, (*step, result, stored) in enumerate(timeline["steps"]):
        assert player.play(step) == (result, stored), f"step {number}: {step}"
    assert player.counters() == timeline["counters"]


class Player:
    """Plays steps to an engine.

    Attributes:
        terms: The budgets as they are by now.
        handles: One for each step; None where there was no plan.
    """

    def __init__(self, table, budgets):
        self._table = table
        self.terms = {key: terms_of(budget) for key, budget in budgets.items()}
        self.handles = []
        self._stored = self._states()

    def play(self, step):
        """Play one step; return what came of it, and the buckets that it changed."""
        now_us, act, subject = step
        self.handles.append(None)
        result = getattr(self, f"_{act}")(now_us, *subject)
        before, self._stored = self._stored, self._states()
        return result, {key: state for key, state in self._stored.items() if state != before[key]}

    def counters(self):
        """Return what was counted on the way."""
        stats = self._table.stats()
        return {name: stats[name] for name in ("used", "forgiven", "clock_steps")}

    def _states(self):
        states = {key: self._table.state(key.encode()) for key in self.terms}
        return {key: state and list(state) for key, state in states.items()}

    def _handle(self, plan):
        if isinstance(plan, int):
            handle = self.handles[plan]
        else:
            handle = prepared(self._table, tuple((key.encode(), self.terms[key]) for key in plan))
        self.handles[-1] = handle
        return handle

    def _reserve(self, now_us, plan, costs):
        try:
            return told(self._table.reserve(self._handle(plan), tuple(costs), now_us))
        except StaleHandle:
            return "stale"

    def _settle(self, now_us, plan, deltas):
        return self._table.settle(self._handle(plan), tuple(deltas), now_us)

    def _peek(self, now_us, plan, _costs):
        return told(self._table.peek(self._handle(plan), now_us))

    def _configure(self, now_us, key, budget, level):
        self._default(now_us, key, budget)
        self._table.configure(key.encode(), scale_of(self.terms[key]), level, now_us)

    def _default(self, _now_us, key, budget):
        self.terms[key] = terms_of(budget)

    def _remove(self, _now_us, key):
        self._table.remove(key.encode())


def terms_of(budget):
    """Return a budget of a file as the oracle has it."""
    capacity, rate, max_debt = budget
    return Terms(capacity, Fraction(rate), max_debt)


def told(outcome):
    """Return an outcome as a file has it."""
    says = found(outcome)
    lists = (list(each) for each in (says.levels, says.waits_us, says.full_in_us))
    return [outcome.allowed, outcome.binding, outcome.retry_after_us, *lists]
