"""Who waits for a budget, and in which order: first come, first served, and nobody asks again before it can help.

A call that is refused waits in the line of the bucket that refused it. Behind it waits whoever comes later and
needs that bucket too; others pass. Only the first of a line asks: when its bucket has filled up so far, or when
somebody else has given tokens back.
"""

from __future__ import annotations

import math
import threading
from bisect import insort
from collections import deque
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count
from operator import attrgetter

from tokenguard.model import NEVER_US, BucketName, Decision

_number = attrgetter("number")


class Line:
    """All who wait in one process, threads and tasks alike."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._to_do: deque[Callable[[], None]] = deque()
        self._numbers = count()
        self._waiting: dict[BucketName, list[Turn]] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def forget(self) -> None:
        """Have nobody wait, as it is in a process that was forked off: threads and loops are not."""
        for line in self._waiting.values():
            for turn in line:
                turn.at = None
        self._lock, self._to_do, self._waiting = threading.Lock(), deque(), {}

    def enter(
        self,
        names: Collection[BucketName],
        until_s: float,
        tell: Callable[[], object],
        is_gone: Callable[[], bool] = lambda: False,
    ) -> Turn:
        """Return the turn of one who comes now.

        Args:
            names: The buckets that it needs.
            until_s: How long it waits, by the monotonic clock.
            tell: Wakes it up; from any thread.
            is_gone: Returns whether nobody can be told there anymore.
        """
        return Turn(self, next(self._numbers), names, until_s, tell, is_gone)

    def stir(self, names: Collection[BucketName] | None = None) -> None:
        """Let those ask again who wait first for one of some buckets, or of any: there may be more in it."""
        if self._waiting:
            self._do(partial(self._stir, names))

    def leave(self, turn: Turn) -> None:
        """Have it wait no more."""
        self._do(partial(self._leave, turn))

    def _do(self, what: Callable[[], None]) -> None:
        """Do something now, or have whoever has the lock do it.

        NOTE: it may come out of a finaliser or a signal, while this very thread has the lock.
        """
        self._to_do.append(what)
        self._catch_up()

    def _catch_up(self) -> None:
        while self._to_do and self._lock.acquire(blocking=False):
            try:
                while self._to_do:
                    self._to_do.popleft()()
            finally:
                self._lock.release()

    @contextmanager
    def _held(self) -> Iterator[None]:
        """Have the lock for a while; then do what others would have done meanwhile."""
        with self._lock:
            yield
        self._catch_up()

    def is_first(self, turn: Turn) -> bool:
        """Return whether nobody waits ahead for a bucket that it needs; else it waits behind them from now on."""
        with self._held():
            for name in turn.names if self._waiting else ():
                first = self._first(name)
                if first is not None and first.number < turn.number:
                    self._move(turn, name)
                    return False
            return True

    def again_s(self, name: BucketName) -> float:
        """Return when whoever waits first for a bucket asks again, unless told before; infinity for never."""
        with self._held():
            first = self._first(name)
            return math.inf if first is None else first.again_s

    def wait_for(self, turn: Turn, name: BucketName) -> bool:
        """Have it wait for a bucket; return whether it did not before."""
        with self._held():
            return self._move(turn, name)

    def _stir(self, names: Collection[BucketName] | None) -> None:
        for name in list(self._waiting) if names is None else names:
            self._tell_first(name)

    def _move(self, turn: Turn, name: BucketName) -> bool:
        if turn.at == name:
            return False
        self._leave(turn)
        turn.at = name
        insort(self._waiting.setdefault(name, []), turn, key=_number)
        return True

    def _leave(self, turn: Turn) -> None:
        if turn.at is None:
            return
        name = turn.at
        self._remove(turn, name)
        self._tell_first(name)

    def _remove(self, turn: Turn, name: BucketName) -> None:
        turn.at = None
        line = self._waiting[name]
        line.remove(turn)
        if not line:
            del self._waiting[name]

    def _first(self, name: BucketName) -> Turn | None:
        """Return who waits first for a bucket; those who are gone never leave by themselves."""
        while line := self._waiting.get(name):
            if not line[0].is_gone():
                return line[0]
            self._remove(line[0], name)
        return None

    def _tell_first(self, name: BucketName) -> None:
        first = self._first(name)
        if first is not None:
            first.due = True
            first.tell()


class Turn:
    """One who waits. It decides nothing and sleeps nowhere: whoever drives it does, as ``Line`` and time have it.

    Attributes:
        number: How many came before.
        names: The buckets that it needs.
        tell: Wakes it up.
        is_gone: Returns whether nobody can be told there anymore.
        at: Whose line it is in; None for none.
        due: Whether somebody has told it to ask.
        again_s: When it asks again by itself; infinity for never.
    """

    def __init__(
        self,
        line: Line,
        number: int,
        names: Collection[BucketName],
        until_s: float,
        tell: Callable[[], object],
        is_gone: Callable[[], bool],
    ) -> None:
        self.number = number
        self.names = names
        self.tell = tell
        self.is_gone = is_gone
        self.at: BucketName | None = None
        self.due = True
        self._line = line
        self._until_s = until_s
        self.again_s = math.inf

    def __enter__(self) -> Turn:
        return self

    def __exit__(self, *error: object) -> None:
        self._line.leave(self)

    def pause_s(self, now_s: float) -> float:
        """Return how long to sleep unless told before; 0 if it is to ask now, below 0 if it must go without."""
        late = now_s >= self._until_s
        if not self._line.is_first(self):
            return -1 if late else self._until_s - now_s
        if late or self.due or now_s >= self.again_s:
            self.due = False
            return 0
        return min(self.again_s, self._until_s) - now_s

    def refused(self, decision: Decision, now_s: float) -> bool:
        """Take in that it asked in vain; return whether there is anything to wait for."""
        binding, buckets = decision.binding, decision.buckets
        if binding is None or any(bucket.cost > bucket.limit for bucket in buckets) or now_s >= self._until_s:
            return False
        self.names = [bucket.name for bucket in buckets]  # budgets may have been set meanwhile
        never = decision.retry_after_us >= NEVER_US
        self.again_s = math.inf if never else now_s + decision.retry_after_us / 1_000_000
        if self._line.wait_for(self, binding.name):
            self.due = True  # what was given back before it stood in line, nobody told it of
        return True

    def in_vain(self, seen: Decision, now_s: float) -> Decision:
        """Return the refusal of one whose time ended behind others: what is there may do for it, but is theirs.

        Args:
            seen: What it would have come to, had it been first.
            now_s: The time.
        """
        binding = next((bucket for bucket in seen.buckets if bucket.name == self.at), None)
        if not seen.allowed or binding is None:
            return seen
        again_s = self._line.again_s(binding.name)
        wait_us = 0 if again_s == math.inf else max(0, math.ceil((again_s - now_s) * 1_000_000))
        return Decision(False, wait_us, binding._replace(wait_us=wait_us), seen.buckets)
