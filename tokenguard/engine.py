"""The engine that a configuration describes: what every way in is built upon."""

from __future__ import annotations

import os
from collections.abc import Mapping

from dotenv import dotenv_values

from tokenguard.backends import Backend
from tokenguard.backends.memory import MemoryBackend
from tokenguard.backends.node import Node, open_node
from tokenguard.backends.outage import Closed, Open, Policy, Share
from tokenguard.backends.workers import join
from tokenguard.budgets import Budgets
from tokenguard.config import Config
from tokenguard.errors import InvalidSetting
from tokenguard.estimate import Estimator
from tokenguard.limiter import Limiter
from tokenguard.plan import Plans


def environment() -> Mapping[str, str]:
    """Return the environment, and what ``.env`` in the working directory adds to it.

    Raises:
        InvalidSetting: ``.env`` is not text.
    """
    try:
        written = dotenv_values(".env")
    except UnicodeDecodeError as error:
        raise InvalidSetting(".env", f".env must be UTF-8: {error}") from None
    return {**{name: value for name, value in written.items() if value is not None}, **os.environ}


def node_of(config: Config) -> Node:
    """Open what the processes of this node share, as the configuration says.

    Raises:
        InvalidSetting: It cannot be had.
    """
    return open_node(config.buckets, config.table, config.state)


def buckets(config: Config, node: Node | None = None) -> Backend:
    """Return the backend that the configuration names.

    Args:
        config: The configuration.
        node: What the processes of this node share; opened here by default.

    Raises:
        InvalidSetting: It cannot be opened.
    """
    node = node or node_of(config)
    table = node.table
    if config.redis is None:
        return MemoryBackend(*node)
    from tokenguard.backends.redis import RedisBackend  # whoever has none need not load it

    policy: Policy = Closed()
    if config.redis_down == "open":
        policy = Open(table)
    elif config.redis_down == "share" and config.nodes is not None:
        policy = Share(table, config.nodes)
    return RedisBackend(config.redis, config.realm, policy, table, config.redis_timeout_s)


class Engine:
    """Buckets, budgets, and what decides by them.

    Args:
        config: What to go by.
        backend: Where the buckets live; the one that the configuration names by default.

    Attributes:
        config: The configuration.
        backend: Where the buckets live.
        limiter: Reserves and settles.
        budgets: Sets, lists and removes budgets.
        estimator: Estimates calls, and learns from them.

    Raises:
        InvalidSetting: What the configuration names cannot be opened.
    """

    def __init__(self, config: Config, backend: Backend | None = None) -> None:
        self.config = config
        self.backend = backend = backend or buckets(config)
        join(backend.table)
        plans = Plans(backend, config.defaults, config.provider_limits)
        self.limiter = Limiter(backend, plans)
        self.budgets = Budgets(backend, plans)
        self.estimator = Estimator()
