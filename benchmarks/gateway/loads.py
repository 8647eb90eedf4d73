"""The loads: what is asked for by how many at once, and of whom."""

from typing import NamedTuple

from benchmarks.gateway.rows import FEW

_ALL = ("direct", "nginx", "nginx-limits", "lane", "falcon", "first")


class Load(NamedTuple):
    """A load.

    Attributes:
        what: What it is, in a few words.
        connections: How many callers there are, each with one call under way at any time.
        rows: Whom it is for; it would say nothing about others.
        model: What is asked for; the provider goes by it.
        stream: Whether the answer is to come as events.
        users: How many users call; 0 for the one who has nothing left.
        awake: Whether the cores are kept from halting.
        references: The rows that all are compared with.
    """

    what: str
    connections: int
    rows: tuple[str, ...] = _ALL
    model: str = "gpt-4o-mini"
    stream: bool = False
    users: int = 1000
    awake: bool = False
    references: tuple[str, ...] = ("nginx-limits", "nginx")


_STREAMS = ("direct", "nginx", "nginx-unbuffered", *_ALL[2:])
LOADS = {
    "json": Load("a short call, a short answer", 64, (*_ALL, "splice")),
    "stream": Load("31 events back to back", 64, _STREAMS, stream=True),
    "paced": Load("31 events, one each 10 ms", 256, _STREAMS, model="gpt-4o-mini-paced", stream=True),
    "slow": Load("an answer after 50 ms", 256, model="gpt-4o-mini-slow"),
    "latency": Load("one call at a time", 1, (*_ALL, "splice"), awake=True),
    "refusals": Load(
        "calls of a user who has nothing left",
        64,
        ("nginx-refusing", "lane", "falcon"),
        users=0,
        references=("nginx-refusing",),
    ),
    "plan20": Load(
        "calls of ten users with 5 buckets, or with 20",
        64,
        ("nginx-limits", "lane", "lane-20"),
        users=FEW,
        references=("nginx-limits", "lane"),
    ),
    "rss": Load("memory after a call of each user", 64, ("nginx-limits", "lane", "falcon", "first"), users=10_000),
}
