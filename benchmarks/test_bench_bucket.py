"""What a call through five scopes costs in the engine, beside an empty call and beside what others do for it.

Every row's function makes ``CALLS`` calls for identities in a random order, drawn beforehand; README.md says what
the rows mean.
"""

import asyncio
import random
from fractions import Fraction
from itertools import cycle

import pytest
from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import FixedWindowRateLimiter

import tokenguard
from tokenguard._bucket import BucketTable
from tokenguard.arithmetic import scale
from tokenguard.backends.memory import MemoryBackend
from tokenguard.limiter import Limiter
from tokenguard.model import SCOPE_KINDS, Identity
from tokenguard.plan import Plans

CALLS = 1_000
SCOPES = 5
FAR = {"CAP": 10**12, "RATE": 10**10 / 3}
AMPLE = scale(10**12, Fraction(10**10, 3), 10**13)
EMPTY = scale(1, Fraction(1, 1000), 10)

pytestmark = pytest.mark.benchmark(group="five scopes")


def measure(benchmark, name, work, callers):
    """Time ``work``, a loop over ``CALLS`` callers, as the row ``name``: other callers in every round."""
    random.Random(name).shuffle(callers)
    rounds = cycle([callers[i : i + CALLS] for i in range(0, len(callers), CALLS)])
    benchmark.name = name
    benchmark.extra_info["calls"] = CALLS
    work(next(rounds))
    benchmark(lambda: work(next(rounds)))


def path(user):
    """Return the keys of a user's five scopes: ten teams, three rolegroups, twenty roles."""
    return (
        b"global:*",
        b"team:%d" % (user % 10),
        b"rolegroup:%d" % (user % 3),
        b"role:%d" % (user % 20),
        b"user:%d" % user,
    )


def test_empty_call(benchmark):
    def call(handle, costs):
        pass

    def work(callers):
        for caller in callers:
            call(caller, None)

    measure(benchmark, "baseline: an empty call", work, list(range(CALLS)))


@pytest.mark.parametrize(("users", "shown"), [(1_000, "1 000"), (100_000, "100 000")])
def test_reserve_and_settle(benchmark, users, shown):
    table = BucketTable(users + 100)
    costs, deltas = (900,) * SCOPES, (-400,) * SCOPES

    def work(handles):
        for handle in handles:
            table.reserve(handle, costs)
            table.settle(handle, deltas)

    handles = [table.prepare((key, AMPLE) for key in path(user)) for user in range(users)]
    measure(benchmark, f"BucketTable reserve + settle, {shown} users", work, handles)
    assert table.reserve(handles[0], costs).allowed


def test_refused(benchmark):
    table = BucketTable(2_000)
    costs = (900,) * SCOPES

    def work(handles):
        for handle in handles:
            table.reserve(handle, costs)

    handles = []
    for user in range(1_000):
        *above, own = path(user)
        handles.append(table.prepare([*((key, AMPLE) for key in above), (own, EMPTY)]))
        table.reserve(handles[-1], (1,) * SCOPES)
    measure(benchmark, "BucketTable reserve, refused", work, handles)
    assert not table.reserve(handles[0], costs).allowed


def test_twenty_buckets(benchmark):
    table = BucketTable(10_000)
    costs, deltas = (900, 900, 1, 1) * SCOPES, (-400, -400, 0, 0) * SCOPES
    meters = (b"tokens", b"tokens of model", b"requests", b"requests of model")

    def work(handles):
        for handle in handles:
            table.reserve(handle, costs)
            table.settle(handle, deltas)

    handles = [
        table.prepare((key + b" " + meter, AMPLE) for key in path(user) for meter in meters)
        for user in range(1_000)
    ]
    measure(benchmark, "BucketTable reserve + settle, 20 buckets", work, handles)
    assert table.reserve(handles[0], costs).allowed


def test_limiter(benchmark):
    backend = MemoryBackend(BucketTable(2_000))
    limiter = Limiter(backend, Plans(backend, dict.fromkeys(SCOPE_KINDS, AMPLE)))

    def work(callers):
        for caller in callers:
            limiter.settle(limiter.reserve(caller, "gpt-4o-mini", 300, 900), 500)

    callers = [
        Identity(f"user-{user}", f"team-{user % 10}", f"role-{user % 20}", f"rolegroup-{user % 3}")
        for user in range(1_000)
    ]
    measure(benchmark, "Limiter reserve + settle, 1 000 users", work, callers)
    assert limiter.reserve(callers[0], "gpt-4o-mini", 300, 900).decision.allowed


def library():
    """Return a limiter of the library with the same budgets, and the same callers."""
    budgets = {f"{what}_{kind.upper()}": amount for kind in SCOPE_KINDS for what, amount in FAR.items()}
    callers = [
        {
            "user": f"user-{n}",
            "team": f"team-{n % 10}",
            "role": f"role-{n % 20}",
            "rolegroup": f"rolegroup-{n % 3}",
        }
        for n in range(1_000)
    ]
    return tokenguard.Limiter(**budgets), callers


def test_block(benchmark):
    limiter, callers = library()

    def work(callers):
        for caller in callers:
            with limiter.reserve(**caller, model="gpt-4o-mini", tokens=900) as call:
                call.settle(500)

    measure(benchmark, "library: with limiter.reserve(...) + settle, 1 000 users", work, callers)
    assert len(limiter.peek(**callers[0])) == SCOPES


def test_async_block(benchmark):
    limiter, callers = library()

    async def calls(callers):
        for caller in callers:
            async with limiter.reserve(**caller, model="gpt-4o-mini", tokens=900) as call:
                call.settle(500)

    with asyncio.Runner() as runner:
        measure(
            benchmark,
            "library: async with limiter.reserve(...) + settle, 1 000 users",
            lambda callers: runner.run(calls(callers)),
            callers,
        )
    assert len(limiter.peek(**callers[0])) == SCOPES


def test_limits(benchmark):
    limiter = FixedWindowRateLimiter(MemoryStorage())
    ample = RateLimitItemPerMinute(10**12)

    def work(callers):
        for a, b, c, d, e in callers:
            limiter.hit(ample, a)
            limiter.hit(ample, b)
            limiter.hit(ample, c)
            limiter.hit(ample, d)
            limiter.hit(ample, e)

    callers = [tuple(key.decode() for key in path(user)) for user in range(1_000)]
    measure(benchmark, "limits: five hits, 1 000 users", work, callers)
    assert limiter.hit(ample, *callers[0][:1])
