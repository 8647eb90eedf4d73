"""What nodes do while Redis is away, by the policy they were given, and what becomes of it afterwards."""

import time
from contextlib import ExitStack
from fractions import Fraction

import pytest

from tests.house import grant
from tests.nodes import HastyNode, until
from tests.proxy import Road
from tokenguard.errors import BackendDown
from tokenguard.limiter import Reservation
from tokenguard.model import Decision, Meter


def share(url, nodes=2, **more):
    return HastyNode(url, TOKENGUARD_REDIS_DOWN="share", TOKENGUARD_NODES=nodes, **more)


# --- share ------------------------------------------------------------------------------------------------------


def test_share_serves_a_part_of_each_budget(redis):
    """One of two nodes goes by half of what there is, and refuses what is beyond it as ever."""
    with share(redis.url, defaults={"user": grant(1000, 1)}) as node:
        node.taken(1)
        redis.kill()
        node.goes_down()

        for _ in range(5):
            node.taken(100)
        decision = node.reserve(100)

        assert isinstance(decision, Decision)
        assert str(decision.binding.name.scope) == "user:alice"
        assert (decision.binding.limit, decision.binding.remaining) == (500, 0)


def test_workers_of_one_node_have_one_share(redis, tmp_path):
    """Those that share a table go by the node's part together, whichever of them is asked."""
    table = {"TOKENGUARD_TABLE": tmp_path / "table", "defaults": {"user": grant(1000)}}
    with share(redis.url, **table) as one, share(redis.url, **table) as other:
        for worker in (one, other):
            worker.taken(1)
        redis.kill()
        for worker in (one, other):
            worker.goes_down()

        for worker in (one, other, one, other):
            worker.taken(125)

        for worker in (one, other):
            with pytest.raises(BackendDown, match="share is used up"):
                worker.reserve(1)


def test_share_refills_at_its_part_of_the_rate(redis):
    """A bucket of a node refills at half the rate if there are two."""
    with share(redis.url, defaults={"user": grant(1000, 10)}) as node:
        node.taken(1)
        redis.kill()
        node.goes_down()
        node.taken(500)

        decision = node.reserve(5)

        assert isinstance(decision, Decision)
        assert 900_000 < decision.retry_after_us <= 1_000_000


def test_never_is_judged_by_the_whole_budget(redis):
    """What is more than the budget never passes; what is more than the node's share of it may pass later."""
    with share(redis.url) as node:
        node.taken(1)
        redis.kill()
        node.goes_down()

        never = node.reserve(2001)

        assert never.retry_after_us == 10**15
        node.taken(900)
        with pytest.raises(BackendDown, match="share"):
            node.reserve(1)


def test_share_of_nothing_serves_nobody(redis):
    """A budget of one request cannot be halved."""
    with share(redis.url) as node:
        node.set("user:alice", grant(1), meter=Meter.REQUESTS)
        node.taken(1, "bob")
        redis.kill()
        node.goes_down()

        with pytest.raises(BackendDown, match="cannot be shared"):
            node.reserve(1)
        node.taken(1, "bob")


def test_node_that_has_never_seen_the_budgets_serves_nobody():
    """It cannot know what to share."""
    with share("redis://127.0.0.1:1") as node, pytest.raises(BackendDown, match="never seen"):
        node.reserve(1)


def test_call_larger_than_the_share_reserves_all_of_it(redis):
    """It passes, and what it used beyond is debt, on the node and in Redis."""
    with Road(redis.port) as road, share(road.url, 5, defaults={"user": grant(1000, 1)}) as node:
        node.taken(1, "nobody")
        road.block()
        node.goes_down()
        reservation = node.taken(450)
        assert isinstance(node.reserve(1), Decision)
        node.limiter.settle(reservation, 480)

        decision = node.reserve(1)

        assert decision.binding.level == 200 - 480
        road.clear()
        node.comes_back()
        until(lambda: 520 <= node.level() <= 525, "it is not charged")


def test_node_that_nobody_asks_knows_a_budget_that_another_node_set(redis):
    """Were it to learn of budgets by its own calls alone, it would share what is not there."""
    with share(redis.url) as idle, HastyNode(redis.url) as other:
        idle.taken(1, "nobody")
        other.set("user:alice", grant(10))
        until(lambda: idle.backend.epoch == other.backend.epoch, "it does not learn of it")
        redis.kill()
        idle.goes_down()

        idle.taken(5)

        with pytest.raises(BackendDown, match="share"):
            idle.reserve(1)


def test_what_was_spent_alone_is_charged_on_return(redis):
    """Settled, kept, refunded and still open: the shared bucket is charged for each what it took."""
    with Road(redis.port) as road, share(road.url) as node, HastyNode(redis.url) as other:
        before = node.taken(200)
        road.block()
        node.goes_down()
        node.limiter.settle(before, 50)
        used, refunded, kept, left_open = (node.taken(100) for _ in range(4))
        node.limiter.settle(used, 130)
        node.limiter.refund(refunded)
        kept.close()
        assert other.level() == 800

        road.clear()
        node.comes_back()

        until(lambda: other.level() == 1000 - 50 - 130 - 100 - 100, "it is not charged")
        node.limiter.settle(left_open, 10)  # in its own table at once, in Redis with the next batch
        until(lambda: other.level() == 1000 - 50 - 130 - 100 - 10, "it is not charged")


def test_levels_of_a_node_outlive_an_outage(redis):
    """A Redis that comes and goes grants nothing anew."""
    with Road(redis.port) as road, share(road.url) as node:
        node.taken(1)
        taken = 0
        for _ in range(4):
            road.block()
            node.goes_down()
            taken += sum(isinstance(_tried(node, 100), Reservation) for _ in range(9))
            road.clear()
            node.comes_back()

        assert taken == 5


def _tried(node, tokens):
    try:
        return node.reserve(tokens)
    except BackendDown:
        return None


@pytest.mark.parametrize("nodes", [2, 3])
def test_nodes_cut_off_admit_no_more_than_one_budget_more(redis, nodes):
    """All together 2C + 2R·t at most, with some cut off and some not, again and again; all is repaid as debt."""
    capacity, rate = 600, 100
    budget = {"user": grant(capacity, rate)}
    with ExitStack() as stack:
        roads = [stack.enter_context(Road(redis.port)) for _ in range(nodes)]
        members = [stack.enter_context(share(road.url, nodes, defaults=budget)) for road in roads]
        for member in members:
            member.taken(1, "nobody")
        began_s, admitted = time.monotonic(), 0
        for turn in range(6):
            cut = roads[turn % nodes :]
            for road in cut:
                road.block()
            for _ in range(12):
                admitted += 50 * sum(isinstance(_tried(member, 50), Reservation) for member in members)
            for road in cut:
                road.clear()
            for member in members:
                member.comes_back()
            granted = capacity + rate * (time.monotonic() - began_s)
            assert admitted <= 2 * granted

        assert admitted > capacity, "nothing was admitted beside Redis"
        until(lambda: all(not member.backend.stats()["owed"] for member in members), "something is owed")
        level, now_s = members[0].level(), time.monotonic()
        assert level <= capacity - admitted + rate * (now_s - began_s) + 1


# --- open -------------------------------------------------------------------------------------------------------


def test_open_admits_and_charges_on_return(redis):
    """Every call passes, also beyond the budget; afterwards the bucket owes it."""
    with (
        Road(redis.port) as road,
        HastyNode(road.url, TOKENGUARD_REDIS_DOWN="open") as node,
        HastyNode(redis.url) as other,
    ):
        node.taken(1)
        road.block()
        node.goes_down()
        for _ in range(30):
            node.limiter.settle(node.taken(100), 90)

        road.clear()
        node.comes_back()

        until(lambda: other.level() == 1000 - 1 - 30 * 90, "it is not charged")
        assert isinstance(node.reserve(1), Decision)


def test_open_admits_on_a_node_that_has_never_seen_redis():
    """It knows of no budgets but the defaults, and asks for none."""
    with HastyNode("redis://127.0.0.1:1", TOKENGUARD_REDIS_DOWN="open") as node:
        node.taken(5000)


def test_rate_of_a_share_is_exact(redis):
    """A third of an awkward rate is still a fraction, not a rounded number."""
    with share(redis.url, 3, defaults={"user": grant(900, Fraction(1000, 60))}) as node:
        node.taken(1)
        redis.kill()
        node.goes_down()
        node.taken(300)

        decision = node.reserve(1)

    assert 0 < decision.retry_after_us <= 180_000
