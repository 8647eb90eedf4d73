"""A limit of the provider's of which others spend, as the answers of our calls show it."""

from tests.mirror import learned
from tokenguard.headroom import Headroom


class Watched:
    """The provider's limit of a model, of which others spend as a test says.

    Args:
        limit: Of a minute, unless ``of`` says otherwise.
    """

    def __init__(self, limit=100_000, model="m", **of):
        self.budget = learned(limit, model=model, **of)
        self.room = Headroom()
        self.room.hold(limit, 0)
        self.above = 0

    def spend(self, amount):
        """Have a call's answer tell that others have spent some more."""
        self.above -= amount
        level = self.budget.scale.capacity // 2
        self.room.told(level + self.above - self.room.moved, self.room.charge(level, 1))


def looks(others, *watched, now_s):
    """Return what is told of all meters."""
    told = others.look([(one.budget, one.room) for one in watched], now_s)
    return {model: rate for rates in told.values() for model, rate in rates.items()}


def spends(others, watched, seconds, per_s, *, start_s=0):
    """Have others spend ten times a second, with a look every ten seconds; return the last that is told."""
    return spends_of([(others, watched, per_s)], seconds, start_s)[0]


def spends_of(processes, seconds, start_s=0):
    """Have each of some processes see others spend at a rate; return the last that each tells."""
    for step in range(1, seconds * 10 + 1):
        for _, watched, per_s in processes:
            watched.spend(per_s // 10)
        if step % 100 == 0:
            told = [looks(others, watched, now_s=start_s + step / 10) for others, watched, _ in processes]
    return told
