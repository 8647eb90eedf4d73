"""A flood of made-up identities fills nothing without bound, holds nobody up, and gives nobody a fresh bucket."""

import re
from pathlib import Path

import pytest

from tests.house import NOW_US, House, S, grant
from tests.oracle import OracleTable, Terms
from tokenguard._bucket import BucketTable
from tokenguard.errors import TableFull
from tokenguard.estimate import MAX_TRAFFICS, Estimator
from tokenguard.model import Decision, Identity
from tokenguard.plan import MAX_PLANS

FLOOD = 1_000_000
ROOM = 50_000
USER = grant(100, 5)


def resident_bytes():
    return int(re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def test_million_identities_find_no_room_for_more_than_there_is():
    """Without time to refill, a million users take all free buckets and no more; who is known goes on, drained."""
    table = BucketTable(ROOM, seed=b"flood")
    known = table.prepare([(b"user:known", USER)])
    oracle = OracleTable()
    plan = ((b"user:known", Terms(100, 5, 1000)),)
    table.reserve(known, (95,), NOW_US)
    oracle.reserve(plan, (95,), NOW_US)
    before, refused = resident_bytes(), 0
    for number in range(FLOOD):
        made_up = table.prepare([(b"user:%d" % number, USER)])
        try:
            table.reserve(made_up, (60,), NOW_US)
        except TableFull:
            refused += 1
        if number % 1000 == 0:
            asked = table.reserve(known, (20,), NOW_US)
            assert (asked.allowed, asked.level(0)) == (False, oracle.peek(plan, NOW_US).levels[0])
    assert refused == FLOOD - (ROOM - 1)
    assert table.stats()["used"] == ROOM
    assert table.stats()["refused_full"] == refused
    assert resident_bytes() - before < table.stats()["region_bytes"] + 8 * 2**20
    assert table.reserve(known, (5,), NOW_US).allowed


def test_identities_that_have_refilled_make_room_for_the_next():
    """As time passes, buckets that are full again serve newcomers, and a drained one is never among them."""
    table = BucketTable(1_000, seed=b"flood")
    debtor = table.prepare([(b"user:debtor", grant(100))])
    table.reserve(debtor, (100,), NOW_US)
    for number in range(100_000):
        made_up = table.prepare([(b"user:%d" % number, USER)])
        assert table.reserve(made_up, (1,), NOW_US + number * S // 1000).allowed
    later = NOW_US + 100 * S
    assert not table.reserve(debtor, (1,), later).allowed
    assert table.stats()["used"] <= 1_000


def test_plans_and_estimates_of_a_flood_are_forgotten():
    """What is remembered of callers is bounded, however many there are; a refused flood makes no bucket at all."""
    house = House({"global": grant(1_000), "user": USER}, buckets=100)
    for number in range(2 * MAX_PLANS):
        house.reserve(200, who=Identity(f"made-up-{number}"))
    assert house.plans.resolve.cache_info().currsize == MAX_PLANS
    assert house.table.stats()["used"] <= 1 + 1_000 // 50
    assert isinstance(house.reserve(200, who=Identity("one-more")), Decision)
    estimator = Estimator()
    for number in range(2 * MAX_TRAFFICS):
        estimator.learn(
            f"m{number}",
            f"t{number}",
            f"u{number}",
            text_256ths=2560,
            prompt_tokens=10,
            choices=1,
            output_tokens=5,
        )
    assert len(estimator._models) == len(estimator._teams) == len(estimator._users) == MAX_TRAFFICS


@pytest.mark.parametrize("more", [1, 1000])
def test_newcomer_without_room_is_refused_and_charges_nobody(more):
    """When a newcomer finds no room, the scopes above it are as they were."""
    house = House({"global": grant(10**6), "user": grant(100)}, buckets=3)
    for name in ("a", "b"):
        house.taken(10, who=Identity(name))
    before = house.stored("global")
    for number in range(more):
        with pytest.raises(TableFull):
            house.reserve(10, who=Identity(f"new-{number}"))
    assert house.stored("global") == before
