"""The hop to the provider: a pool of connections that are kept, over HTTP/1.1, for one loop.

What is written in C, such as the fast lane, is told of an answer by a ``Receiver``, without a task, and sees what
stands in ``_pool.pxd``. Whoever can wait uses ``PooledUpstream``.

A connection carries one request at a time. The newest idle one is taken first; after ``upstream.KEEPALIVE_S`` an
idle one is closed. What the provider closed meanwhile, or said unasked, is noticed before the next request.

A request is sent a second time only if it was sent over a connection that had been used before, that connection
ended before a single byte of an answer had come, and the request may be repeated.

Source: RFC 9110, section 9.2.2; RFC 9112, sections 9.3 and 9.6
"""

import asyncio
from typing import Final, Self, final

from typing_extensions import disjoint_base

from tokenguard.model import Headers, UpstreamRequest
from tokenguard.upstream import Hop

LOOK_AFTER_S: Final[float]
"""A connection that has been idle for as long is looked at before it is used; until then, the loop has told."""
MAX_HELD_BYTES: Final[int]
"""How much of an answer is held for a slow reader before no more of it is taken from the provider: 64 KiB."""

@disjoint_base
class Receiver:
    """Who is told, in C, what becomes of a request; may be subclassed there alone."""

@final
class Connection:
    """One connection, as a protocol of asyncio's; the pool makes them.

    Args:
        pool: Whose it is.
    """

    def __new__(cls, pool: Pool) -> Self: ...
    def connection_made(self, transport: asyncio.Transport) -> None: ...
    def data_received(self, data: bytes) -> None: ...
    def eof_received(self) -> None: ...
    def connection_lost(self, error: Exception | None) -> None: ...
    def pause_writing(self) -> None: ...
    def resume_writing(self) -> None: ...

@final
class Pool:
    """The connections to one provider. Its ``repr`` tells how many are idle, busy and coming about, and who waits.

    Where the provider has several addresses, they are tried one after the other; each may take its share of the
    time for a connection, and one that did not answer is tried last from then on.

    Args:
        hop: Where the provider is, and how patient we are.
        loop: Whose loop; that which runs at the first call by default.
    """

    def __new__(cls, hop: Hop, loop: asyncio.AbstractEventLoop | None = None) -> Self: ...
    @property
    def hop(self) -> Hop: ...
    async def close(self) -> None:
        """Close all connections, for good; whoever waits for something is told that there will be nothing."""

@final
class Response(Receiver):
    """An answer whose head has come: an ``UpstreamResponse``, and an iterator over its body.

    NOTE: Over TLS, an answer that tells no length and is cut by a third party passes for a whole one on asyncio's
    own loop, which takes any end for one that the provider meant; uvloop does not.
    """

    def __new__(cls, pool: Pool) -> Self: ...
    @property
    def status(self) -> int:
        """The status: 200 to 599."""

    @property
    def headers(self) -> Headers:
        """The fields, as they came: the names in lower case."""

    def chunks(self) -> Response:
        """Return what yields the body as it comes, not decoded."""

    def __aiter__(self) -> Response: ...
    async def __anext__(self) -> bytes:
        """Return what has come since, and wait for it if that is nothing.

        Raises:
            UpstreamError: It broke off; ``sent`` is True.
            UpstreamTimeout: Nothing came for ``hop.read_timeout_s``, or all took over ``hop.total_timeout_s``.
        """

    async def close(self) -> None:
        """Drop the connection, if it still carries this."""

@final
class PooledUpstream:
    """A provider that is reached directly: an ``Upstream``.

    Args:
        hop: Where it is, and how patient we are.
        loop: Whose loop; that which runs at the first call by default.
    """

    def __new__(cls, hop: Hop, loop: asyncio.AbstractEventLoop | None = None) -> Self: ...
    @property
    def pool(self) -> Pool: ...
    def describe(self) -> str:
        """Return the base URL, without what a URL can hide in it."""

    async def open(self, request: UpstreamRequest) -> Response:
        """Send a request and wait for the head of its answer. Whoever waits may be cancelled.

        Raises:
            UpstreamBusy: All connections are in use; ``sent`` is False.
            UpstreamTimeout: No connection came about within ``hop.connect_timeout_s``, and ``sent`` is False; or
                no head within ``hop.read_timeout_s``, counted from when the provider last took in some of the
                request, and ``sent`` is True.
            UpstreamError: The provider could not be reached, and ``sent`` is False; or it did not answer as HTTP
                asks, and ``sent`` is True.
        """

    async def close(self) -> None:
        """Close all connections, for good."""
