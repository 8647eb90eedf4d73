"""What many callers did at once on one table, and whether one after the other could have done the same.

Every operation under the table's lock tells the turn that it had. In the order of the turns, the oracle is asked
the same, and must answer the same; and no clock may contradict that order.
"""

from __future__ import annotations

import copy
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate, groupby
from operator import attrgetter
from typing import Any, NamedTuple

from tests.engines import OracleEngine
from tests.oracle import OracleTable
from tokenguard.errors import StaleHandle

STALE = "stale"
"""What came of a reserve whose handle was."""


class Event(NamedTuple):
    """One operation.

    Attributes:
        caller: Who asked for it: process and thread.
        invoked_ns: When, by the clock that all have in common.
        returned_ns: When it was done.
        turn: The number of the last change at its end; None for a peek, which takes no lock.
        now_us: The time that the operation went by; 0 if it has no use for any.
        kind: The name of a method of ``OracleEngine``.
        arguments: Its arguments, but for the time.
        result: What came of it.
    """

    caller: tuple[int, int]
    invoked_ns: int
    returned_ns: int
    turn: int | None
    now_us: int
    kind: str
    arguments: tuple
    result: Any

    def ask(self, engine: OracleEngine) -> Any:
        """Ask the oracle the same."""
        times = () if self.kind in ("remove", "expire_handles") else (self.now_us,)
        try:
            return getattr(engine, self.kind)(*self.arguments, *times)
        except StaleHandle:
            return STALE


def check(history: Iterable[Event]) -> None:
    """Assert that the operations could have been done one after the other, in the order of their turns."""
    peeks, ordered = [], []
    for event in history:
        (peeks if event.turn is None else ordered).append(event)
    check_real_time(ordered)
    past = Past()
    engine = OracleEngine()
    for turn, together in groupby(sorted(ordered, key=attrgetter("turn")), attrgetter("turn")):
        engine = past.follow(engine, turn, list(together))
    check_peeks(peeks, ordered, past)


def check_real_time(events: Iterable[Event]) -> None:
    """Assert that what was done before something else was asked for had no later turn."""
    done = _Line(events, attrgetter("returned_ns"), max, 0)
    for event in events:
        assert done.before(event.invoked_ns) <= event.turn, f"something later was done before {event}"


def check_peeks(peeks: Iterable[Event], events: Iterable[Event], past: Past) -> None:
    """Assert that each peeked bucket was so at some moment of the peek.

    That is after the changes that were done before the peek began, and before those that began when it was done.
    """
    done = _Line(events, attrgetter("returned_ns"), max, 0)
    to_come = _Line(past.changes, lambda event: -event.invoked_ns, min, past.turn + 1)
    for peek in peeks:
        first, last = done.before(peek.invoked_ns), to_come.before(-peek.returned_ns) - 1
        (handle,) = peek.arguments
        for (key, terms), level, full_in_us in zip(
            handle.plan, peek.result.levels, peek.result.full_in_us, strict=True
        ):
            seen = (level, full_in_us)
            assert any(
                seen == _peeked(key, bucket, terms, peek.now_us) for bucket in past.buckets(key, first, last)
            ), f"{key} was never {seen} between turns {first} and {last}, but so it was seen by {peek}"


class Past:
    """How the buckets became what they are.

    Attributes:
        changes: The operation that each turn is the number of, the first first.
        turn: The last one.
    """

    def __init__(self) -> None:
        self.changes: list[Event] = []
        self.turn = 0
        self._now_us = 0
        self._turns: dict[bytes, list[int]] = {}
        self._buckets: dict[bytes, list] = {}

    def follow(self, engine: OracleEngine, turn: int, events: list[Event]) -> OracleEngine:
        """Return the engine after a turn's operations: one that changed something, and those that found it so.

        Raises:
            AssertionError: Nothing that the oracle says explains what came of them.
        """
        if turn == 0:
            assert _find_so(engine, events), f"before any change, something was not as it was: {events}"
            return engine
        assert turn == self.turn + 1, f"nobody made change {self.turn + 1}"
        for change in events:
            after, others = _copy(engine), [event for event in events if event is not change]
            if change.ask(after) == change.result and self._is_in_time(change, others) and _find_so(after, others):
                self._now_us = max(self._now_us, *[event.now_us for event in events])
                self.changes.append(change)
                self._keep(after, turn)
                return after
        told = "\n".join(f"{event}: {event.ask(_copy(engine))}" for event in events)
        raise AssertionError(f"no order explains turn {turn} after {self._now_us}; the oracle says\n{told}")

    def _is_in_time(self, change: Event, others: Iterable[Event]) -> bool:
        """Return whether no clock says that a change came too late or too soon."""
        return (not change.now_us or self._now_us <= change.now_us) and all(
            change.invoked_ns <= other.returned_ns and change.now_us <= (other.now_us or change.now_us)
            for other in others
        )

    def buckets(self, key: bytes, first: int, last: int) -> Sequence:
        """Return what a bucket was from one turn to another; None is none."""
        turns = self._turns.get(key, [])
        begin = bisect_right(turns, first)
        states = self._buckets.get(key, [])[max(0, begin - 1) : bisect_right(turns, last)]
        return states if begin else [None, *states]

    def _keep(self, engine: OracleEngine, turn: int) -> None:
        """Note which buckets are not as they were."""
        self.turn = turn
        now = engine.oracle.buckets
        for key in now.keys() | self._turns.keys():
            states = self._buckets.setdefault(key, [])
            bucket = copy.copy(now.get(key))
            if not states or _facts(bucket) != _facts(states[-1]):
                self._turns.setdefault(key, []).append(turn)
                states.append(bucket)


class _Line:
    """Events in the order of a moment each has, and the least or latest turn of those before any moment."""

    def __init__(self, events: Iterable[Event], moment: Any, best: Any, otherwise: int) -> None:
        events = sorted(events, key=moment)
        self._moments = [moment(event) for event in events]
        self._turns = list(accumulate((event.turn for event in events), best, initial=otherwise))

    def before(self, moment: int) -> int:
        """Return the best turn of those before a moment."""
        return self._turns[bisect_left(self._moments, moment)]


def _find_so(engine: OracleEngine, events: Iterable[Event]) -> bool:
    """Return whether operations find what the oracle says they do, and change nothing."""
    was = _state(engine)
    return all(event.ask(engine) == event.result and _state(engine) == was for event in events)


def _copy(engine: OracleEngine) -> OracleEngine:
    engine = copy.copy(engine)
    engine.oracle = copy.copy(engine.oracle)
    engine.oracle.buckets = {key: copy.copy(bucket) for key, bucket in engine.oracle.buckets.items()}
    return engine


def _state(engine: OracleEngine) -> tuple:
    buckets = {key: _facts(bucket) for key, bucket in engine.oracle.buckets.items()}
    return engine.epoch, engine.oracle.clock_steps, engine.oracle.forgiven, buckets


def _facts(bucket: Any) -> tuple | None:
    return bucket and (bucket.level, bucket.tick, bucket.terms)


def _peeked(key: bytes, bucket: Any, terms: Any, now_us: int) -> tuple[int, int]:
    """Return the level that a peek tells of a bucket, and when it will be full."""
    table = OracleTable()
    table.buckets = {} if bucket is None else {key: bucket}
    outcome = table.peek(((key, terms),), now_us)
    return outcome.levels[0], outcome.full_in_us[0]
