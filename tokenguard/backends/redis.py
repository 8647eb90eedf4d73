"""Buckets and budgets in Redis, shared exactly by any number of nodes."""

from __future__ import annotations

import asyncio
import os
import secrets
import threading
import weakref
from collections.abc import AsyncGenerator, Coroutine, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeVar

from tokenguard._bucket import BucketTable, Outcome
from tokenguard.backends.batch import MAX_AMOUNT, Kind, RedisHandle, checked, scale_text
from tokenguard.backends.lane import STATS, Lane, LinkLost
from tokenguard.backends.link import RedisLink
from tokenguard.backends.outage import OwnHandle, Policy, Watch
from tokenguard.backends.realm import Realm
from tokenguard.backends.redis_url import RedisUrl
from tokenguard.backends.scripts import CLAIM, CONFIGURE, SHARE, Script
from tokenguard.backends.workers import counted
from tokenguard.errors import BackendDown, BudgetNotFound
from tokenguard.model import BucketName, Budget

T = TypeVar("T")

_COUNTED = (*STATS, "dropped", "outages")
_STATES = ("owed_buckets", "lanes_down")
"""What a lane counts, and how things are with it."""


class LoopThread:
    """An event loop in a thread of its own, for callers who have none."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a finaliser may settle while this very thread has it
        self._under_way: set[Future[Any]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine there and wait for what it returns."""
        under_way: Future[T] | None = None
        try:
            with self._lock:  # whoever stops the thread takes on nothing more
                if self._loop is None:
                    self._begin()
                assert self._loop is not None  # noqa: S101 - it has begun
                under_way = asyncio.run_coroutine_threadsafe(work, self._loop)
                self._under_way.add(under_way)
            under_way.add_done_callback(self._under_way.discard)
            return under_way.result()
        except BaseException:
            if under_way is not None:
                under_way.cancel()  # interrupted: nobody would know of what it takes
            raise

    def _begin(self) -> None:
        loop = asyncio.new_event_loop()
        thread = threading.Thread(target=loop.run_forever, name="tokenguard-redis", daemon=True)
        thread.start()
        if self._loop is None:
            self._loop, self._thread = loop, thread
        else:  # a finaliser came in between, and has begun another
            loop.call_soon_threadsafe(loop.stop)

    def stop(self) -> None:
        """Let what is under way end, and end the thread."""
        with self._lock:
            loop, thread, self._loop, self._thread = self._loop, self._thread, None, None
        if loop is not None and thread is not None:
            wait(list(self._under_way))
            asyncio.run_coroutine_threadsafe(loop.shutdown_asyncgens(), loop).result()
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()

    @property
    def is_this(self) -> bool:
        """Whether it is the thread that asks."""
        return self._thread is threading.current_thread()

    @property
    def runs(self) -> bool:
        """Whether there is a thread."""
        return self._loop is not None


class RedisBackend:
    """Buckets and budgets in Redis.

    Each event loop has a lane of its own, which ends with it; callers without a loop share one, in a thread.

    Args:
        url: Where Redis is.
        realm: The name of what nodes share: others on the same Redis have other realms.
        policy: What decides while Redis is down.
        table: The node's own table, for that.
        timeout_s: How long a call may wait for Redis.
    """

    waits = True
    changes_wait = True

    def __init__(self, url: RedisUrl, realm: str, policy: Policy, table: BucketTable, timeout_s: float) -> None:
        self._url = url
        self._realm = Realm(realm)
        self._policy = policy
        self._watch = Watch(policy.means)
        self.table = table
        self._timeout_s = timeout_s
        self._tallies = {name: table.tally(b"redis_" + name.encode()) for name in (*_COUNTED, *_STATES)}
        self.on = self._realm.on
        self._forget_lanes()
        _backends.add(self)

    def _forget_lanes(self) -> None:
        """Begin without lanes, as a process must that was forked off: its threads and loops are not here."""
        self._lanes: dict[asyncio.AbstractEventLoop, Lane] = {}
        self._ends: dict[asyncio.AbstractEventLoop, AsyncGenerator[None, None]] = {}
        self._thread = LoopThread()
        self._counting = threading.Lock()
        self._counted: dict[Lane | None, dict[str, int]] = {}
        self._changes_under_way: set[asyncio.Task[bool]] = set()
        self._closing: set[asyncio.Task[None]] = set()

    def _lane(self) -> Lane:
        """Return the lane of the running event loop."""
        loop = asyncio.get_running_loop()
        lane = self._lanes.get(loop)
        if lane is None:
            for ended in [known for known in self._lanes if known.is_closed()]:
                self._forget(self._lanes.pop(ended))
                self._ends.pop(ended, None)
            link = RedisLink(self._url, self._realm.epoch_key, self._timeout_s)
            lane = self._lanes[loop] = Lane(
                link, self._realm, self._policy, self._watch, self._timeout_s, self._count
            )
            self._ends[loop] = end = self._end_of(lane)
            with suppress(StopIteration):
                end.asend(None).send(None)  # as far as its yield, whereby the loop knows of it
        return lane

    async def _end_of(self, lane: Lane) -> AsyncGenerator[None, None]:
        """Close a lane when this is closed, which is what ``asyncio.run`` and its kin do with all generators."""
        loop = asyncio.get_running_loop()
        try:
            yield
        finally:
            if self._lanes.get(loop) is lane:
                del self._lanes[loop]
                self._ends.pop(loop, None)
                await lane.close()
                self._forget(lane)

    # --- what it is and how it is -----------------------------------------------------------------------------

    @property
    def epoch(self) -> str:
        """The epoch of the budgets as they are known."""
        epoch: str = self._realm.mirror.epoch
        return epoch

    def describe(self) -> str:
        """Return what this backend is."""
        return f"redis at {self._url}, realm {self._realm.name}; while it is away, {self._policy.means}"

    def trouble(self) -> str | None:
        """Return what is wrong, if anything is."""
        found = next((lane.trouble for lane in list(self._lanes.values()) if lane.trouble is not None), None)
        return None if found is None else f"Redis is unavailable: {found}; until it is back, {self._policy.means}"

    def stats(self) -> dict[str, int]:
        """Return the counters of the node: what other processes counted is up to a second old."""
        for lane in list(self._lanes.values()):
            self._count(lane)
        node = counted(self.table)
        totals = {name: node[b"redis_" + name.encode()] for name in self._tallies}
        return {**totals, "owed": totals["owed_buckets"], "up": int(totals["lanes_down"] == 0)}

    def _count(self, lane: Lane) -> None:
        """Count for the node what a lane has counted since it was counted last, and how things are with it."""
        states = (lane.owed, int(lane.trouble is not None))
        self._add(lane, {**lane.stats, "dropped": lane.dropped, **dict(zip(_STATES, states, strict=True))})
        self._add(None, {"outages": self._watch.outages})

    def _forget(self, lane: Lane) -> None:
        """Count a last time what a lane has counted, and nothing of how things are with it anymore."""
        self._count(lane)
        self._add(lane, {**self._counted[lane], **dict.fromkeys(_STATES, 0)})
        del self._counted[lane]

    def _add(self, whose: Lane | None, now: dict[str, int]) -> None:
        with self._counting:
            before = self._counted.get(whose, {})
            for name, number in now.items():
                self._tallies[name].add(number - before.get(name, 0))
            self._counted[whose] = now

    def open(self) -> None:
        """Be ready: a thread connects when it first asks."""

    async def start(self) -> None:
        """Connect, and know the budgets; a Redis that is down does not keep a node from starting."""
        await self._lane().ready()

    async def stop(self) -> None:
        """Let what is under way end, and disconnect."""
        await self._close_lane()
        await asyncio.to_thread(self.close)

    def close(self) -> None:
        """Do so for callers without an event loop, and have the other loops do so, which nobody waits for."""
        if self._thread.runs:
            self._thread.stop()
        for loop in list(self._ends):
            with suppress(RuntimeError):  # it is closed
                loop.call_soon_threadsafe(self._begin_to_close)

    def _begin_to_close(self) -> None:
        task = asyncio.get_running_loop().create_task(self._close_lane())
        self._closing.add(task)  # a loop alone does not keep its tasks
        task.add_done_callback(self._closing.discard)

    async def _close_lane(self) -> None:
        end = self._ends.pop(asyncio.get_running_loop(), None)
        if end is not None:
            await end.aclose()

    # --- calls ------------------------------------------------------------------------------------------------

    def prepare(self, budgets: Sequence[Budget], epoch: str | None = None) -> RedisHandle:
        """Make a plan ready."""
        return self._realm.prepare(self.table, budgets, epoch)

    async def reserve_soon(
        self, handle: RedisHandle, costs: tuple[int, ...], now_us: int | None = None
    ) -> Outcome:
        """Take each cost from all buckets of the plan, or from none. Cancelled, it takes nothing.

        Raises:
            StaleHandle: A budget changed since the plan was prepared; the change is known by now.
            BackendDown: Redis is not to be had, and the policy says so.
            ValueError: A cost is negative or over 2^53, or there are not as many as buckets.
        """
        lane = self._lane()
        future = lane.ask(Kind.RESERVE, handle, checked(costs, len(handle.refs), 0), now_us)
        try:
            outcome: Outcome = await future
        except asyncio.CancelledError:
            # NOTE: what came before the caller could be told is nobody's; the lane sees to what comes after.
            if future.done() and not future.cancelled() and not future.exception() and future.result().allowed:
                lane.undo(future.result())
            raise
        return outcome

    def settle_soon(
        self, handle: RedisHandle | OwnHandle, deltas: tuple[int, ...], now_us: int | None = None
    ) -> asyncio.Future[int]:
        """Charge each bucket its delta; it is done even if nobody waits for it, as soon as Redis can be had.

        Returns:
            How many tokens were forgiven, 0 if that is not known yet.

        Raises:
            ValueError: A delta is beyond 2^53, or there are not as many as buckets; nothing was changed.
        """
        lane = self._lane()
        checked(deltas, len(handle), -MAX_AMOUNT)
        if not isinstance(handle, OwnHandle):
            return lane.ask(Kind.SETTLE, handle, deltas, now_us)
        settled: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        settled.set_result(handle.settle(deltas))
        lane.owe(handle.redis, deltas)
        return settled

    async def peek_soon(self, handle: RedisHandle, now_us: int | None = None) -> Outcome:
        """Return the buckets as a reserve would find them.

        Raises:
            BackendDown: Redis is not to be had.
        """
        outcome: Outcome = await self._lane().ask(Kind.PEEK, handle, (), now_us)
        return outcome

    def reserve(self, handle: RedisHandle, costs: tuple[int, ...], now_us: int | None = None) -> Outcome:
        """Do what ``reserve_soon`` does, for a thread."""
        return self._thread.run(self.reserve_soon(handle, costs, now_us))

    def settle(self, handle: RedisHandle | OwnHandle, deltas: tuple[int, ...], now_us: int | None = None) -> int:
        """Do what ``settle_soon`` does, for a thread."""
        if self._thread.is_this:
            # NOTE: what nobody closed is settled where it is collected, and that may be in any thread: this one
            # must not wait for itself.
            self.settle_soon(handle, deltas, now_us)
            return 0

        async def settle() -> int:
            return await self.settle_soon(handle, deltas, now_us)

        return self._thread.run(settle())

    def peek(self, handle: RedisHandle, now_us: int | None = None) -> Outcome:
        """Do what ``peek_soon`` does, for a thread."""
        return self._thread.run(self.peek_soon(handle, now_us))

    def claim(self, what: str, for_s: float, now_s: float) -> bool:  # noqa: ARG002 - Redis has a clock of its own
        """Return whether it is for this process, of all nodes', to do something now.

        Raises:
            BackendDown: Redis is not to be had.
        """
        run = self._run(CLAIM, self._realm.claim_key(what), str(int(for_s * 1000)))
        return bool(self._thread.run(run))

    def share(self, what: str, numbers: Mapping[str, int], for_s: float) -> list[tuple[str, int]]:
        """Let the other nodes know some numbers for a while; return theirs, with their names.

        Raises:
            BackendDown: Redis is not to be had.
        """
        told = [str(part) for pair in numbers.items() for part in pair]
        key, node = self._realm.share_key(what), self.table.identity.hex()
        theirs = self._thread.run(self._run(SHARE, key, node, str(int(for_s * 1e6)), *told))
        return [
            (name.decode(errors="replace"), int(number))
            for name, number in zip(theirs[::2], theirs[1::2], strict=True)
        ]

    async def _run(self, script: Script, key: bytes, *args: str) -> Any:  # noqa: ANN401 - as the script returns
        """Run what is nothing to buckets and budgets."""
        async with self._reached("Nothing can be agreed on with the other nodes") as lane:
            return await lane.run(script, (key,), args)

    @asynccontextmanager
    async def _reached(self, else_told: str) -> AsyncGenerator[Lane, None]:
        """Have the lane of Redis, once that has been tried, without waiting for one that is known to be away.

        Raises:
            BackendDown: It is, or goes meanwhile.
        """
        lane = self._lane()
        await lane.ready()
        try:
            if lane.trouble is not None:
                raise LinkLost(lane.trouble)
            yield lane
        except LinkLost as error:
            raise BackendDown(else_told, str(error)) from None

    # --- budgets ----------------------------------------------------------------------------------------------

    def refresh(self) -> None:
        """Know the budgets as they are now.

        Raises:
            BackendDown: Redis is not to be had.
        """
        self._thread.run(self._refresh())

    async def _refresh(self) -> Lane:
        async with self._reached("The shared budgets cannot be reached") as lane:
            await lane.refresh()
        return lane

    def budgets(self) -> list[Budget]:
        """Return all explicit budgets, in the order of their names."""
        return self._realm.mirror.all

    def put(self, budget: Budget, level: int | None = None, now_us: int | None = None) -> None:
        """Set an explicit budget.

        Raises:
            BackendDown: Redis is not to be had; whether the budget is set, it alone knows.
        """
        text = scale_text(budget.scale)
        self._thread.run(self._configure(budget.name, text, text, level, now_us))

    def put_soon(self, budget: Budget, level: int, now_us: int | None = None) -> asyncio.Future[bool] | bool:
        """Set an explicit budget, unless there is one, by one script call; the next reserve tells the mirror.

        Raises:
            BackendDown: Redis is not to be had, and there is no event loop to tell later.
        """
        work = self._put_soon(budget, level, now_us)
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            return self._thread.run(work)
        task = loop.create_task(work)
        self._changes_under_way.add(task)  # a loop alone does not keep its tasks
        task.add_done_callback(self._changes_under_way.discard)
        return asyncio.shield(task)  # whoever waits may be cancelled

    async def _put_soon(self, budget: Budget, level: int, now_us: int | None) -> bool:
        text = scale_text(budget.scale)
        lane = self._lane()
        if lane.trouble is not None:
            raise BackendDown("The budget is not changed", lane.trouble)
        try:
            keys, args = self._change(budget.name, text, text, level, now_us)
            done, *_ = await lane.run(CONFIGURE, keys, (*args, "1"))
        except LinkLost as error:
            raise BackendDown("Whether the budget is changed is not known", str(error)) from None
        if done < 0:  # there are no budgets yet
            return await self._configure(budget.name, text, text, level, now_us)
        return bool(done == 1)

    def drop(self, name: BucketName, default: Budget | None, now_us: int | None = None) -> None:
        """Remove an explicit budget.

        Raises:
            BudgetNotFound: There is none.
            BackendDown: Redis is not to be had; whether the budget is there, it alone knows.
        """
        then = "" if default is None else scale_text(default.scale)
        if not self._thread.run(self._configure(name, "", then, None, now_us)):
            raise BudgetNotFound(f"there is no budget for {name}")

    def _change(
        self, name: BucketName, explicit: str, then: str, level: int | None, now_us: int | None
    ) -> tuple[tuple[bytes, ...], tuple[Any, ...]]:
        """Return the keys and arguments of ``lua/configure.lua``."""
        keys = (*self._realm.budgets_keys, self._realm.bucket_key(name))
        optional = ["" if value is None else str(value) for value in (level, now_us)]
        return keys, (name.key, explicit, then, optional[0], secrets.token_hex(8), optional[1])

    async def _configure(
        self, name: BucketName, explicit: str, then: str, level: int | None, now_us: int | None
    ) -> bool:
        """Change one budget; return False if there was nothing to remove."""
        keys, args = self._change(name, explicit, then, level, now_us)
        for _ in range(2):
            lane = await self._refresh()  # and so there are budgets to change
            try:
                done, forgiven, clock_steps = await lane.run(CONFIGURE, keys, args)
            except LinkLost as error:
                raise BackendDown("Whether the budget is changed is not known", str(error)) from None
            if done >= 0:
                lane.stats["forgiven"] += forgiven
                lane.stats["clock_steps"] += clock_steps
                await self._refresh()
                return bool(done)
        raise BackendDown("The budget is not changed", "the budgets in Redis were lost meanwhile")


_backends: weakref.WeakSet[RedisBackend] = weakref.WeakSet()


def _after_fork() -> None:
    for backend in list(_backends):
        ends = list(backend._ends.values())  # noqa: SLF001 - of this module
        backend._forget_lanes()  # noqa: SLF001 - of this module
        for end in ends:
            with suppress(StopIteration, RuntimeError):
                end.aclose().send(None)  # there is no lane anymore, and so nothing is done


os.register_at_fork(after_in_child=_after_fork)
