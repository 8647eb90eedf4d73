"""A simulated provider with a count of its own, and nodes that keep calls within it, in simulated time."""

from __future__ import annotations

import heapq
import random
from fractions import Fraction
from itertools import count

from tests.house import ALICE, MODEL, NOW_US, S
from tokenguard import arithmetic
from tokenguard._bucket import BucketTable
from tokenguard.backends.memory import MemoryBackend
from tokenguard.limiter import Limiter, Reservation
from tokenguard.model import GLOBAL, GLOBAL_ID, BucketName, Budget, Meter, Scope, Source
from tokenguard.plan import Plans


def learned(limit, *, meter=Meter.TOKENS, source=Source.HEADERS, window_s=60, model=MODEL):
    """Return the budget that a limit of the provider's makes."""
    name = BucketName(Scope(GLOBAL, GLOBAL_ID), meter, model, source)
    return Budget(name, arithmetic.scale(limit, Fraction(limit, window_s), 10 * limit))


class Provider:
    """A bucket that refills all the time, as the provider keeps it."""

    def __init__(self, limit):
        self.limit = limit
        self.level = float(limit)
        self.at_us = NOW_US

    def flow(self, now_us):
        self.level = min(self.limit, self.level + (now_us - self.at_us) * self.limit / (60 * S))
        self.at_us = now_us

    def takes(self, cost, now_us):
        self.flow(now_us)
        if self.level < cost:
            return False
        self.level -= cost
        return True

    @property
    def remaining(self):
        return max(0, int(self.level))


class InWindows(Provider):
    """A count that begins anew with every minute, as Azure keeps it."""

    def flow(self, now_us):
        if (now_us - NOW_US) // (60 * S) > (self.at_us - NOW_US) // (60 * S):
            self.level = float(self.limit)
        self.at_us = now_us


class Sent:
    """One call under way."""

    def __init__(self, node, reservation, cost, used, waits):
        self.node = node
        self.reservation = reservation
        self.cost = cost
        self.used = used
        self.reach_us, self.head_us, self.end_us = waits
        self.taken = False
        self.remaining = 0
        self.counted_at = -1


class Mirror:
    """Calls at random, through some processes that share a table, to a provider.

    Args:
        seed: Of all that is random.
        counting: How the provider counts: "openai" the larger of prompt and max_tokens, "azure" both, "usage" what
            was used, once it is known.
        limit: Of tokens per minute.
        load: What is offered, in limits.
        processes: How many share the table.
        others: What others spend, in limits.
        reordered: Whether calls overtake each other on the way there.
        estimates: How far the prompt's estimate is off.
        long: How large a part of the answers takes very long.
        burst: How many calls come at once.
        windows: Whether the provider counts in windows.
        meter: What the limit is on.
    """

    PROMPT, CAP = (20, 400), (50, 1000)
    MEAN = 735

    def __init__(
        self, seed, counting="openai", *, limit=100_000, load=3.0, processes=1, others=0.0, reordered=True,
        estimates=(0.8, 1.3), long=0.0, burst=1, windows=False, meter=Meter.TOKENS,
    ):  # fmt: skip
        self.random = random.Random(seed)
        self.counting = counting
        self.limit = limit
        self.processes = processes
        self.reordered = reordered
        self.estimates = estimates
        self.long = long
        self.burst = burst
        self.meter = meter
        self.mean = self.MEAN if meter is Meter.TOKENS else 1
        self.provider = (InWindows if windows else Provider)(limit)
        table = BucketTable(64, seed=b"mirror")
        self.budget = learned(limit, meter=meter)
        backends = [MemoryBackend(table) for _ in range(processes)]
        backends[0].put(self.budget, limit, NOW_US)
        self.backend = backends[0]
        self.nodes = [Limiter(backend, Plans(backend, {})) for backend in backends]
        self.handle = self.backend.prepare([self.budget])
        self.events = []
        self.numbers = count()
        self.per_s = load * limit / 60 / self.mean / burst
        self.others_per_s = others * limit / 60 / self.mean
        self.history = []  # what the provider counted, in its order: (tokens, of a call of ours)
        self.heard_to = 0  # how much of it the answers told that were heard
        self.forwarded = self.refused = self.counted = self.lowered = 0

    def at(self, now_us, what, *args):
        heapq.heappush(self.events, (now_us, next(self.numbers), what, args))

    def run(self, seconds, looks=None):
        """Run for so long; ``looks`` is called after every event."""
        self.at(NOW_US, self.comes)
        if self.others_per_s:
            self.at(NOW_US, self.other)
        while self.events:
            now_us, _, what, args = heapq.heappop(self.events)
            if now_us > NOW_US + seconds * S and what in (self.comes, self.other):
                continue
            what(now_us, *args)
            self.provider.flow(now_us)
            if looks is not None:
                looks(self, now_us)

    def excess(self, now_us):
        """Return by how much our level is above the provider's."""
        return self.backend.peek(self.handle, now_us).level(0) - self.provider.level

    def comes(self, now_us):
        self.at(now_us + int(self.random.expovariate(self.per_s) * S) + 1, self.comes)
        for _ in range(self.burst):
            self.call(now_us)

    def call(self, now_us):
        rnd = self.random
        node = rnd.randrange(self.processes)
        prompt, cap = rnd.randint(*self.PROMPT), rnd.randint(*self.CAP)
        estimate = int(prompt * rnd.uniform(*self.estimates))
        used = prompt + int(cap * rnd.uniform(0.2, 1.0))
        reserved = self.nodes[node].reserve(
            ALICE, MODEL, estimate, estimate + cap // 2, estimate + cap, now_us=now_us
        )
        if not isinstance(reserved, Reservation):
            return
        if self.meter is Meter.TOKENS:
            reserved.expect(max(prompt, cap))
        cost = {"openai": max(prompt, cap), "azure": prompt + cap, "usage": 0}[self.counting]
        if self.meter is Meter.REQUESTS:
            cost = 1
        waits = rnd.uniform(0.01, 0.12) if self.reordered else 0.02, rnd.uniform(0.2, 3.0), rnd.uniform(0.05, 1.0)
        if rnd.random() < self.long:
            waits = waits[0], rnd.uniform(10, 40), waits[2]
        self.forwarded += 1
        sent = Sent(node, reserved, cost, used, [int(wait * S) for wait in waits])
        self.at(now_us + sent.reach_us, self.reaches, sent)

    def other(self, now_us):
        self.at(now_us + int(self.random.expovariate(self.others_per_s) * S) + 1, self.other)
        if self.provider.takes(self.mean, now_us):
            self.history.append(self.mean)

    def reaches(self, now_us, sent):
        sent.taken = self.provider.takes(sent.cost, now_us)
        sent.remaining = self.provider.remaining
        if sent.taken:
            self.history.append(sent.cost)
            self.counted += sent.cost
        else:
            self.refused += 1
        sent.counted_at = len(self.history)
        self.at(now_us + (sent.head_us if sent.taken else 50_000), self.answers, sent)

    def answers(self, now_us, sent):
        told = (sent.remaining, -1) if self.meter is Meter.TOKENS else (-1, sent.remaining)
        lowering = sent.reservation.lowering(*told, isinstance(self.provider, InWindows))
        node = self.nodes[sent.node]
        self.heard_to = max(self.heard_to, sent.counted_at)
        if lowering is not None:
            self.lowered += sum(lowering)
            node.lower(sent.reservation, lowering, now_us)
        self.at(now_us + (sent.end_us if sent.taken else 0), self.ends, sent)

    def ends(self, now_us, sent):
        if self.counting == "usage" and sent.taken:
            self.provider.flow(now_us)
            self.provider.level -= sent.used
            self.counted += sent.used
        self.nodes[sent.node].settle(sent.reservation, sent.used if sent.taken else 0, now_us)
