"""Makes budgets of what the provider tells of its limits, and changes them when it tells others for long."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from typing import NamedTuple, TypeVar

from tokenguard import arithmetic
from tokenguard._heads import Told
from tokenguard.backends import Backend
from tokenguard.budgets import Budgets, BudgetState
from tokenguard.errors import BudgetNotFound, InvalidValue
from tokenguard.model import EVERYBODY, BucketName, Budget, Meter, Source, checked_name
from tokenguard.provider_limits.forked import ForkedLock
from tokenguard.providers.limits import DAY_S, MINUTE_S, AdminLimit, window_s

MAX_LEARNED = 2048
"""So many budgets are learned at most."""

AGREEING = 3
"""So many answers in a row must tell another limit before it is believed."""

STEADY_S = 10.0
"""How long a limit that was believed stands at least before a higher one is."""

T = TypeVar("T")


class Reading(NamedTuple):
    """A limit as header fields tell it.

    Attributes:
        limit: The most that the provider's bucket holds.
        remaining: What it holds.
        reset: When it is full, as the provider words it.
        level: What is left of it and of others that a call has to pass, at most ``remaining``.
    """

    limit: int
    remaining: int
    reset: bytes
    level: int

    @property
    def window_s(self) -> int | None:
        """In what time it fills; None if that cannot be told."""
        return window_s(self.limit, self.remaining, self.reset)


def limits_of(head: Told) -> Iterator[tuple[Meter, Reading]]:
    """Yield what header fields tell that can be used."""
    if head.tokens_limit > 0:
        yield (
            Meter.TOKENS,
            Reading(head.tokens_limit, head.tokens_left_of_limit, head.reset(True), head.tokens_left),
        )
    if head.requests_limit > 0:
        yield (
            Meter.REQUESTS,
            Reading(head.requests_limit, head.requests_left, head.reset(False), head.requests_left),
        )


class Change(NamedTuple):
    """What is to become of a learned budget.

    Attributes:
        name: Whose.
        before: As it is; None if there is none.
        after: As it is to be; None to remove it.
        level: What a new bucket is to hold at most; None for all.
    """

    name: BucketName
    before: Budget | None
    after: Budget | None
    level: int | None = None

    @property
    def is_any(self) -> bool:
        """Whether anything is to change at all."""
        return self.before is None or self.after is None or self.before.scale != self.after.scale

    def __str__(self) -> str:
        what = f"{self.name.meter} of {self.name.model}"
        now = "none" if self.after is None else _worded(self.after)
        was = "" if self.before is None else f"; it was {_worded(self.before)}"
        return f"{what} is {now} ({self.name.source}){was}"


class _Doubt(NamedTuple):
    told: Budget
    times: int


class Learned:
    """The budgets that were learned.

    Args:
        backend: Where they live.
        budgets: The use cases of budgets.
        count: Is told how many times something happened to what the provider tells.
    """

    def __init__(self, backend: Backend, budgets: Budgets, count: Callable[[str], None]) -> None:
        self._backend = backend
        self._budgets = budgets
        self._count = count
        self._lock = ForkedLock()
        self._doubts: dict[BucketName, _Doubt] = {}
        self._believed_s: dict[BucketName, float] = {}
        self._latest: dict[BucketName, Change] = {}

    def current(self) -> dict[BucketName, Budget]:
        """Return the budgets that were learned, as this process knows them, and the gates."""
        return {budget.name: budget for budget in self._backend.on(EVERYBODY) if budget.name.source is not None}

    def hear(self, model: str, meter: Meter, told: Reading, now_s: float) -> Change | None:
        """Take in what an answer tells of a limit; return what is to change, if anything is.

        Args:
            model: The model that answered.
            meter: What the limit is on.
            told: What the answer tells.
            now_s: The time, by a clock that is never set.
        """
        name = BucketName(EVERYBODY, meter, model, Source.HEADERS)
        before, window = self._budgets.find(name), told.window_s
        if window is None:
            if before is None or before.scale.capacity != told.limit:
                self._count("unclear")
            self._break_off(name)
            return None
        after = _budget(name, told.limit, window)
        if after is None:
            self._count("unusable")
            return None
        with self._lock:
            if window == MINUTE_S or (before is not None and window == window_of(before)):
                _keep(self._latest, name, Change(name, before, after))
            if before is not None and before.scale == after.scale:
                self._doubts.pop(name, None)
                return None
            if self._is_doubted(name, before, after, window, now_s):
                return None
            return self._believe(name, before, after, told.level, now_s)

    def doubts(self, model: str, meter: Meter) -> bool:
        """Return whether the next answer may make believe what the last ones told."""
        return BucketName(EVERYBODY, meter, model, Source.HEADERS) in self._doubts

    def _break_off(self, name: BucketName) -> None:
        """Take in that an answer contradicts a day: whoever counts in windows seems to mean one now and then."""
        with self._lock:
            doubt = self._doubts.get(name)
            if doubt is not None and window_of(doubt.told) == DAY_S:
                del self._doubts[name]

    def _is_doubted(
        self, name: BucketName, before: Budget | None, after: Budget, window: int, now_s: float
    ) -> bool:
        """Return whether a limit is not believed yet: another than before, or one that holds for a whole day."""
        since_s = now_s - self._believed_s.get(name, -STEADY_S)
        if before is None and since_s < 1:
            return True  # it is being set
        if before is None and len(self.current()) >= MAX_LEARNED:
            self._count("full")
            return True
        if before is None and window == MINUTE_S:
            return False
        doubt = self._doubts.get(name)
        times = doubt.times + 1 if doubt is not None and doubt.told == after else 1
        if doubt is not None and doubt.told != after:
            self._count("flapping")
        _keep(self._doubts, name, _Doubt(after, times))
        rises = before is not None and after.scale.rate > before.scale.rate
        return times < AGREEING or (rises and since_s < STEADY_S)

    def _believe(self, name: BucketName, before: Budget | None, after: Budget, level: int, now_s: float) -> Change:
        self._doubts.pop(name, None)
        _keep(self._believed_s, name, now_s)
        self._count("learned" if before is None else "changed")
        return Change(name, before, after, level if before is None else None)

    def heard(self) -> Iterator[Change]:
        """Yield what is to change for all that was heard last to be believed at once.

        What was heard before another process changed the budget is no news anymore.
        """
        for name, change in list(self._latest.items()):
            if change.before is not None and change.is_any and change.before == self._budgets.find(name):
                yield change

    def probed(self, model: str, meter: Meter, told: Reading) -> Iterator[Change]:
        """Yield what is to become of a budget for a probe's answer to be believed at once, be it nothing new."""
        name = BucketName(EVERYBODY, meter, model, Source.HEADERS)
        before, window = self._budgets.find(name), told.window_s
        if window is None:
            self._count("unclear")
            return
        after = _budget(name, told.limit, window)
        if after is not None:
            yield Change(name, before, after, told.level if before is None else None)

    def read(self, limits: Iterable[AdminLimit]) -> Iterator[Change]:
        """Yield what is to change for the budgets to be what the admin API tells; the least, if it does so twice.

        Raises:
            InvalidValue: It tells what no budget can be.
        """
        wanted: dict[BucketName, Budget] = {}
        for limit in limits:
            source = Source.ADMIN if limit.window_s == MINUTE_S else Source.ADMIN_DAILY
            name = BucketName(EVERYBODY, Meter(limit.meter), checked_name("model", limit.model), source)
            budget, other = _budget(name, limit.limit, limit.window_s), wanted.get(name)
            if budget is not None and (other is None or budget.scale.capacity < other.scale.capacity):
                wanted[name] = budget
        current = self.current()
        for name, budget in list(wanted.items())[:MAX_LEARNED]:
            change = Change(name, current.get(name), budget)
            if change.is_any:
                yield change
        for name, budget in current.items():
            if name.source in (Source.ADMIN, Source.ADMIN_DAILY) and name not in wanted:
                yield Change(name, budget, None)

    def apply(self, change: Change) -> bool:
        """Carry out a change; return whether there was anything left to change. A level is lowered at most.

        Raises:
            TokenGuardError: It could not be.
        """
        name, _, after, level = change
        try:
            if after is None:
                self._budgets.delete(name)
                return True
            known = self._budgets.get(name)  # somebody else may have learned it just now
        except BudgetNotFound:
            if after is not None:
                self._budgets.put(after, level)
            return after is not None
        if known.budget.scale == after.scale:
            return False
        # What remains has lowered the level already; what was used does not count twice.
        self._budgets.put(after, max(-after.scale.debt, min(known.level, after.scale.capacity)))
        return True

    def states(self) -> list[BudgetState]:
        """Return the budgets that were learned, with their levels.

        Raises:
            BackendDown: They cannot be reached.
        """
        return self._budgets.learned()


def _keep(into: dict[BucketName, T], name: BucketName, value: T) -> None:
    """Remember something of a budget, of not more of them than can be learned."""
    into.pop(name, None)
    while len(into) >= MAX_LEARNED:
        into.pop(next(iter(into)), None)
    into[name] = value


def _budget(name: BucketName, limit: int, span_s: int) -> Budget | None:
    """Return the budget that a limit makes; None if it is beyond what can be counted."""
    try:
        return Budget(name, arithmetic.scale(limit, Fraction(limit, span_s), arithmetic.DEFAULT_DEBT * limit))
    except InvalidValue:
        return None


def _worded(budget: Budget) -> str:
    return f"{budget.scale.capacity} per {'minute' if window_of(budget) == MINUTE_S else 'day'}"


def per_minute(budget: Budget) -> float:
    """Return how much of a budget flows in per minute."""
    return float(budget.scale.rate * MINUTE_S)


def window_of(budget: Budget) -> int:
    """Return in what time an empty bucket fills, in seconds."""
    return round(budget.scale.capacity / budget.scale.rate)
