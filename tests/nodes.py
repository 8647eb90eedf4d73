"""A node of TokenGuard without its HTTP: a limiter and budgets over a real Redis, wired as the server does it."""

from __future__ import annotations

import asyncio
import time

from tests.house import MODEL, grant, named, told
from tokenguard import engine
from tokenguard.budgets import Budgets
from tokenguard.config import read_config
from tokenguard.limiter import Limiter, Reservation
from tokenguard.model import Budget, Identity, Meter
from tokenguard.plan import Plans

TIMEOUT_S = 0.4
"""How long the calls of a hasty node may wait for Redis."""
PATIENCE_S = 20
"""How long a test waits for what must happen soon."""


class Node:
    """One node.

    Args:
        url: As ``REDIS_URL`` has it.
        defaults: Kinds of scopes to their default scales; a grant of 1,000 for each user if there are none.
        **settings: Further settings, such as ``TOKENGUARD_REDIS_DOWN="open"``.
    """

    timeout_s = 10
    """A busy machine may hold up a batch for long, and that is no outage."""

    def __init__(self, url, defaults=None, **settings):
        environ = {
            "REDIS_URL": url,
            "TOKENGUARD_REDIS_TIMEOUT_S": self.timeout_s,
            "TOKENGUARD_BUCKETS": 1000,
            **settings,
        }
        self.backend = engine.buckets(read_config({name: str(value) for name, value in environ.items()}))
        plans = Plans(self.backend, {"user": grant(1000)} if defaults is None else defaults)
        self.limiter = Limiter(self.backend, plans)
        self.budgets = Budgets(self.backend, plans)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.backend.close()

    def reserve(self, tokens, user="alice", **who):
        """Ask for a reservation of ``tokens``, all of them for the prompt."""
        return told(self.limiter.reserve(Identity(user, **who), MODEL, tokens, tokens))

    def taken(self, tokens, user="alice", **who):
        """Return a reservation, which must not be refused."""
        reserved = self.reserve(tokens, user, **who)
        assert isinstance(reserved, Reservation), reserved
        return reserved

    async def reserve_soon(self, tokens, user="alice", **who):
        return told(await self.limiter.reserve_soon(Identity(user, **who), MODEL, tokens, tokens))

    def set(self, scope, scale, level=None, meter=Meter.TOKENS, model=None):
        """Set an explicit budget."""
        return self.budgets.put(Budget(named(scope, meter, model), scale), level)

    def level(self, scope="user:alice"):
        """Return the level of a bucket as Redis has it."""
        return self.budgets.get(named(scope)).level

    @property
    def trouble(self):
        return self.backend.trouble()

    def comes_back(self):
        """Wait until Redis is had again."""
        until(lambda: self.trouble is None, "the node does not come back")

    def goes_down(self):
        """Make calls until the node has noticed that Redis is lost."""

        async def ask():
            await asyncio.gather(self.reserve_soon(0, "nobody"), return_exceptions=True)

        def is_down():
            self.backend._thread.run(ask())
            return self.trouble is not None

        until(is_down, "the node does not notice")


class HastyNode(Node):
    """A node that soon gives Redis up, for tests of that."""

    timeout_s = TIMEOUT_S


def until(condition, otherwise, patience_s=PATIENCE_S):
    """Wait for what must happen soon; return it."""
    deadline = time.monotonic() + patience_s
    while not (happened := condition()):
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.01)
    return happened
