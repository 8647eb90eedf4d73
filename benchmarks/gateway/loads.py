"""The loads: what is asked for by how many at once, and of whom."""

from typing import NamedTuple

from benchmarks.gateway.rows import FEW

_ALL = ("direct", "nginx", "nginx-limits", "lane", "falcon", "first")


class Load(NamedTuple):
    """A load.

    Attributes:
        what: What it is, in a few words.
        connections: How many callers there are, each with one call under way at any time.
        rows: Whom it is meant for.
        model: What is asked for; the provider goes by it.
        stream: Whether the answer is to come as events.
        users: How many users call; 0 for the one who has nothing left.
        awake: Whether the cores are kept from halting.
    """

    what: str
    connections: int
    rows: tuple[str, ...] = _ALL
    model: str = "gpt-4o-mini"
    stream: bool = False
    users: int = 1000
    awake: bool = False


LOADS = {
    "json": Load("a short call, a short answer", 64),
    "stream": Load("31 events back to back", 64, ("direct", "nginx", "nginx-unbuffered", *_ALL[2:]), stream=True),
    "paced": Load(
        "31 events, one each 10 ms",
        256,
        ("direct", "nginx", "nginx-unbuffered", *_ALL[2:]),
        model="gpt-4o-mini-paced",
        stream=True,
    ),
    "slow": Load("an answer after 50 ms", 256, model="gpt-4o-mini-slow"),
    "latency": Load("one call at a time", 1, awake=True),
    "refusals": Load("calls of a user who has nothing left", 64, ("nginx-refusing", "lane", "falcon"), users=0),
    "plan20": Load("a few users with 5 buckets, or with 20", 64, ("nginx-limits", "lane", "lane-20"), users=FEW),
    "rss": Load("memory after calls of 10 000 users", 64, ("nginx-limits", "lane", "falcon", "first"), users=10_000),
}
