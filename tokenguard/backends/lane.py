"""One event loop's way to Redis: calls that arrive while a batch is under way travel together in the next one.

A lane sends one batch at a time. It is up, or it comes back by itself: then it reads the budgets, settles what is
owed, and only after that takes calls again. Nothing that reserves is ever sent twice, unless Redis said that it
did not do it. What settles may be: a batch whose answer did not come is sent again under the same number, and the
script, which keeps the number of the lane's last such batch on record, does nothing if it has been there before.

Batches are sent and answers taken in by callbacks; there is a task only while the lane comes back.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple, Protocol

from tokenguard._bucket import Outcome
from tokenguard.backends.batch import MAX_CALLS, STALE, Call, Kind, RedisHandle, Reply, Result, decode, encode
from tokenguard.backends.outage import OwnHandle, Policy, Watch
from tokenguard.backends.owed import Owed
from tokenguard.backends.realm import Realm
from tokenguard.backends.scripts import CALLS, Script
from tokenguard.errors import BackendDown, StaleHandle

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.05, 1.0
"""Between two attempts to come back."""

HEARTBEAT_S = 1.0
"""How long a lane that nobody asks anything goes without a look at Redis."""

STATS = ("batches", "batched", "unanswered", "own", "forgiven", "clock_steps")
"""What a lane counts: batches and the calls in them, batches whose answer did not come, calls that the policy
admitted, tokens forgiven, and clocks that stepped back."""

_STALE = "a budget changed since the plan was prepared"
_FAULT = "a batch failed inside TokenGuard"

_log = logging.getLogger("tokenguard")


class LinkLost(Exception):
    """Redis did not answer, or answered that it cannot.

    Attributes:
        undone: Whether it is certain that nothing was done.
        at_once: Whether trying again at once may help, as it does when a connection was cut.
    """

    def __init__(self, message: str, *, undone: bool = False, at_once: bool = False) -> None:
        super().__init__(message)
        self.undone = undone
        self.at_once = at_once


class Link(Protocol):
    """A connection to Redis, whatever is behind it."""

    closed: Callable[[LinkLost], None]
    """Is called when a connection is closed on which no answer is waited for."""

    async def connect(self) -> None:
        """Make a connection, if there is none.

        Raises:
            LinkLost: There is none to be had.
        """

    def send(
        self, script: Script, keys: Sequence[bytes], args: Sequence[Any], answered: Callable[[Any], None]
    ) -> None:
        """Send a script at once; ``answered`` is called once, with its answer or with a ``LinkLost``."""

    def drop(self, why: LinkLost) -> None:
        """Close the connection; whoever waits for an answer is told why there will be none."""


async def answer_to(send: Callable[[Callable[[Any], None]], None]) -> Any:  # noqa: ANN401 - as it is answered
    """Send what is answered by a callback, and wait for the answer."""
    answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    def answered(what: Any) -> None:  # noqa: ANN401 - as it is answered
        if not answer.done():
            answer.set_result(what)

    send(answered)
    return await answer


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
        watch: Is told when Redis is lost, and when it is back.
        timeout_s: How long a call may wait for Redis in all.
        told: Is called once in ``HEARTBEAT_S``.

    Attributes:
        trouble: Why the lane is down; None if it is up.
        stats: Counters.
    """

    def __init__(
        self,
        link: Link,
        realm: Realm,
        policy: Policy,
        watch: Watch,
        timeout_s: float,
        told: Callable[[Lane], None] = lambda lane: None,  # noqa: ARG005 - for whom nobody asked
    ) -> None:
        self._link = link
        self._told = told
        self._link.closed = self._closed
        self._realm = realm
        self._policy = policy
        self._watch = watch
        self._timeout_s = timeout_s
        self._record_key = realm.record_key(secrets.token_hex(8))
        self._number = 0
        self._queue: deque[_Waiting] = deque()
        self._flying: list[_Waiting] = []
        self._busy = True  # a batch is under way or about to be, or the lane is coming back
        self._crowd = False
        self._used = False
        self._idle: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._until_s = 0.0
        self._owed = Owed()
        self._unanswered: tuple[int, list[Call]] | None = None
        self.trouble: str | None = None
        self.stats = dict.fromkeys(STATS, 0)
        self._loop = asyncio.get_running_loop()
        self._heart = self._loop.call_later(HEARTBEAT_S, self._beat)
        self._tried: asyncio.Future[None] = self._loop.create_future()
        self._task: asyncio.Task[None] = self._loop.create_task(self._return())

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
        future: asyncio.Future[Any] = self._loop.create_future()
        call = Call(kind, handle.refs, amounts, handle)
        waiting = _Waiting(call, future, now_us, self._loop.time() + self._timeout_s)
        if self.trouble is not None:
            self._without_redis(waiting, self.trouble)
            return future
        self._queue.append(waiting)
        if not self._busy:
            self._busy = True
            # PERF: a lone call leaves at once; where the last batch was of many, it waits for this turn's others.
            if self._crowd:
                self._loop.call_soon(self._fly)
            else:
                self._fly()
        return future

    def owe(self, handle: RedisHandle, amounts: tuple[int, ...]) -> None:
        """Charge Redis for what was decided without it, as soon as that can be."""
        if self.trouble is None:
            self.ask(Kind.SETTLE, handle, amounts)
        else:
            self._owed.add(handle.refs, amounts)

    def undo(self, outcome: Outcome) -> None:
        """Give back what an allowed outcome took, for whoever asked for it has gone."""
        handle: RedisHandle | OwnHandle = outcome.handle
        if isinstance(handle, OwnHandle):
            deltas = tuple(-cost for cost in handle.costs)
            handle.settle(deltas)
            self.owe(handle.redis, deltas)
        else:
            self.ask(Kind.SETTLE, handle, tuple(-outcome.cost(i) for i in range(len(outcome))))

    async def run(self, script: Script, keys: Sequence[bytes], args: Sequence[Any]) -> Any:  # noqa: ANN401 - as the script returns
        """Run another script, within the time limit.

        Raises:
            LinkLost: There is no answer.
        """
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._link.connect()
                what = await answer_to(partial(self._link.send, script, keys, args))
        except TimeoutError:
            raise self._too_slow() from None
        if isinstance(what, LinkLost):
            raise what
        return what

    async def ready(self) -> None:
        """Wait until Redis has been tried for the first time, with or without success."""
        await asyncio.shield(self._tried)

    async def refresh(self) -> None:
        """Bring the mirror of the budgets up to date; publish it where Redis is empty or behind.

        Raises:
            LinkLost: There is no answer.
        """
        await self._realm.refresh(self.run)

    async def close(self) -> None:
        """Let what is under way end, within the time limit, and stop."""
        if self._busy and self.trouble is None:
            self._idle = self._loop.create_future()
            await asyncio.wait([self._idle], timeout=self._timeout_s)
        self._heart.cancel()
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task
        self._busy = True
        self.trouble = self.trouble or "TokenGuard is stopping"
        self._stand_alone(self.trouble)
        if self.owed:
            _log.warning("stopping while Redis is away: what it was to be told of %d buckets is lost", self.owed)
        self._watch.ended(self)
        self._link.drop(LinkLost("TokenGuard is stopping"))

    # --- while it is up: batch after batch ----------------------------------------------------------------------

    def _fly(self) -> None:
        """Send what is in the queue."""
        batch: list[_Waiting] = []
        while self._queue and not batch:
            batch = self._take()
        if not batch:
            self._rest()
            return
        self._number += 1
        calls = [waiting.call for waiting in batch]
        recorded = any(call.kind is Kind.SETTLE for call in calls)
        try:
            keys, payload = self._encoded(calls, self._number, recorded=recorded, now_us=batch[0].now_us)
        except Exception as error:  # whatever it is, it would not go away, and somebody waits
            for waiting in batch:
                if not waiting.future.done():
                    waiting.future.set_exception(error)
            self._go_on()
            return
        self._flying = batch
        self._used = True
        self._crowd = len(batch) > 1
        # Whoever is in it has this long, but for a settlement at its head that has waited for Redis to come back.
        self._until_s = max(batch[0].until_s, self._loop.time() + self._timeout_s / 4)
        if self._timer is None:
            self._timer = self._loop.call_at(self._until_s, self._late)
        self._link.send(CALLS, keys, (payload,), self._landed)

    def _take(self) -> list[_Waiting]:
        """Return the calls of the next batch: all of one time, if one is given."""
        batch: list[_Waiting] = []
        late_s = self._loop.time() + self._timeout_s / 4
        epoch = self._realm.mirror.epoch
        while self._queue and len(batch) < MAX_CALLS:
            waiting = self._queue[0]
            if batch and waiting.now_us != batch[0].now_us:
                break
            self._queue.popleft()
            call = waiting.call
            if call.kind is Kind.SETTLE:
                batch.append(waiting)
            elif waiting.future.done():
                pass  # cancelled, and not sent
            elif waiting.until_s < late_s:
                self._without_redis(waiting, str(self._too_slow()))
            elif call.kind is Kind.RESERVE and call.handle is not None and call.handle.epoch != epoch:
                waiting.future.set_exception(StaleHandle(_STALE))
            else:
                batch.append(waiting)
        return batch

    def _late(self) -> None:
        """See whether the batch under way is late. PERF: a timer for each would cost as much as taking it."""
        self._timer = None
        if not self._flying:
            return
        if self._until_s <= self._loop.time():
            self._link.drop(self._too_slow())
        else:
            self._timer = self._loop.call_at(self._until_s, self._late)

    def _landed(self, answer: Any) -> None:  # noqa: ANN401 - of the script, or a LinkLost
        """Take in what came of the batch under way, and send the next."""
        batch, self._flying = self._flying, []
        if isinstance(answer, LinkLost):
            self._broke(batch, answer)
            return
        try:
            stale = self._hand_out(batch, answer)
        except Exception:
            _log.exception(_FAULT)
            self._broke(batch, LinkLost(_FAULT))
            return
        if stale:
            self._task = self._loop.create_task(self._refresh_for(stale))
        else:
            self._go_on()

    def _hand_out(self, batch: list[_Waiting], answer: bytes) -> list[_Waiting]:
        """Tell the callers what came of their calls; return those whose plan is stale."""
        reply = decode([waiting.call for waiting in batch], answer)
        self.stats["batches"] += 1
        self.stats["batched"] += len(batch)
        self._count(reply)
        stale = []
        for waiting, result in zip(batch, reply.results, strict=True):
            if result is STALE:
                stale.append(waiting)
            elif not waiting.future.done():
                waiting.future.set_result(result)
            else:
                self._undo_for(waiting, result)
        return stale

    def _undo_for(self, waiting: _Waiting, result: Result) -> None:
        """Undo what a call reserved that has been cancelled while it was under way."""
        if waiting.call.kind is Kind.RESERVE and isinstance(result, Outcome) and result.allowed:
            self.undo(result)

    def _go_on(self) -> None:
        if self._queue:
            self._fly()
        else:
            self._rest()

    def _rest(self) -> None:
        """Nothing is left to do."""
        self._busy = False
        if self._idle is not None and not self._idle.done():
            self._idle.set_result(None)

    def _beat(self) -> None:
        """Look at Redis if nobody has for a while: is it there, and have budgets changed?

        NOTE: no call needs this, but an outage does. A node that shares must know the budgets of others, and `/`
        must not call well what is not.
        """
        self._heart = self._loop.call_later(HEARTBEAT_S, self._beat)
        self._told(self)
        if not self._busy and not self._used:
            self._busy = True
            self._task = self._loop.create_task(self._refresh_for([]))
        self._used = False

    async def _refresh_for(self, stale: list[_Waiting]) -> None:
        """Learn the budgets anew, and only then let callers try again."""
        try:
            async with asyncio.timeout_at(stale[0].until_s if stale else None):
                await self.refresh()
        except (LinkLost, TimeoutError) as error:
            lost = error if isinstance(error, LinkLost) else self._too_slow()
            self._broke(stale, LinkLost(str(lost), undone=True, at_once=lost.at_once))
            return
        for waiting in stale:
            if not waiting.future.done():
                waiting.future.set_exception(StaleHandle(_STALE))
        self._go_on()

    def _broke(self, batch: list[_Waiting], error: LinkLost) -> None:
        """A batch's answer did not come. What it may have reserved stays taken; what it settles is sent again."""
        if error.undone:
            self._queue.extendleft(reversed(batch))
        else:
            self.stats["unanswered"] += 1
            settlements = [waiting.call for waiting in batch if waiting.call.kind is Kind.SETTLE]
            if settlements:
                self._unanswered = (self._number, settlements)
            for waiting in batch:
                if waiting.call.kind is not Kind.SETTLE:
                    self._without_redis(waiting, str(error))
                elif not waiting.future.done():
                    waiting.future.set_result(0)
        self._link.drop(error)
        if not error.at_once:
            self._stand_alone(str(error))
        self._task = self._loop.create_task(self._return())

    def _closed(self, error: LinkLost) -> None:
        """The connection was closed while nothing was under way."""
        if not self._busy:
            self._busy = True
            self._broke([], LinkLost(str(error), undone=True, at_once=error.at_once))

    # --- while it is not up -------------------------------------------------------------------------------------

    async def _return(self) -> None:
        """Try to come back until that succeeds, then go on."""
        pause_s = FIRST_PAUSE_S
        while True:
            try:
                async with asyncio.timeout_at(self._patience_s()):
                    await self._come_back()
                break
            except LinkLost as error:
                trouble = error
            except TimeoutError:
                trouble = self._too_slow()
            except Exception:
                _log.exception(_FAULT)
                trouble = LinkLost(_FAULT)
            self._link.drop(trouble)
            self._stand_alone(str(trouble))
            await asyncio.sleep(pause_s * (1 + secrets.randbelow(100) / 200))
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
        if self.trouble is not None:
            self.trouble = None
            self._watch.back(self)
        self._has_been_tried()
        self._go_on()

    def _patience_s(self) -> float | None:
        """Return until when those who wait will wait for Redis to come back, if they still do."""
        if self.trouble is not None:
            return None
        return self._queue[0].until_s if self._queue else self._loop.time() + self._timeout_s

    async def _come_back(self) -> None:
        """Read the budgets, settle what is owed, and see that Redis can be written to."""
        await self.refresh()
        await self._settle_up()
        while True:
            self._number += 1
            self._unanswered = (self._number, self._owed.take())
            await self._settle_up()
            if not len(self._owed):
                return

    async def _settle_up(self) -> None:
        """Send settlements, again if their answer did not come before, under one number."""
        if self._unanswered is None:
            return
        number, calls = self._unanswered
        keys, payload = self._encoded(calls, number, recorded=True)
        self._count(decode(calls, await self.run(CALLS, keys, (payload,))))
        self._unanswered = None

    def _stand_alone(self, trouble: str) -> None:
        """Let the policy decide on all that wait, and on all that come until Redis is back."""
        if self.trouble is None:
            self._watch.lost(self, trouble)
        self.trouble = trouble
        self._has_been_tried()
        while self._queue:
            self._without_redis(self._queue.popleft(), trouble)

    def _has_been_tried(self) -> None:
        if not self._tried.done():
            self._tried.set_result(None)

    def _without_redis(self, waiting: _Waiting, trouble: str) -> None:
        """Let the policy decide on a call."""
        kind, refs, amounts, handle = waiting.call
        future = waiting.future
        if kind is Kind.SETTLE:
            self._owed.add(refs, amounts)
            if not future.done():
                future.set_result(0)
        elif future.done() or handle is None:
            pass
        elif kind is Kind.PEEK:
            future.set_exception(BackendDown("The shared budgets cannot be reached", trouble))
        elif handle.epoch != self._realm.mirror.epoch:
            future.set_exception(StaleHandle(_STALE))
        else:
            try:
                outcome = self._policy.reserve(handle, amounts, trouble)
            except Exception as error:  # whatever it is, somebody waits for it
                future.set_exception(error)
                return
            if outcome.allowed:
                self.stats["own"] += 1
                self.owe(handle, amounts)
            future.set_result(outcome)

    # --- the words of the scripts -------------------------------------------------------------------------------

    def _encoded(
        self, calls: Sequence[Call], number: int, *, recorded: bool, now_us: int | None = None
    ) -> tuple[list[bytes], bytes]:
        keys, payload = encode(calls, number, self._realm.mirror.epoch, recorded=recorded, now_us=now_us)
        return [self._realm.epoch_key, self._record_key, *keys], payload

    def _too_slow(self) -> LinkLost:
        return LinkLost(f"no answer within {self._timeout_s:g} s")

    def _count(self, reply: Reply) -> None:
        self.stats["forgiven"] += reply.forgiven
        self.stats["clock_steps"] += reply.clock_steps
