"""Many callers at once: the limit holds at every instant, and no token is lost or found."""

import random
import threading
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

from tests.timeline import RecordingBackend, replay, worst_excess
from tokenguard._bucket import BucketTable
from tokenguard.arithmetic import scale
from tokenguard.limiter import Limiter, Reservation
from tokenguard.model import BucketName, Identity
from tokenguard.plan import Plans

CALLERS = 64
CALLS = 50
ALICE = Identity("alice", team="search")
NAMES = [BucketName(scope) for scope in ALICE.scopes()]


def call(limiter, random_numbers):
    """Make one call: it takes more or less than estimated, or fails and is given back."""
    prompt = random_numbers.randint(1, 40)
    reserved = limiter.reserve(ALICE, "m", prompt, prompt + random_numbers.randint(1, 100))
    if not isinstance(reserved, Reservation):
        return
    if random_numbers.random() < 0.1:
        limiter.refund(reserved)
    else:
        limiter.settle(reserved, random_numbers.randint(0, 200))


def test_64_callers_of_one_user_never_get_more_than_its_budget():
    """Reserved less refunded never exceeds capacity + rate * t, and the levels end as the oracle's do."""
    backend = RecordingBackend(BucketTable(100))
    defaults = {
        "global": scale(5000, Fraction(100_000), 50_000),
        "team": scale(3000, Fraction(1000, 60), 30_000),
        "user": scale(1000, Fraction(166667, 10000), 10_000),
    }
    limiter = Limiter(backend, Plans(backend, defaults))
    together = threading.Barrier(CALLERS)

    def caller(seed):
        random_numbers = random.Random(seed)
        together.wait(10)
        for _ in range(CALLS):
            call(limiter, random_numbers)

    with ThreadPoolExecutor(CALLERS) as pool:
        for done in [pool.submit(caller, seed) for seed in range(CALLERS)]:
            done.result(60)

    assert len(backend.timeline) >= CALLERS * CALLS
    assert any(step.result and not step.result[0] for step in backend.timeline), "nobody was refused"
    assert any(step.result and step.result[0] for step in backend.timeline), "nobody passed"
    for name in NAMES:
        assert worst_excess(backend.timeline, name) <= 0
    oracle = replay(backend.timeline)
    for name in NAMES:
        assert backend.state(name) == oracle.stored(name.key)
