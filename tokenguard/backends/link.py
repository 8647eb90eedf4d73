"""The way to Redis: redis-py finds it, connects and logs in; from then on the bytes are in our hands.

The only module that knows redis-py.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import socket
import ssl
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import hiredis
from redis.asyncio.cluster import ClusterNode, RedisCluster
from redis.asyncio.connection import Connection, SSLConnection, UnixDomainSocketConnection
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import MasterNotFoundError, Sentinel
from redis.backoff import NoBackoff

from tokenguard.backends.lane import LinkLost, answer_to
from tokenguard.backends.redis_url import RedisUrl
from tokenguard.backends.scripts import Script

_ONCE = Retry(NoBackoff(), 0)
"""The lane says when to connect again."""

_NOISE = re.compile(r"\.? script: [0-9a-f]{40}.*")
"""What Redis adds to the error of a script: which one, and where."""
_EVICTION = re.compile(rb"maxmemory_policy:((?!noeviction)\S+)")
_ELSEWHERE = frozenset(("MOVED", "ASK", "READONLY"))
"""Errors that say that the buckets are with another server now."""
_UNDONE = _ELSEWHERE | frozenset(
    ("BUSY", "CLUSTERDOWN", "LOADING", "MASTERDOWN", "MISCONF", "NOAUTH", "NOREPLICAS", "OOM", "TRYAGAIN")
)
"""Errors that say that nothing was done: our scripts write last, and what forbids the first write forbids all."""

_log = logging.getLogger("tokenguard")


class RedisLink:
    """A lane's connection to a server, to whichever one Sentinel names, or to a node of a cluster.

    Args:
        url: Where.
        key: Any of the realm's keys: in a cluster all of them are where this one is.
        timeout_s: How long all of it may take; of several Sentinels or nodes, each gets a part of that.
    """

    def __init__(self, url: RedisUrl, key: bytes, timeout_s: float) -> None:
        self.closed: Callable[[LinkLost], None] = _ignore
        self._url = url
        self._timeout_s = timeout_s / (len(url.hosts) + 1)
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
                wire = self._wire = Wire(await self._connection(), self.closed)
            except Exception as error:  # whatever redis-py says
                raise self._lost(error) from None
        await wire.ask("CLIENT", "SETNAME", "tokenguard")  # both of these a user may not be allowed: so be it
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
        how: dict[str, Any] = {"retry": _ONCE, "protocol": 2, **url.connection}
        if url.kind == "cluster":
            return await self._of_cluster(how)
        if url.kind == "sentinel":
            return await self._of_sentinel(how)
        how["db"] = url.database
        if url.path is not None:
            return await _connected(UnixDomainSocketConnection(path=url.path, **how))
        ((host, port),) = url.hosts
        kind = SSLConnection if how.pop("ssl", False) else Connection
        return await _connected(kind(host=host, port=port, **how))

    async def _of_cluster(self, how: dict[str, Any]) -> Any:  # noqa: ANN401 - redis-py's
        patience: dict[str, Any] = {"socket_timeout": self._timeout_s, "socket_connect_timeout": self._timeout_s}
        nodes = [ClusterNode(host, port) for host, port in self._url.hosts]
        cluster: Any = RedisCluster(startup_nodes=nodes, **how, **patience)
        try:
            await cluster.initialize()
            node = cluster.get_node_from_key(self._key)
            return await _connected(node.connection_class(**node.connection_kwargs))
        finally:
            await cluster.aclose()

    async def _of_sentinel(self, how: dict[str, Any]) -> Any:  # noqa: ANN401 - redis-py's
        url = self._url
        patience = {"socket_timeout": self._timeout_s, "socket_connect_timeout": self._timeout_s, "retry": _ONCE}
        sentinel: Any = Sentinel
        watching = sentinel(url.hosts, sentinel_kwargs={**url.sentinel, **patience}, **how)
        primary = watching.master_for(url.group, db=url.database)  # its connections know it, but do not keep it
        try:
            return await _connected(primary.connection_pool.make_connection())
        finally:
            for one in watching.sentinels:
                await one.aclose()

    def send(
        self, script: Script, keys: Sequence[bytes], args: Sequence[Any], answered: Callable[[Any], None]
    ) -> None:
        """Send a script at once; ``answered`` is called once, with its answer or with a ``LinkLost``."""
        wire = self._wire
        if wire is None:
            answered(LinkLost("there is no connection", undone=True, at_once=True))
            return
        rest = (len(keys), *keys, *args)

        def second(answer: Any) -> None:  # noqa: ANN401 - as the script returns
            answered(self._lost(answer) if isinstance(answer, Exception) else answer)

        def first(answer: Any) -> None:  # noqa: ANN401 - as the script returns
            if isinstance(answer, Refused) and answer.code == "NOSCRIPT":
                # Nothing was done: Redis was restarted, or told to forget its scripts.
                wire.send(("EVAL", script.text, *rest), second)
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
        cause = error.__cause__ or error.__context__ or error
        if isinstance(error, MasterNotFoundError):
            text = f"no Sentinel knows a primary of the group {self._url.group}"
        elif isinstance(cause, socket.gaierror):
            text = f"cannot connect: {cause.strerror}"
        elif isinstance(cause, OSError) and cause.errno and not isinstance(cause, ssl.SSLError):
            text = f"cannot connect: {os.strerror(cause.errno)}"
        else:
            text = _NOISE.sub("", " ".join(str(error).split())).rstrip(". ") or type(error).__name__
        for secret in self._url.secrets:
            text = text.replace(secret, "…")
        code = error.code if isinstance(error, Refused) else ""
        return LinkLost(f"{text[:200]} ({self._url})", undone=code in _UNDONE, at_once=code in _ELSEWHERE)


def _ignore(why: LinkLost) -> None:
    """Do nothing."""


async def _connected(connection: Any) -> Any:  # noqa: ANN401 - redis-py's
    try:
        await connection.connect()
    except BaseException:
        await connection.disconnect(nowait=True)
        raise
    return connection


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

    def __init__(self, connection: Any, closed: Callable[[LinkLost], None]) -> None:  # noqa: ANN401 - redis-py's
        self._connection = connection
        self._closed = closed
        self._transport: asyncio.Transport = connection._writer.transport  # noqa: SLF001 - see above
        self._transport.set_protocol(self)
        # PERF: uvloop holds back what is written until all that is ready has run, unless the limit is passed; so
        # Redis works on a batch while the callers of the one before run.
        self._transport.set_write_buffer_limits(high=0)
        self._answers = hiredis.Reader(protocolError=Refused, replyError=Refused)
        self._pending: deque[Callable[[Any], None]] = deque()
        self.is_open = not self._transport.is_closing()

    def send(self, command: tuple[Any, ...], answered: Callable[[Any], None]) -> None:
        """Send a command."""
        if not self.is_open:
            answered(LinkLost("the connection was closed", undone=True, at_once=True))
            return
        self._pending.append(answered)
        self._transport.write(hiredis.pack_command(command))

    async def ask(self, *command: Any) -> Any:  # noqa: ANN401 - as the command answers
        """Send a command and wait for its answer."""
        return await answer_to(partial(self.send, command))

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
        why = LinkLost("the connection was closed", at_once=True)
        nobody_waits = self.is_open and not self._pending
        self.abort(why)
        if nobody_waits:
            self._closed(why)

    def abort(self, why: LinkLost) -> None:
        """Close it, and tell whoever waits for an answer why there will be none."""
        self.is_open = False
        self._transport.abort()
        self._connection._reader = self._connection._writer = None  # noqa: SLF001 - it is closed, whatever it believes
        while self._pending:
            self._pending.popleft()(why)
