"""Redis fails in every way that it can; each test tortures a server of its own."""

import asyncio
import logging
import re
import time

import pytest

from tests.house import grant
from tests.nodes import TIMEOUT_S, HastyNode, until
from tests.redis_servers import RedisServer, free_port
from tokenguard.errors import BackendDown

AT_MOST_S = TIMEOUT_S + 1.5
"""How long a call may take while nothing answers: the time limit, and what a busy machine adds."""


def refused(node, tokens=10):
    """Assert that a call is turned away because Redis is away; return why and how long that took."""
    began_s = time.monotonic()
    with pytest.raises(BackendDown) as caught:
        node.reserve(tokens)
    return str(caught.value), time.monotonic() - began_s


# --- it is not there ------------------------------------------------------------------------------------------


def test_node_starts_without_redis_and_needs_no_restart_when_it_comes():
    """Nobody listens: calls are turned away at once; when somebody does, they pass."""
    port = free_port()
    with HastyNode(f"redis://127.0.0.1:{port}") as node:
        why, took_s = refused(node)
        assert "refused" in why
        assert took_s < AT_MOST_S
        assert "refused" in node.trouble

        with RedisServer(port=port):
            node.comes_back()
            node.taken(10)
            assert node.level() == 990


def test_redis_that_is_killed_and_comes_back_empty_has_its_budgets_again(redis, node):
    """What was set stays set, on every node, though buckets are full again."""
    with HastyNode(redis.url) as other:
        node.set("user:alice", grant(70), level=50)
        node.set("team:red", grant(500))
        assert other.level("team:red") == 500
        redis.restart()

        for each in (node, other):
            until(lambda each=each: not isinstance(_outcome(each), BackendDown), "it does not come back")
            assert {
                str(state.budget.name): state.budget.scale.capacity for state in each.budgets.page(b"", 9)[0]
            } == {
                "team:red on tokens": 500,
                "user:alice on tokens": 70,
            }
        assert node.level() == 70


def _outcome(node):
    try:
        return node.reserve(0)
    except BackendDown as error:
        return error


def test_nodes_that_saw_different_budgets_agree_on_the_newer_ones(redis, node):
    """A node that missed the last change does not bring the old budgets back."""
    with HastyNode(redis.url) as behind:
        node.set("user:alice", grant(100))
        behind.taken(1)
        node.set("user:alice", grant(50))
        redis.restart()
        until(lambda: not isinstance(_outcome(behind), BackendDown), "it does not come back")

        until(lambda: not isinstance(_outcome(node), BackendDown), "it does not come back")

        assert [state.budget.scale.capacity for state in behind.budgets.page(b"", 9)[0]] == [50]
        assert behind.level() == node.level() == 50


# --- it does not answer -----------------------------------------------------------------------------------------


def test_redis_that_never_answers_holds_nobody_up(redis, node):
    """The call that finds out waits for the time limit, all others not at all; afterwards it is as it was."""
    node.taken(10)
    redis.freeze()
    try:
        why, took_s = refused(node)
        assert "no answer within" in why
        assert TIMEOUT_S * 0.9 < took_s < AT_MOST_S
        assert refused(node)[1] < TIMEOUT_S
    finally:
        redis.thaw()

    node.comes_back()
    assert node.level() in (980, 990), "the call whose outcome is unknown was taken or never came; never twice"
    node.taken(10)


def test_crowd_that_meets_a_redis_which_never_answers_is_gone_in_time(redis):
    """Of 300 callers, in flight and in the queue, none waits longer than the time limit."""

    async def crowd(node):
        await node.backend.start()
        redis.freeze()
        began_s = time.monotonic()
        try:
            outcomes = await asyncio.gather(
                *[node.reserve_soon(1, f"u{i}") for i in range(300)], return_exceptions=True
            )
            return outcomes, time.monotonic() - began_s
        finally:
            redis.thaw()
            await node.backend.stop()

    with HastyNode(redis.url) as node:
        outcomes, took_s = asyncio.run(crowd(node))

    assert {type(outcome) for outcome in outcomes} == {BackendDown}
    assert took_s < AT_MOST_S


def test_slow_redis_is_given_up_and_taken_back(redis, node):
    """A Redis that is busy for longer than the time limit is as good as none, until it answers."""
    node.taken(10)
    with redis.client() as client:
        asleep = client.connection_pool.get_connection()
        asleep.send_command("DEBUG", "SLEEP", str(3 * TIMEOUT_S))

        assert refused(node)[1] < AT_MOST_S

        assert asleep.read_response(timeout=10) == "OK"
        client.connection_pool.release(asleep)
    node.comes_back()
    node.taken(10)


# --- it forgets, cuts, refuses --------------------------------------------------------------------------------


def test_script_flush_goes_unnoticed(redis, node):
    """A Redis that has forgotten the scripts is told them again, and no call is lost or doubled."""
    node.taken(10)
    with redis.client() as client:
        client.script_flush()

    node.taken(10)
    node.set("user:bob", grant(5))

    assert node.level() == 980
    assert node.trouble is None


def test_idle_connection_that_is_killed_goes_unnoticed(redis, node):
    """Where nothing was under way, the next call goes out on a new connection."""
    node.taken(10)
    with redis.client() as client:
        for _ in range(3):
            wires = [lane._link._wire for lane in node.backend._lanes.values()]
            assert client.client_kill_filter(_type="normal", skipme=True)
            until(lambda wires=wires: not any(wire.is_open for wire in wires), "the connection is still there")
            node.taken(10)

    assert node.level() == 960
    assert node.backend.stats()["outages"] == 0


def test_replica_is_not_written_to(redis):
    """A node that has come to a read-only replica says so, takes nothing, and goes on once it is the primary."""
    with redis.client() as client:
        client.config_set("repl-diskless-sync-delay", 0)
    with RedisServer("--replicaof", "127.0.0.1", redis.port) as replica, replica.client() as client:
        until(lambda: client.info("replication")["master_link_status"] == "up", "the replica does not follow")
        with HastyNode(replica.url) as node:
            why, _ = refused(node)
            assert "READONLY" in why

            client.replicaof("NO", "ONE")

            node.comes_back()
            node.taken(10)
            assert node.level() == 990


def test_full_memory_charges_nobody_and_loses_no_settlement(redis, node):
    """Out of memory, calls are turned away, and what is settled meanwhile is charged afterwards."""
    reservation = node.taken(100)
    with redis.client() as client:
        client.config_set("maxmemory", 1)
        why, _ = refused(node)
        assert "OOM" in why
        assert "maxmemory" in node.trouble
        assert "script" not in node.trouble
        assert node.limiter.settle(reservation, 30) == 0
        assert node.backend.stats()["owed"] == 1

        client.config_set("maxmemory", 0)

    node.comes_back()
    assert node.level() == 970
    assert node.backend.stats()["owed"] == 0


def test_admin_is_not_held_up_by_an_outage_that_is_known(redis, node):
    """Who asks for budgets while Redis is known to be silent is told at once."""
    redis.freeze()
    try:
        refused(node)
        began_s = time.monotonic()
        for _ in range(3):
            with pytest.raises(BackendDown):
                node.level()
        assert time.monotonic() - began_s < TIMEOUT_S
    finally:
        redis.thaw()


@pytest.mark.parametrize(
    ("scheme", "rest", "words"),
    [
        ("redis+cluster", "", "luster"),
        ("redis+sentinel", "/group", "no Sentinel knows|unknown command .SENTINEL"),
        ("rediss", "", "SSL|no answer"),
    ],
)
def test_what_is_not_what_the_url_says_is_told_in_a_line(redis, caplog, scheme, rest, words):
    """No traceback, and nothing of the insides of a library."""
    with HastyNode(f"{scheme}://127.0.0.1:{redis.port}{rest}") as node:
        refused(node)
        assert re.search(words, node.trouble)
        assert "object" not in node.trouble
        assert "<" not in node.trouble
    assert not [record for record in caplog.records if record.exc_info]


def test_eviction_is_warned_of(redis, caplog):
    """A Redis that may throw buckets away is told of once, when a node comes to it."""
    with redis.client() as client:
        client.config_set("maxmemory-policy", "allkeys-lru")
    with HastyNode(redis.url) as node:
        node.taken(1)
        node.taken(1)

    warnings = [record.getMessage() for record in caplog.records if "evict" in record.getMessage()]
    assert len(warnings) == 1
    assert "allkeys-lru" in warnings[0]


# --- the outcome is unknown -----------------------------------------------------------------------------------


def test_reserve_whose_answer_is_lost_is_never_sent_again(road):
    """It stays taken, once; the caller is turned away."""
    with HastyNode(road.url) as node:
        node.taken(10)
        road.swallows = 1
        refused(node, tokens=100)

        node.comes_back()
        assert node.level() == 890
        assert node.backend.stats()["unanswered"] == 1


def test_settlement_whose_answer_is_lost_counts_once(road):
    """It is sent again until it is known to have come, and does nothing the second time."""
    with HastyNode(road.url) as node:
        reservations = [node.taken(100) for _ in range(5)]
        for reservation in reservations:
            road.swallows = 1
            node.limiter.settle(reservation, 30)
            node.comes_back()

        until(lambda: node.backend.stats()["owed"] == 0, "something is owed")
        assert node.level() == 850


def test_settlement_that_never_came_is_made_up_for(redis, road):
    """Cut off before the settlement left, and for a long time after: it is charged in the end, once."""
    with HastyNode(road.url) as node, HastyNode(redis.url) as other:
        reservation = node.taken(100)
        road.block()
        node.limiter.settle(reservation, 400)
        assert node.trouble is not None
        assert other.level() == 900

        road.clear()

        node.comes_back()
        until(lambda: other.level() == 600, "the settlement does not come")


def test_settlement_that_arrives_twice_counts_once(redis, road):
    """It was held back on the way, and arrives beside the one that was sent in its stead."""
    with HastyNode(road.url) as node, HastyNode(redis.url) as other:
        reservation = node.taken(100)
        road.block()
        node.limiter.settle(reservation, 40)

        road.clear()
        node.comes_back()

        node.taken(10)
        until(lambda: other.level() == 950, "the levels do not agree")


# --- what is said of it ---------------------------------------------------------------------------------------


def test_outage_is_logged_once_and_its_end_once(redis, node, caplog):
    """Not a line for each call."""
    node.taken(1)
    redis.freeze()
    try:
        for _ in range(20):
            refused(node)
    finally:
        redis.thaw()
    node.comes_back()
    for _ in range(20):
        node.taken(1)

    levels = [record.levelno for record in caplog.records if record.name == "tokenguard"]
    assert levels == [logging.ERROR, logging.WARNING]


def test_budget_is_not_changed_while_redis_is_away(redis, node):
    """Who sets one is told that it is not known whether it is set."""
    node.set("user:alice", grant(50))
    redis.kill()

    with pytest.raises(BackendDown):
        node.set("user:alice", grant(9))
    with pytest.raises(BackendDown):
        node.level()

    redis.start()
    node.comes_back()
    assert node.level() == 50


def test_password_appears_nowhere(caplog):
    """Neither a refused login nor a lost connection tells it, in logs, errors or what is shown."""
    with RedisServer("--requirepass", "correct-horse", login={"password": "correct-horse"}) as server:
        for url in ("redis://:battery-staple@127.0.0.1:%d", "redis://someone:battery-staple@127.0.0.1:%d"):
            with HastyNode(url % server.port) as node:
                why, _ = refused(node)
                said = why + node.trouble + node.backend.describe() + repr(node.backend._url) + caplog.text
                assert "battery-staple" not in said
                assert str(server.port) in node.backend.describe()
                assert "WRONGPASS" in why or "invalid" in why
