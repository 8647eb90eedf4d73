"""The provider's own limits: learned, mirrored by budgets of ours, and obeyed.

The header fields of every answer tell them, and the admin API, if there is a key for it. What is learned is a
budget of the global scope, for one model and meter, which binds beside those that are set by hand; ``headroom``
says how the levels follow. A refusal of the provider's closes a gate, or raises an alarm.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable
from enum import Enum
from functools import partial
from typing import Any, NamedTuple

from tokenguard._heads import Told
from tokenguard.backends import Backend
from tokenguard.backends.workers import living
from tokenguard.budgets import Budgets, BudgetState
from tokenguard.errors import InvalidValue, ProviderError, TokenGuardError
from tokenguard.headroom import Pace
from tokenguard.model import BucketName, Meter, Source, checked_name
from tokenguard.provider_limits.alarms import Alarms
from tokenguard.provider_limits.background import Background
from tokenguard.provider_limits.gates import Gates
from tokenguard.provider_limits.learned import Change, Learned, limits_of
from tokenguard.provider_limits.others import Others
from tokenguard.provider_limits.seldom import Seldom
from tokenguard.provider_limits.source import ProviderSource
from tokenguard.providers.limits import Kind, error_text, read_refusal

SYNC = "provider limits"
"""What a process claims that asks the admin API for all."""

SWEEP_S = 10.0
"""How often what others left behind, and what they spend, is looked for."""

MAX_WHY = 200
"""So many characters of what the provider says go to the log."""

MAX_TOLD = 8
"""So many changes at a time have a line each in the log; more have one in all."""

_JITTER = 0.1
_log = logging.getLogger("tokenguard")


class News(Enum):
    """What an answer told of limits: nothing new, something new, or nothing that can be understood."""

    NONE = "none"
    SOME = "some"
    UNCLEAR = "unclear"


class Entry(NamedTuple):
    """One learned limit, as a sync tells it.

    Attributes:
        name: Whose limit it is.
        state: The budget and its level; None if it has been, or would be, removed.
        change: What was, or would be, changed; None for nothing.
        age_s: How long ago the provider told it; None if this process does not know.
    """

    name: BucketName
    state: BudgetState | None
    change: Change | None
    age_s: float | None


class ProviderLimits:
    """What is known of the provider's limits, and what follows.

    Args:
        backend: Where buckets and budgets live.
        budgets: The use cases of budgets.
        source: Asks the provider.
        count: Is told what happened to what the provider tells, in one word.
        interval_s: How often the admin API is asked, if there is a key for it.

    Attributes:
        pace: How fast calls are answered.
        alarmed: Whether an answered call has to be told of, by ``passed``.
    """

    def __init__(
        self,
        backend: Backend,
        budgets: Budgets,
        source: ProviderSource,
        count: Callable[[str], None],
        interval_s: float,
    ) -> None:
        self.pace = Pace()
        self._backend = backend
        self._budgets = budgets
        self._source = source
        self._count = count
        self._interval_s = interval_s
        self._background = Background()
        self._asking = Background()  # of its own, so that no gate waits for an answer of the admin API
        self._learned = Learned(backend, budgets, count)
        self._gates = Gates(budgets, self.pace, self._background, self._carry_out, self._processes)
        self._alarms = Alarms(backend.table)
        self._others = Others(backend)
        self._lines = Seldom()
        self._read_s: float | None = None
        self._failure: str | None = None

    def start(self) -> None:
        """Begin to ask the admin API now and then, and to look for what others left behind."""
        self._background.soon(self._look_at_old_ones)
        self._background.after(0.0, self._sweep)
        if self._source.has_admin:
            self._asking.after(random.random(), self._refresh)  # noqa: S311 - so that not all ask at once

    def stop(self) -> None:
        """Do nothing more."""
        self._asking.stop()
        self._background.stop()

    # --- what calls tell --------------------------------------------------------------------------------------

    @property
    def alarmed(self) -> bool:
        """See the class."""
        return self._alarms.raised

    def passed(self) -> None:
        """A call has been answered."""
        self._alarms.clear(time.time())

    def told(self, model: str, head: Told) -> News:
        """Take in what an answer tells of limits that may be new."""
        now_s, news = time.perf_counter(), News.NONE
        for meter, reading in limits_of(head):
            change = self._learned.hear(model, meter, reading, now_s)
            if change is not None:
                self._carry_out(partial(self._apply, change))
            if change is not None or self._learned.doubts(model, meter):
                news = News.SOME
            elif news is News.NONE and reading.window_s is None:
                news = News.UNCLEAR
        return news

    def lowered(self) -> None:
        """The buckets of a call had to be lowered."""
        self._count("lowered")

    def refused(self, model: str, head: Told, body: bytes, is_outsize: bool = False) -> asyncio.Future[Any] | None:
        """Heed a 429 of the provider; return what is done once all have heard of it, if that takes a while.

        Args:
            model: The model.
            head: Its head.
            body: Its body, or what came of it.
            is_outsize: Whether it may be for the size of the call alone, which is nothing to others.
        """
        in_ms, in_s = head.values(b"retry-after-ms"), head.values(b"retry-after")
        refusal = read_refusal(body, in_ms, in_s, time.time())
        kind = Kind.SHORTEN if is_outsize and refusal.kind is Kind.WAIT else refusal.kind
        self._count(f"refused-{kind.value}")
        if kind is Kind.PAY:
            self._alarms.sound(refusal.code, time.time())
        elif kind is Kind.WAIT:
            said = error_text(self._source.plain(body.decode(errors="replace")).encode())[:MAX_WHY]
            why = said or refusal.code or "429"
            return self._gates.close(model, refusal.wait_s, why, time.perf_counter())
        return None

    def _carry_out(self, work: Callable[[], None]) -> None:
        """Change budgets: at once, or beside the calls if that takes a while."""
        if self._budgets.waits:
            self._background.soon(work)
        else:
            work()

    def _apply(self, change: Change) -> None:
        try:
            self._tell([change] if self._learned.apply(change) else [])
        except TokenGuardError as error:
            if self._lines.is_due("not kept", time.perf_counter()):
                _log.warning("the provider's limit for %s is not kept: %s", change.name, error)

    def _tell(self, changes: list[Change]) -> None:
        """Log what has changed; a line each, if they are few."""
        if len(changes) > MAX_TOLD:
            _log.info("the provider's limits: %d have changed", len(changes))
            return
        for change in changes:
            if self._lines.is_due(str(change.name), time.perf_counter()):
                _log.info("the provider's limit on %s", change)

    def _processes(self) -> int:
        return len(living(self._backend.table)) or 1

    # --- what the provider is asked ---------------------------------------------------------------------------

    def sync(self, *, dry_run: bool = False, probe: str | None = None) -> list[Entry]:
        """Read the limits now, and apply them.

        Args:
            dry_run: Only tell what would change.
            probe: A model to make the smallest call of, to see what its answer tells.

        Returns:
            All limits, in the order of their models.

        Raises:
            ProviderError: The provider did not tell them; nothing was changed.
            BackendDown: The budgets cannot be reached.
            InvalidRequest: ``probe`` cannot be the name of a model.
        """
        if probe is not None:
            checked_name("probe", probe)
        told = list(self._learned.heard())
        if self._source.has_admin:
            told += self._read()
        if probe is not None:
            told += self._probed(probe)  # the last, for nothing that was heard before is newer
        changes = {name: change for name, change in {one.name: one for one in told}.items() if change.is_any}
        if not dry_run:
            self._tell([change for change in changes.values() if self._learned.apply(change)])
        return self._entries(changes, dry_run=dry_run)

    def _read(self) -> list[Change]:
        try:
            changes = list(self._learned.read(self._source.read()))
        except InvalidValue as error:
            raise ProviderError(f"the provider tells limits that cannot be used: {error}") from None
        self._read_s = time.perf_counter()
        return changes

    def _probed(self, model: str) -> list[Change]:
        head = Told(self._source.probe(model))
        self.pace.passed(model, time.perf_counter())
        if not head.usable:
            raise ProviderError(f"the provider's answer for {model} tells no limits that can be used")
        return [change for meter, told in limits_of(head) for change in self._learned.probed(model, meter, told)]

    def _entries(self, changes: dict[BucketName, Change], *, dry_run: bool) -> list[Entry]:
        states = {state.budget.name: state for state in self._learned.states()}
        if dry_run:
            for change in changes.values():
                if change.after is None:
                    states.pop(change.name, None)
                else:
                    level = change.after.scale.capacity if change.level is None else change.level
                    known = states.get(change.name)
                    states[change.name] = BudgetState(change.after, True, level if known is None else known.level)
        names = sorted({*states, *changes}, key=lambda name: (name.model or "", name.key))
        return [
            Entry(name, states.get(name), changes.get(name), self._age_s(name))
            for name in names
            if name.meter is not Meter.GATE
        ]

    def _age_s(self, name: BucketName) -> float | None:
        now_s = time.perf_counter()
        if name.source is Source.HEADERS:
            told_s = self.pace.last_s(name.model or "")
            return None if told_s < 0 else now_s - told_s
        return None if self._read_s is None else now_s - self._read_s

    def _refresh(self) -> None:
        """Ask the admin API, unless somebody else who shares the budgets has just done so."""
        self._asking.after(self._interval_s * (1 - _JITTER + 2 * _JITTER * random.random()), self._refresh)  # noqa: S311 - likewise
        try:
            if not self._backend.claim(SYNC, self._interval_s * (1 - 2 * _JITTER), time.time()):
                return
            self._tell([change for change in self._read() if self._learned.apply(change)])
        except TokenGuardError as error:
            if self._failure is None:
                _log.warning("the provider's limits are not refreshed from its admin API: %s", error)
            self._failure = str(error)
        else:
            if self._failure is not None:
                _log.warning("the provider's limits can be read again")
            self._failure = None

    def _look_at_old_ones(self) -> None:
        """Tell of what the admin API told once, if nobody asks it any more."""
        old = [name for name in self._learned.current() if name.source in (Source.ADMIN, Source.ADMIN_DAILY)]
        if old and not self._source.has_admin:
            _log.warning(
                "%d limits that the provider's admin API told still bind, such as that of %s; without "
                "OPENAI_ADMIN_KEY nobody here keeps them up to date",
                len(old),
                old[0],
            )

    def _sweep(self) -> None:
        self._background.after(SWEEP_S, self._sweep)
        self._gates.sweep([name for name in self._learned.current() if name.meter is Meter.GATE])
        self._alarms.look(time.time())
        self._others.look(self._budgets.followed(), time.perf_counter())

    # --- what is told of all that -----------------------------------------------------------------------------

    def trouble(self) -> str | None:
        """Return what the operator has to see to, if anything."""
        codes = self._alarms.standing(time.time())
        if not codes:
            return None
        return f"the provider refuses calls until somebody sees to the account: {', '.join(codes)}"

    def shown(self) -> dict[str, object]:
        """Return how things are with the provider, for ``GET /``."""
        names = self._learned.current()
        gates = sorted(name.model or "" for name in names if name.meter is Meter.GATE)
        others = self._others.told(names)
        told = {
            "alarms": self._alarms.standing(time.time()),
            "heldBack": gates,
            "othersTokensPerMinute": others[Meter.TOKENS],
            "othersRequestsPerMinute": others[Meter.REQUESTS],
        }
        return {**told, **({} if self._failure is None else {"notRefreshed": self._failure})}
