"""Buckets and budgets in Redis, shared exactly by any number of nodes."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import secrets
import threading
import weakref
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

import hiredis
import redis.asyncio as aioredis
from redis.asyncio.cluster import ClusterNode
from redis.asyncio.connection import Connection, SSLConnection, UnixDomainSocketConnection
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from tokenguard._bucket import BucketTable, Outcome
from tokenguard.backends.batch import Kind, RedisHandle, scale_text
from tokenguard.backends.lane import STATS, Lane, LinkLost
from tokenguard.backends.outage import OwnHandle, Policy
from tokenguard.backends.realm import Realm
from tokenguard.backends.redis_url import RedisUrl
from tokenguard.backends.scripts import CONFIGURE, Script
from tokenguard.errors import BackendDown, BudgetNotFound
from tokenguard.model import BucketName, Budget

_ONCE = Retry(NoBackoff(), 0)
"""The lane says when to connect again."""

_EVICTION = re.compile(rb"maxmemory_policy:((?!noeviction)\S+)")
_ELSEWHERE = frozenset(("MOVED", "ASK", "READONLY"))
"""Errors that say that the buckets are with another server now."""
_UNDONE = _ELSEWHERE | frozenset(
    (
        "BUSY",
        "CLUSTERDOWN",
        "LOADING",
        "MASTERDOWN",
        "MISCONF",
        "NOAUTH",
        "NOPERM",
        "NOREPLICAS",
        "OOM",
        "TRYAGAIN",
    )
)
"""Errors that say that nothing was done: our scripts write last, and what forbids the first write forbids all."""

_log = logging.getLogger("tokenguard")

T = TypeVar("T")


class RedisLink:
    """A lane's connection to a server, to whichever one Sentinel names, or to a node of a cluster.

    redis-py finds it, connects, and logs in; from then on its bytes are in our hands.

    Args:
        url: Where.
        key: Any of the realm's keys: in a cluster all of them are where this one is.
    """

    def __init__(self, url: RedisUrl, key: bytes) -> None:
        self._url = url
        self._key = key.decode()
        self._wire: Wire | None = None
        self._lock = asyncio.Lock()
        self._evicts = False

    async def connect(self) -> None:
        """Make a connection, if there is none; warn of a Redis that forgets buckets when its memory is full.

        Raises:
            LinkLost: There is none to be had.
        """
        async with self._lock:
            if self._wire is not None and self._wire.is_open:
                return
            try:
                wire = self._wire = Wire(await self._connection())
            except (RedisError, OSError) as error:
                raise self._lost(error) from None
        info = await wire.ask("INFO", "memory")
        found = _EVICTION.search(info) if isinstance(info, bytes) else None
        if found and not self._evicts:
            _log.warning(
                "Redis evicts keys when its memory is full (maxmemory-policy %s): an evicted bucket comes back "
                "full. Set it to noeviction",
                found[1].decode(),
            )
        self._evicts = found is not None

    async def _connection(self) -> Any:  # noqa: ANN401 - redis-py's connections, whose types say little
        """Return a connection that redis-py has made."""
        url = self._url
        how: dict[str, Any] = {"retry": _ONCE, "client_name": "tokenguard", "protocol": 2, **url.connection}
        if url.kind == "cluster":
            nodes = [ClusterNode(host, port) for host, port in url.hosts]
            cluster: Any = aioredis.RedisCluster(startup_nodes=nodes, **how)
            try:
                await cluster.initialize()
                node = cluster.get_node_from_key(self._key)
                connection = node.connection_class(**node.connection_kwargs)
            finally:
                await cluster.aclose()
        elif url.kind == "sentinel":
            sentinel: Any = Sentinel
            watching = sentinel(url.hosts, sentinel_kwargs=url.sentinel, **how)
            connection = watching.master_for(url.group, db=url.database).connection_pool.make_connection()
        elif url.path is not None:
            connection = UnixDomainSocketConnection(path=url.path, db=url.database, **how)
        else:
            ((host, port),) = url.hosts
            how["host"], how["port"], how["db"] = host, port, url.database
            connection = SSLConnection(**how) if how.pop("ssl", False) else Connection(**how)
        await connection.connect()
        return connection

    def send(
        self, script: Script, keys: Sequence[bytes], args: Sequence[Any], answered: Callable[[Any], None]
    ) -> None:
        """Send a script at once; ``answered`` is called once, with its answer or with a ``LinkLost``."""
        wire = self._wire
        if wire is None or not wire.is_open:
            answered(LinkLost("the connection was closed", undone=True, at_once=True))
            return
        rest = (len(keys), *keys, *args)

        def second(answer: Any) -> None:  # noqa: ANN401 - as the script returns
            answered(self._lost(answer) if isinstance(answer, Exception) else answer)

        def first(answer: Any) -> None:  # noqa: ANN401 - as the script returns
            if isinstance(answer, Refused) and answer.code == "NOSCRIPT" and wire.is_open:
                wire.send(
                    ("EVAL", script.text, *rest), second
                )  # Redis was restarted, or told to forget its scripts
            else:
                second(answer)

        wire.send(("EVALSHA", script.sha, *rest), first)

    def drop(self, why: LinkLost) -> None:
        """Close the connection; whoever waits for an answer is told why there will be none."""
        wire, self._wire = self._wire, None
        if wire is not None:
            wire.abort(why)

    def _lost(self, error: Exception) -> LinkLost:
        """Return what an error means to the lane, in one line and without a password."""
        if isinstance(error, LinkLost):
            return error
        text = " ".join(str(error).split()) or type(error).__name__
        for secret in self._url.secrets:
            text = text.replace(secret, "…")
        code = error.code if isinstance(error, Refused) else ""
        return LinkLost(text[:200], undone=code in _UNDONE, at_once=code in _ELSEWHERE)


class Refused(Exception):
    """Redis answered with an error.

    Attributes:
        code: The word that it begins with.
    """

    @property
    def code(self) -> str:
        """The word that it begins with."""
        return str(self).partition(" ")[0]


class Wire(asyncio.Protocol):
    """A connection of redis-py's, taken over: answers come in the order of the commands, each to a callback.

    PERF: a stream's reader and its locks cost as much as the batch; rows "one caller" of test_bench_redis.

    NOTE: redis-py has no public name for a connection's transport.
    """

    def __init__(self, connection: Any) -> None:  # noqa: ANN401 - redis-py's
        self._connection = connection
        self._transport: asyncio.Transport = connection._writer.transport  # noqa: SLF001 - see above
        self._transport.set_protocol(self)
        # PERF: uvloop holds back what is written until all that is ready has run, unless the limit is passed. So Redis
        # works on a batch while the callers of the one before run.
        self._transport.set_write_buffer_limits(high=0)
        self._answers = hiredis.Reader(protocolError=Refused, replyError=Refused)
        self._pending: deque[Callable[[Any], None]] = deque()
        self.is_open = not self._transport.is_closing()

    def send(self, command: tuple[Any, ...], answered: Callable[[Any], None]) -> None:
        """Send a command."""
        self._pending.append(answered)
        self._transport.write(hiredis.pack_command(command))

    async def ask(self, *command: Any) -> Any:  # noqa: ANN401 - as the command answers
        """Send a command and wait for its answer."""
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

        def answered(what: Any) -> None:  # noqa: ANN401 - as the command answers
            if not answer.done():
                answer.set_result(what)

        self.send(command, answered)
        return await answer

    def data_received(self, data: bytes) -> None:
        """Hand out the answers that are whole."""
        self._answers.feed(data)
        try:
            while self._pending and (answer := self._answers.gets()) is not False:
                self._pending.popleft()(answer)
        except Refused as error:
            self.abort(LinkLost(f"Redis does not speak its protocol: {error}"))

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - as asyncio calls it
        """Nothing more will come."""
        self.abort(LinkLost("the connection was closed", at_once=True))

    def abort(self, why: LinkLost) -> None:
        """Close it, and tell whoever waits for an answer why there will be none."""
        self.is_open = False
        self._transport.abort()
        self._connection._reader = self._connection._writer = None  # noqa: SLF001 - it is closed, whatever it believes
        while self._pending:
            self._pending.popleft()(why)


class LoopThread:
    """An event loop in a thread of its own, for callers who have none."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine there and wait for what it returns."""
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(
                    target=self._loop.run_forever, name="tokenguard-redis", daemon=True
                )
                self._thread.start()
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def stop(self) -> None:
        """End the thread."""
        with self._lock:
            loop, thread, self._loop, self._thread = self._loop, self._thread, None, None
        if loop is not None and thread is not None:
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()

    @property
    def runs(self) -> bool:
        """Whether there is a thread."""
        return self._loop is not None


class RedisBackend:
    """Buckets and budgets in Redis.

    Each event loop has a lane of its own; callers without a loop share one, in a thread.

    Args:
        url: Where Redis is.
        realm: The name of what nodes share: others on the same Redis have other realms.
        policy: What decides while Redis is down.
        table: The node's own table, for that.
        timeout_s: How long a call may wait for Redis.
    """

    waits = True

    def __init__(self, url: RedisUrl, realm: str, policy: Policy, table: BucketTable, timeout_s: float) -> None:
        self._url = url
        self._realm = Realm(realm)
        self._policy = policy
        self._table = table
        self._timeout_s = timeout_s
        self.on = self._realm.on
        self._forget_lanes()
        _backends.add(self)

    def _forget_lanes(self) -> None:
        """Begin without lanes, as a process must that was forked off: its threads and loops are not here."""
        self._lanes: dict[asyncio.AbstractEventLoop, Lane] = {}
        self._thread = LoopThread()

    def _lane(self) -> Lane:
        """Return the lane of the running event loop."""
        loop = asyncio.get_running_loop()
        lane = self._lanes.get(loop)
        if lane is None:
            for ended in [known for known in self._lanes if known.is_closed()]:
                del self._lanes[ended]
            link = RedisLink(self._url, self._realm.epoch_key)
            lane = self._lanes[loop] = Lane(link, self._realm, self._policy, self._timeout_s)
        return lane

    # --- what it is and how it is -----------------------------------------------------------------------------

    @property
    def epoch(self) -> str:
        """The epoch of the budgets as they are known."""
        return self._realm.mirror.epoch

    def describe(self) -> str:
        """Return what this backend is."""
        return f"redis at {self._url}, realm {self._realm.name}"

    def trouble(self) -> str | None:
        """Return what is wrong, if anything is."""
        found = next((lane.trouble for lane in list(self._lanes.values()) if lane.trouble is not None), None)
        return None if found is None else f"Redis is not to be had: {found}; the policy is {self._policy.name!r}"

    def stats(self) -> dict[str, int]:
        """Return counters, summed over the lanes."""
        lanes = list(self._lanes.values())
        totals = dict.fromkeys((*STATS, "owed", "dropped"), 0)
        totals["up"] = int(all(lane.trouble is None for lane in lanes))
        for lane in lanes:
            for name, number in {**lane.stats, "owed": lane.owed, "dropped": lane.dropped}.items():
                totals[name] += number
        return totals

    async def start(self) -> None:
        """Connect, and know the budgets; a Redis that is down does not keep a node from starting."""
        await self._lane().ready()

    async def stop(self) -> None:
        """Let what is under way end, and disconnect."""
        lane = self._lanes.pop(asyncio.get_running_loop(), None)
        if lane is not None:
            await lane.close()
        await asyncio.to_thread(self.close)

    def close(self) -> None:
        """Do so for callers without an event loop."""
        if self._thread.runs:
            self._thread.run(self._close_lane())
            self._thread.stop()

    async def _close_lane(self) -> None:
        lane = self._lanes.pop(asyncio.get_running_loop(), None)
        if lane is not None:
            await lane.close()

    # --- calls ------------------------------------------------------------------------------------------------

    def prepare(self, budgets: Sequence[Budget], epoch: str | None = None) -> RedisHandle:
        """Make a plan ready."""
        return self._realm.prepare(self._table, budgets, epoch)

    async def reserve_soon(
        self, handle: RedisHandle, costs: tuple[int, ...], now_us: int | None = None
    ) -> Outcome:
        """Take each cost from all buckets of the plan, or from none. Cancelled, it takes nothing.

        Raises:
            StaleHandle: A budget changed since the plan was prepared; the change is known by now.
            BackendDown: Redis is not to be had, and the policy says so.
        """
        lane = self._lane()
        future = lane.ask(Kind.RESERVE, handle, costs, now_us)
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
        """
        lane = self._lane()
        if not isinstance(handle, OwnHandle):
            return lane.ask(Kind.SETTLE, handle, deltas, now_us)
        settled: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        settled.set_result(self._policy.settle(handle, deltas))
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

        async def settle() -> int:
            return await self.settle_soon(handle, deltas, now_us)

        return self._thread.run(settle())

    def peek(self, handle: RedisHandle, now_us: int | None = None) -> Outcome:
        """Do what ``peek_soon`` does, for a thread."""
        return self._thread.run(self.peek_soon(handle, now_us))

    # --- budgets ----------------------------------------------------------------------------------------------

    def refresh(self) -> None:
        """Know the budgets as they are now.

        Raises:
            BackendDown: Redis is not to be had.
        """
        self._thread.run(self._refresh())

    async def _refresh(self) -> Lane:
        lane = self._lane()
        try:
            await lane.refresh()
        except LinkLost as error:
            raise BackendDown(f"the shared budgets cannot be reached: {error}") from None
        return lane

    def budgets(self) -> list[Budget]:
        """Return all explicit budgets, in the order of their names."""
        return self._realm.mirror.all()

    def put(self, budget: Budget, level: int | None = None, now_us: int | None = None) -> None:
        """Set an explicit budget.

        Raises:
            BackendDown: Redis is not to be had; whether the budget is set, it alone knows.
        """
        text = scale_text(budget.scale)
        self._thread.run(self._configure(budget.name, text, text, level, now_us))

    def drop(self, name: BucketName, default: Budget | None, now_us: int | None = None) -> None:
        """Remove an explicit budget.

        Raises:
            BudgetNotFound: There is none.
            BackendDown: Redis is not to be had; whether the budget is there, it alone knows.
        """
        then = "" if default is None else scale_text(default.scale)
        if not self._thread.run(self._configure(name, "", then, None, now_us)):
            raise BudgetNotFound(f"there is no budget for {name}")

    async def _configure(
        self, name: BucketName, explicit: str, then: str, level: int | None, now_us: int | None
    ) -> bool:
        """Change one budget; return False if there was nothing to remove."""
        keys = (self._realm.epoch_key, self._realm.budgets_key, self._realm.bucket_key(name))
        optional = ["" if value is None else str(value) for value in (level, now_us)]
        args = (name.key, explicit, then, optional[0], secrets.token_hex(8), optional[1])
        for _ in range(2):
            lane = await self._refresh()  # and so there are budgets to change
            try:
                done, forgiven, clock_steps = await lane.run(CONFIGURE, keys, args)
            except LinkLost as error:
                raise BackendDown(f"the budget may be changed or not: {error}") from None
            if done >= 0:
                lane.stats["forgiven"] += forgiven
                lane.stats["clock_steps"] += clock_steps
                await self._refresh()
                return bool(done)
        raise BackendDown("the budgets in Redis were lost while one was being changed; try again")


_backends: weakref.WeakSet[RedisBackend] = weakref.WeakSet()


def _after_fork() -> None:
    for backend in list(_backends):
        backend._forget_lanes()  # noqa: SLF001 - of this module


os.register_at_fork(after_in_child=_after_fork)
