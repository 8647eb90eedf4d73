"""One event loop's way to Redis: calls that arrive while a batch is under way travel together in the next one.

A lane sends one batch at a time. It is up, or it is down and comes back by itself: then it reads the budgets,
settles what is owed, and only then takes calls again. Nothing that reserves is ever sent twice. What settles
may be: a batch whose answer did not come is sent again under the same number, and the script, which keeps the number
of the lane's last such batch on record, does nothing if it has been there before.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import deque
from collections.abc import Awaitable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, Protocol, TypeVar

from tokenguard._bucket import Outcome
from tokenguard.backends.batch import MAX_CALLS, STALE, Call, Kind, RedisHandle, Reply, Result, decode, encode
from tokenguard.backends.outage import OwnHandle, Policy
from tokenguard.backends.owed import Owed
from tokenguard.backends.realm import UNKNOWN, Mirror, Realm, read_mirror, told
from tokenguard.backends.scripts import BUDGETS, CALLS, PUBLISH, Script
from tokenguard.errors import BackendDown, StaleHandle, TokenGuardError

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.05, 1.0
"""Between two attempts to come back."""

STATS = ("batches", "batched", "unanswered", "outages", "own", "forgiven", "clock_steps")
"""What a lane counts: batches and the calls in them, batches whose answer did not come, times that it was down,
calls that the policy admitted, tokens forgiven, and clocks that stepped back."""

_STALE = "a budget changed since the plan was prepared"

T = TypeVar("T")

_log = logging.getLogger("tokenguard")


class LinkLost(Exception):
    """Redis did not answer, or answered that it cannot; what was sent may have been carried out or not.

    Attributes:
        at_once: Whether trying again at once may help, as it does when a connection was cut.
    """

    def __init__(self, message: str, *, at_once: bool = False) -> None:
        super().__init__(message)
        self.at_once = at_once


class Link(Protocol):
    """A connection to Redis, whatever is behind it."""

    async def run(self, script: Script, keys: Sequence[bytes], args: Sequence[Any]) -> Any:  # noqa: ANN401 - as the script returns
        """Run a script, once.

        Raises:
            LinkLost: There is no answer.
        """

    async def greet(self) -> None:
        """Look at a Redis that one has just come to, and say what is wrong with it."""

    async def drop(self) -> None:
        """Close what is open: what may still come on it would be taken for the answer to something else."""


class _Waiting(NamedTuple):
    """A call in the queue."""

    call: Call
    future: asyncio.Future[Any]
    now_us: int | None
    until_s: float


class Lane:
    """See the module. It belongs to the event loop that runs when it is made.

    Args:
        link: The way to Redis.
        realm: Whose buckets; its mirror is kept up to date.
        policy: What decides while Redis is down.
        timeout_s: How long a call may wait for Redis in all.

    Attributes:
        trouble: Why the lane is down; None if it is up.
        stats: Counters.
    """

    def __init__(self, link: Link, realm: Realm, policy: Policy, timeout_s: float) -> None:
        self._link = link
        self._realm = realm
        self._policy = policy
        self._timeout_s = timeout_s
        self._record_key = realm.record_key(secrets.token_hex(8))
        self._number = 0
        self._queue: deque[_Waiting] = deque()
        self._idle: asyncio.Future[None] | None = None
        self._owed = Owed()
        self._unanswered: tuple[int, list[Call]] | None = None
        self.trouble: str | None = None
        self.stats = dict.fromkeys(STATS, 0)
        self._loop = asyncio.get_running_loop()
        self._tried = self._loop.create_future()
        self._task = self._loop.create_task(self._run())

    @property
    def owed(self) -> int:
        """For how many buckets Redis has to be told something."""
        return len(self._owed) + sum(len(call.refs) for call in (self._unanswered or (0, []))[1])

    @property
    def dropped(self) -> int:
        """How many tokens of settlements were dropped for want of room."""
        return self._owed.dropped

    # --- what callers ask -------------------------------------------------------------------------------------

    def ask(
        self, kind: Kind, handle: RedisHandle, amounts: tuple[int, ...], now_us: int | None = None
    ) -> asyncio.Future[Any]:
        """Put a call into the next batch.

        Args:
            kind: What it asks for.
            handle: Its plan.
            amounts: Costs or deltas in tokens, one for each bucket; none for a peek.
            now_us: The time, for tests.

        Returns:
            What comes of it: an ``Outcome``, or the tokens that a settlement forgave, or an error:
            ``StaleHandle`` or ``BackendDown``. Cancelling it undoes a reservation and no settlement.
        """
        future = self._loop.create_future()
        call = Call(kind, handle.refs, amounts, handle)
        waiting = _Waiting(call, future, now_us, self._loop.time() + self._timeout_s)
        if self.trouble is not None:
            self._without_redis(waiting)
            return future
        self._queue.append(waiting)
        if self._idle is not None and not self._idle.done():
            self._idle.set_result(None)
        return future

    def owe(self, handle: RedisHandle, amounts: tuple[int, ...]) -> None:
        """Charge Redis for what was decided without it, as soon as that can be."""
        if self.trouble is None:
            self.ask(Kind.SETTLE, handle, amounts)
        else:
            self._owed.add(handle.refs, amounts)

    async def run(self, script: Script, keys: Sequence[bytes], args: Sequence[Any]) -> Any:  # noqa: ANN401 - as the script returns
        """Run another script, within the time limit.

        Raises:
            LinkLost: There is no answer.
        """
        return await self._within(self._timeout_s, self._link.run(script, keys, args))

    async def ready(self) -> None:
        """Wait until Redis has been tried for the first time, with or without success."""
        await asyncio.shield(self._tried)

    async def refresh(self) -> None:
        """Bring the mirror of the budgets up to date; publish it where Redis is empty or behind.

        Raises:
            LinkLost: There is no answer.
        """
        realm = self._realm
        keys = (realm.epoch_key, realm.budgets_key)
        for _ in range(2):
            mine = realm.mirror
            epoch, *fields = await self.run(BUDGETS, keys, (mine.epoch,))
            found = epoch.decode()
            if found and found == mine.epoch:
                return
            theirs = read_mirror(found, fields) if found else UNKNOWN
            if found and theirs.revision >= mine.revision:
                realm.mirror = theirs
                return
            if mine.epoch:
                _log.warning(
                    "Redis has lost budgets (revision %d, this node knows %d): publishing %d of them anew",
                    theirs.revision, mine.revision, len(mine.all()),
                )  # fmt: skip
            else:
                mine = Mirror(f"0:{secrets.token_hex(8)}", {})
            if await self.run(PUBLISH, keys, (found, mine.epoch, *told(mine))):
                realm.mirror = mine
                return

    async def close(self) -> None:
        """Let what is under way end, within the time limit, and stop."""
        while self._queue and self.trouble is None:
            await asyncio.wait([self._queue[-1].future], timeout=self._timeout_s)
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task
        self._stand_alone("TokenGuard is stopping")
        if self.owed:
            _log.warning("stopping while Redis is away: what it was to be told of %d buckets is lost", self.owed)
        await self._link.drop()

    # --- the lane's own task ----------------------------------------------------------------------------------

    async def _run(self) -> None:
        pause_s = FIRST_PAUSE_S
        while True:
            try:
                async with asyncio.timeout_at(self._patience_s()):
                    await self._come_back()
                pause_s = FIRST_PAUSE_S
                self._up()
                await self._serve()
            except LinkLost as error:
                await self._down(str(error))
            except TimeoutError:
                await self._down(self._too_slow())
            except Exception:
                _log.exception("a batch failed inside TokenGuard")
                await self._down("a batch failed inside TokenGuard")
            if self.trouble is not None:
                await asyncio.sleep(pause_s * (1 + secrets.randbelow(100) / 200))
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    def _patience_s(self) -> float | None:
        """Return until when those who wait will wait for Redis to come back, if they still do."""
        if self.trouble is not None:
            return None
        return self._queue[0].until_s if self._queue else self._loop.time() + self._timeout_s

    async def _come_back(self) -> None:
        """Read the budgets, settle what is owed, and see that Redis can be written to."""
        await self._within(self._timeout_s, self._link.greet())
        await self.refresh()
        await self._settle_up()
        while True:
            self._number += 1
            self._unanswered = (self._number, self._owed.take())
            await self._settle_up()
            if not self._owed:
                return

    async def _settle_up(self) -> None:
        """Send settlements whose answer did not come once more, under their old number."""
        if self._unanswered is None:
            return
        number, calls = self._unanswered
        self._count(await self._send(calls, number, recorded=True))
        self._unanswered = None

    def _up(self) -> None:
        if self.trouble is not None:
            _log.warning("Redis is back: budgets are shared again")
            self.trouble = None
        if not self._tried.done():
            self._tried.set_result(None)

    async def _down(self, trouble: str) -> None:
        if self.trouble is None:
            self.stats["outages"] += 1
            _log.error(
                "Redis is not to be had: %s; until it is back, the policy is %r", trouble, self._policy.name
            )
        self._stand_alone(trouble)
        await self._link.drop()

    def _stand_alone(self, trouble: str) -> None:
        """Let the policy decide on all that wait, and on all that come until Redis is back."""
        self.trouble = trouble
        if not self._tried.done():
            self._tried.set_result(None)
        while self._queue:
            self._without_redis(self._queue.popleft())

    async def _serve(self) -> None:
        """Send batch after batch, until one fails.

        Raises:
            LinkLost: It is not worth trying again at once.
        """
        while True:
            if not self._queue:
                self._idle = self._loop.create_future()
                await self._idle
            if not (batch := self._take()):
                continue
            self._number += 1
            try:
                stale = await self._carry_out(batch)
            except BaseException as error:
                self._broke(batch, str(error) or "TokenGuard is stopping")
                if isinstance(error, LinkLost) and error.at_once:
                    await self._link.drop()
                    return
                raise
            if stale:
                await self._refresh_for(stale)

    def _take(self) -> list[_Waiting]:
        """Return the calls of the next batch: all of one time, if one is given."""
        batch: list[_Waiting] = []
        late_s = self._loop.time() + self._timeout_s / 4
        while self._queue and len(batch) < MAX_CALLS:
            waiting = self._queue[0]
            if batch and waiting.now_us != batch[0].now_us:
                break
            self._queue.popleft()
            if waiting.until_s < late_s:
                self._without_redis(waiting, self._too_slow())
            elif self._is_wanted(waiting):
                batch.append(waiting)
        return batch

    def _is_wanted(self, waiting: _Waiting) -> bool:
        """Return whether a call is still to be sent: nobody has cancelled it, nor has its plan gone stale."""
        if waiting.call.kind is Kind.SETTLE:
            return True
        return not waiting.future.done() and not self._is_stale(waiting)

    def _is_stale(self, waiting: _Waiting) -> bool:
        call = waiting.call
        if call.kind is not Kind.RESERVE or call.handle is None or call.handle.epoch == self._realm.mirror.epoch:
            return False
        waiting.future.set_exception(StaleHandle(_STALE))
        return True

    async def _carry_out(self, batch: list[_Waiting]) -> list[_Waiting]:
        """Send a batch and tell the callers what came of it; return those whose plan is stale."""
        calls = [waiting.call for waiting in batch]
        recorded = any(call.kind is Kind.SETTLE for call in calls)
        left_s = batch[0].until_s - self._loop.time()
        reply = await self._send(calls, self._number, recorded=recorded, now_us=batch[0].now_us, within_s=left_s)
        self._count(reply)
        self.stats["batched"] += len(batch)
        stale = []
        for waiting, result in zip(batch, reply.results, strict=True):
            if result is STALE:
                stale.append(waiting)
            else:
                self._hand_over(waiting, result)
        return stale

    def _hand_over(self, waiting: _Waiting, result: Result) -> None:
        if not waiting.future.done():
            waiting.future.set_result(result)
        elif isinstance(result, Outcome) and result.allowed and waiting.call.kind is Kind.RESERVE:
            self.undo(result)

    def undo(self, outcome: Outcome) -> None:
        """Give back what an allowed outcome took, for whoever asked for it has gone."""
        handle: RedisHandle | OwnHandle = outcome.handle
        deltas = tuple(-outcome.cost(i) for i in range(len(outcome)))
        if isinstance(handle, OwnHandle):
            self._policy.settle(handle, deltas)
            self.owe(handle.redis, deltas)
        else:
            self.ask(Kind.SETTLE, handle, deltas)

    async def _refresh_for(self, stale: list[_Waiting]) -> None:
        try:
            await self.refresh()
        finally:
            for waiting in stale:
                if not waiting.future.done():
                    waiting.future.set_exception(StaleHandle(_STALE))

    def _broke(self, batch: list[_Waiting], trouble: str) -> None:
        """A batch's answer did not come. What it reserved stays taken; what it settles will be sent again."""
        self.stats["unanswered"] += 1
        settlements = [waiting.call for waiting in batch if waiting.call.kind is Kind.SETTLE]
        if settlements:
            self._unanswered = (self._number, settlements)
        for waiting in batch:
            if waiting.call.kind is not Kind.SETTLE:
                self._without_redis(waiting, trouble)
            elif not waiting.future.done():
                waiting.future.set_result(0)

    def _without_redis(self, waiting: _Waiting, trouble: str | None = None) -> None:
        """Let the policy decide on a call."""
        kind, refs, amounts, handle = waiting.call
        trouble = trouble or self.trouble or ""
        future = waiting.future
        if kind is Kind.SETTLE:
            self._owed.add(refs, amounts)
            if not future.done():
                future.set_result(0)
        elif future.done() or handle is None:
            pass
        elif kind is Kind.PEEK:
            future.set_exception(BackendDown(f"the shared budgets cannot be reached: {trouble}"))
        elif not self._is_stale(waiting):
            try:
                outcome = self._policy.reserve(handle, amounts, trouble)
            except TokenGuardError as error:
                future.set_exception(error)
                return
            if outcome.allowed:
                self.stats["own"] += 1
                self._owed.add(refs, amounts)
            future.set_result(outcome)

    # --- the way to Redis -------------------------------------------------------------------------------------

    async def _send(
        self,
        calls: list[Call],
        number: int,
        *,
        recorded: bool,
        now_us: int | None = None,
        within_s: float | None = None,
    ) -> Reply:
        keys, payload = encode(calls, number, self._realm.mirror.epoch, recorded=recorded, now_us=now_us)
        keys = [self._realm.epoch_key, self._record_key, *keys]
        self.stats["batches"] += 1
        run = self._link.run(CALLS, keys, (payload,))
        return decode(calls, await self._within(within_s or self._timeout_s, run))

    async def _within(self, limit_s: float, answer: Awaitable[T]) -> T:
        try:
            async with asyncio.timeout(limit_s):
                return await answer
        except TimeoutError:
            raise LinkLost(self._too_slow()) from None

    def _too_slow(self) -> str:
        return f"no answer within {self._timeout_s:g} s"

    def _count(self, reply: Reply) -> None:
        self.stats["forgiven"] += reply.forgiven + sum(r for r in reply.results if isinstance(r, int))
        self.stats["clock_steps"] += reply.clock_steps
