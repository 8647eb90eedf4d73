"""The fast lane: a caller's connection to ``serve``, from the bytes of a request to those of its answer."""

import asyncio
from collections.abc import Callable
from typing import Any, Self

from typing_extensions import disjoint_base

from tokenguard.api.call import Guard
from tokenguard.upstream._pool import PooledUpstream

CHAT_ROUTE: str
"""The one path that the lane answers."""
KEEPALIVE_S: int
"""How long a caller's idle connection is kept: longer than clients keep theirs, so that it is they who close."""

@disjoint_base
class Lane:
    """What is the same for all connections of a server.

    Args:
        guard: Guards the calls.
        upstream: The provider.
    """

    def __new__(cls, guard: Guard, upstream: PooledUpstream) -> Self: ...

@disjoint_base
class Connection(asyncio.Protocol):
    """A caller's connection, as a protocol for uvicorn.

    Args:
        lane: The lane.
        fallback_of: Makes the protocol behind, which is given whatever is not for the lane; it tells by ``idle``
            whether it is between two requests, and is told by ``rest`` that somebody else reads the next.
        config: uvicorn's, as for all that follows.
        server_state: What the server's connections have in common.
        app_state: What the app has in common.
    """

    def __init__(
        self,
        lane: Lane,
        fallback_of: Callable[..., asyncio.Protocol],
        config: Any,  # noqa: ANN401 - uvicorn's, likewise below
        server_state: Any,  # noqa: ANN401
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None: ...
    def connection_lost(self, error: Exception | None) -> None: ...
    def shutdown(self) -> None:
        """End when the request that is being answered is; the server stops."""

    def cancel(self, msg: str | None = None) -> None:
        """End soon; the server has waited long enough."""

    def stop(self) -> None:
        """End at once."""
