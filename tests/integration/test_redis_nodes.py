"""Several nodes on one Redis, or one Valkey, are as one."""

import asyncio
import random
import subprocess
import sys
import threading
from fractions import Fraction

import pytest

from tests.house import grant, named
from tests.nodes import Node
from tokenguard.errors import BudgetNotFound
from tokenguard.limiter import Reservation
from tokenguard.model import SETTABLE_METERS, Decision, Identity, Meter


@pytest.fixture
def pair(shared):
    """Two nodes."""
    with Node(shared.url) as a, Node(shared.url) as b:
        yield a, b


# --- buckets ----------------------------------------------------------------------------------------------------


def test_what_one_node_takes_is_gone_for_the_other(pair):
    """Reserve here, find less there; settle there is not possible, but settle here is seen there."""
    a, b = pair
    reservation = a.taken(400)
    assert b.level() == 600

    a.limiter.settle(reservation, 450)

    assert b.level() == 550


def test_refusal_on_one_node_says_what_the_other_took(pair):
    """The decision tells the whole state, whoever caused it."""
    a, b = pair
    a.set("user:alice", grant(100, 2))
    a.taken(90)

    decision = b.reserve(40)

    assert isinstance(decision, Decision)
    assert decision.binding.name == named("user:alice")
    assert decision.binding.level == 10
    assert 0 < decision.retry_after_us <= 15_000_000


def test_refusal_changes_no_bucket_on_any_scope(pair):
    """All or nothing: a call that one scope refuses leaves the others as they were."""
    a, b = pair
    a.set("user:alice", grant(10))
    a.set("team:red", grant(1000))
    a.taken(10, team="red")

    assert isinstance(b.reserve(6, team="red"), Decision)

    assert b.level("team:red") == 990


@pytest.mark.parametrize("tokens", [2**53 + 10**6, 2**64])
def test_amount_beyond_all_measure_is_refused_and_changes_nothing(pair, tokens):
    """A settlement that no double holds is an error, and calls go on."""
    a, _ = pair
    reservation = a.taken(100)

    with pytest.raises(ValueError, match="2\\^53"):
        a.limiter.settle(reservation, tokens)

    assert a.level() == 900
    a.limiter.settle(reservation, 2**53)
    assert a.level() < 0
    assert a.trouble is None


# --- budgets ----------------------------------------------------------------------------------------------------


def test_budget_set_on_one_node_binds_the_very_next_call_on_the_other(pair):
    """Without polling, and though the other has made its plans long ago."""
    a, b = pair
    b.taken(10)

    a.set("user:alice", grant(20))

    assert isinstance(b.reserve(11), Decision)
    b.taken(10)


@pytest.mark.parametrize("meter", SETTABLE_METERS)
@pytest.mark.parametrize("model", [None, "gpt-4o"])
def test_budget_of_any_kind_is_shared(pair, meter, model):
    """Tokens or requests, of one model or of all."""
    a, b = pair
    a.set("team:blau €", grant(2), meter=meter, model=model)

    b.taken(2, team="blau €")

    assert isinstance(a.reserve(2, team="blau €"), Decision) or meter is Meter.REQUESTS
    a.reserve(1, team="blau €")
    assert isinstance(b.reserve(1, team="blau €"), Decision)


def test_budget_removed_on_one_node_is_gone_on_the_other(pair):
    """The default holds again, with what was used used; and removing it twice is an error."""
    a, b = pair
    a.set("user:alice", grant(50))
    b.taken(25)

    b.budgets.delete(named("user:alice"))

    assert a.level() == 975
    assert a.budgets.page(b"", 9) == ([], None)
    with pytest.raises(BudgetNotFound):
        a.budgets.delete(named("user:alice"))


def test_budget_list_of_one_node_shows_what_another_set(pair):
    """Pages are in the order of the keys, with live levels, more than go into one plan at once."""
    a, b = pair
    for i in range(40):
        a.set(f"user:{i:02}", grant(100 + i))
    a.taken(50, "07")

    first, after = b.budgets.page(b"", 35)
    second, end = b.budgets.page(after, 35)

    states = [*first, *second]
    assert [state.budget.name.scope.id for state in states] == [f"{i:02}" for i in range(40)]
    assert [state.level for state in states] == [57 if i == 7 else 100 + i for i in range(40)]
    assert end is None


def test_node_that_missed_many_changes_catches_up(pair):
    """A few changes come one by one; after more than are kept, all budgets come anew."""
    a, b = pair
    b.taken(1)
    for count in (3, 300):
        for i in range(count):
            a.set(f"user:{i}", grant(i + 1))
        a.budgets.delete(named("user:1"))
        a.set("team:red", grant(count))

        budgets = {state.budget.name.scope: state.budget.scale.capacity for state in b.budgets.page(b"", 1000)[0]}

        assert len(budgets) == count
        assert budgets[named("team:red").scope] == count
        assert named("user:1").scope not in budgets


def test_change_is_told_to_other_nodes_without_all_the_others(shared, pair):
    """With hundreds of budgets, a change of one costs a look at one."""
    a, b = pair
    for i in range(300):
        a.set(f"user:{i}", grant(i + 1))
    b.level()
    with shared.client() as client:
        client.config_resetstat()
        a.set("user:7", grant(700))
        assert b.level("user:7") == 700
        assert not {"cmdstat_hgetall", "cmdstat_mset"} & set(client.info("commandstats"))


def test_level_set_with_a_budget_is_there_at_once(pair):
    """Also below zero."""
    a, b = pair
    a.set("user:alice", grant(100), level=-30)

    assert b.level() == -30
    assert isinstance(b.reserve(1), Decision)


def test_call_is_one_round_trip_however_many_budgets_changed_before(shared, pair):
    """A change of budgets costs each node one look at what changed, and its calls nothing more."""
    a, b = pair
    a.set("user:alice", grant(500))
    b.taken(1)
    with shared.client() as client:
        client.config_resetstat()
        for _ in range(10):
            b.taken(1)
        assert _ran(client, "mget") == 10

        a.set("user:bob", grant(500))
        client.config_resetstat()
        for _ in range(10):
            b.taken(1)

        assert _ran(client, "mget") <= 11, "more than one call found its plan stale"
        assert _ran(client, "lrange") == 1


def _ran(client, command):
    """Return how often the server ran a command; every batch of calls has one mget, and nothing else has."""
    return client.info("commandstats").get(f"cmdstat_{command}", {}).get("calls", 0)


def test_plan_of_20_buckets_is_one_round_trip(shared, pair):
    """Two meters, the model and all models, five scopes."""
    a, b = pair
    who = {"team": "red", "role": "dev", "rolegroup": "staff"}
    for scope in ("global", "team:red", "rolegroup:staff", "role:dev", "user:alice"):
        for meter in SETTABLE_METERS:
            for model in (None, "gpt-4o"):
                a.set(scope, grant(1000), meter=meter, model=model)
    b.taken(1, **who)
    with shared.client() as client:
        client.config_resetstat()
        assert len(b.taken(10, **who).decision.buckets) == 20
        assert _ran(client, "mget") == 1


def test_realms_do_not_know_each_other(shared):
    """Two realms on one Redis share neither buckets nor budgets."""
    with Node(shared.url, TOKENGUARD_REALM="north") as north, Node(shared.url, TOKENGUARD_REALM="south") as south:
        north.set("user:alice", grant(7))
        north.taken(7)

        assert south.level() == 1000
        assert south.budgets.page(b"", 9) == ([], None)


# --- many callers -----------------------------------------------------------------------------------------------


def test_threads_share_one_budget_exactly(pair):
    """32 threads on two nodes: as many calls pass as fit."""
    together, passed = threading.Barrier(32), []

    def caller(node):
        together.wait(10)
        passed.extend(isinstance(node.reserve(7), Reservation) for _ in range(10))

    threads = [threading.Thread(target=caller, args=(pair[i % 2],)) for i in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)

    assert len(passed) == 320
    assert sum(passed) == 1000 // 7


def test_event_loop_and_threads_use_one_node_at_once(shared):
    """Callers with and without an event loop, on one backend."""

    async def crowd(node):
        await node.backend.start()
        threads = asyncio.gather(*[asyncio.to_thread(node.reserve, 10) for _ in range(60)])
        tasks = asyncio.gather(*[node.reserve_soon(10) for _ in range(60)])
        outcomes = [*await threads, *await tasks]
        await node.backend.stop()
        return outcomes

    with Node(shared.url) as node:
        outcomes = asyncio.run(crowd(node))

    assert sum(isinstance(outcome, Reservation) for outcome in outcomes) == 100


def test_callers_at_once_travel_together(shared):
    """300 callers of one event loop need far fewer scripts than calls."""

    async def crowd(node):
        await node.backend.start()
        await asyncio.gather(*[node.reserve_soon(1, f"u{i}") for i in range(300)])
        stats = node.backend.stats()
        await node.backend.stop()
        return stats

    with Node(shared.url) as node:
        stats = asyncio.run(crowd(node))

    assert stats["batched"] >= 300
    assert stats["batches"] <= 20


@pytest.mark.parametrize("seed", range(4))
def test_callers_who_give_up_neither_lose_nor_double_anything(shared, seed):
    """Of 400 callers half are cancelled at any moment: what is gone is what the others hold, to the token."""
    numbers = random.Random(seed)

    async def caller(node):
        cost = numbers.randint(1, 9)
        asking = asyncio.ensure_future(node.reserve_soon(cost))
        if numbers.random() < 0.5:
            for _ in range(numbers.randint(0, 12)):
                await asyncio.sleep(0)
            asking.cancel()
        try:
            return cost if isinstance(await asking, Reservation) else 0
        except asyncio.CancelledError:
            return 0

    async def crowd(node):
        await node.backend.start()
        held = sum(await asyncio.gather(*[caller(node) for _ in range(400)]))
        await node.backend.stop()
        return held

    with Node(shared.url, {"user": grant(100_000)}) as node:
        held = asyncio.run(crowd(node))
        assert 0 < held < 400 * 9
        assert node.level() == 100_000 - held


def test_two_nodes_hammered_for_ten_seconds_never_admit_too_much(shared):
    """Two processes, 64 callers each, one user and one team: reserved less refunded stays below C + R·t.

    Each node tells what it reserved and gave back; the clock that counts is the server's.
    """
    capacity, rate = 5000, Fraction(20_000)
    with shared.client() as client:
        began_s = _now_s(client)
        nodes = [
            subprocess.Popen(
                [sys.executable, "-m", "tests.integration.hammer", shared.url, str(capacity), str(rate), "10"],
                stdout=subprocess.PIPE,
                text=True,
            )
            for _ in range(2)
        ]
        told = [node.communicate(timeout=60)[0].split() for node in nodes]
        granted = capacity + rate * (Fraction(_now_s(client)) - Fraction(began_s))

    assert [node.returncode for node in nodes] == [0, 0]
    allowed, refused, reserved, refunded, overrun = (sum(int(numbers[i]) for numbers in told) for i in range(5))
    assert min(allowed, refused) > 1000, "the hammer did not hit"
    assert reserved - refunded <= granted
    assert reserved - refunded + overrun > granted / 2, "far less was admitted than could have been"
    with Node(shared.url, {kind: grant(capacity, rate) for kind in ("team", "user")}) as node:
        for state in node.limiter.peek(Identity("alice", team="red"), "m"):
            assert state.level <= capacity


def _now_s(client):
    seconds, us = client.time()
    return seconds + us / 1e6
