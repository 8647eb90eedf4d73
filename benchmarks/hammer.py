"""Hammer one user with 64 callers for some seconds, then check every decision against the oracle.

Run: python -m benchmarks.hammer [seconds]
"""

import random
import sys
import threading
import time
from fractions import Fraction

from tests.timeline import RecordingBackend, replay, worst_excess
from tokenguard._bucket import BucketTable
from tokenguard.arithmetic import scale
from tokenguard.limiter import Limiter, Reservation
from tokenguard.model import BucketName, Identity
from tokenguard.plan import Plans

CALLERS = 64
ALICE = Identity("alice", "search", "analyst", "batch")


def caller(limiter, seed, until):
    """Reserve, take a provider's time, settle; again and again."""
    random_numbers = random.Random(seed)
    while time.monotonic() < until:
        prompt = random_numbers.randint(1, 100)
        reserved = limiter.reserve(ALICE, "m", prompt, prompt + random_numbers.randint(1, 300))
        time.sleep(random_numbers.uniform(0.002, 0.02))
        if isinstance(reserved, Reservation):
            if random_numbers.random() < 0.05:
                limiter.refund(reserved)
            else:
                limiter.settle(reserved, random_numbers.randint(0, 500))


def main(seconds):
    """Hammer, check, tell."""
    budget = scale(50_000, Fraction(1_000_000, 3), 500_000)
    backend = RecordingBackend(BucketTable(1000))
    kinds = ("global", "team", "rolegroup", "role", "user")
    limiter = Limiter(backend, Plans(backend, dict.fromkeys(kinds, budget)))
    until = time.monotonic() + seconds
    threads = [threading.Thread(target=caller, args=(limiter, seed, until)) for seed in range(CALLERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    timeline = backend.timeline
    asked = [step for step in timeline if step.result is not None]
    allowed = sum(step.result[0] for step in asked)
    print(f"{CALLERS} callers, {seconds} s: {allowed} reserves allowed, {len(asked) - allowed} refused")
    oracle = replay(timeline)
    print(f"every one of {len(asked)} decisions and its levels: as the oracle's")
    for name in (BucketName(scope) for scope in ALICE.scopes()):
        excess = worst_excess(timeline, name)
        level, expected = backend.state(name), oracle.stored(name.key)
        print(f"{name}: sum(reserved - refunded) - (capacity + rate * t) <= {float(excess):.3f} tokens;", end=" ")
        print(f"state {level} {'equals' if level == expected else 'DIFFERS FROM ' + str(expected)} the oracle's")
        if excess > 0 or level != expected:
            sys.exit(1)


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 5.0)
