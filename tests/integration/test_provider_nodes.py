"""What one node learns of the provider, and what it is asked to wait for, holds for all nodes of a Redis."""

import threading
import time

import pytest

from tests.house import MODEL, grant, named
from tests.mirror import learned
from tests.nodes import HastyNode, Node
from tests.watched import Watched, looks, spends, spends_of
from tokenguard.errors import BackendDown
from tokenguard.headroom import Pace
from tokenguard.limiter import Reservation
from tokenguard.model import Decision, Identity, Meter, Source
from tokenguard.provider_limits.background import Background
from tokenguard.provider_limits.gates import Gates, gate_of
from tokenguard.provider_limits.learned import Learned, Reading
from tokenguard.provider_limits.others import TOPIC, Others

NOW_S = 1_790_000_000.0


@pytest.fixture
def pair(shared):
    """Two nodes."""
    with Node(shared.url, {}) as a, Node(shared.url, {}) as b:
        yield a, b


@pytest.fixture
def gates_of():
    """Return what makes a node's gates; nobody opens them any more when the test is over."""
    backgrounds = []

    def make(node):
        backgrounds.append(Background())
        return Gates(node.budgets, Pace(), backgrounds[-1], lambda work: work(), lambda: 1)

    yield make
    for background in backgrounds:
        background.stop()


def level(node, budget):
    return node.budgets.get(budget.name).level


# --- gates --------------------------------------------------------------------------------------------------


def test_gate_that_one_node_closes_refuses_on_the_other_at_its_very_next_call(pair, gates_of):
    """One 429 of the provider's stops all nodes, without anybody being told."""
    a, b = pair
    assert isinstance(b.reserve(1), Reservation)
    gates_of(a).close(MODEL, 30.0, "slow_down", 0.0)

    refused = b.reserve(1)
    assert isinstance(refused, Decision)
    assert refused.binding.name == gate_of(MODEL)
    assert 25_000_000 < refused.retry_after_us <= 30_001_000
    assert isinstance(b.limiter.reserve(Identity("alice"), "another", 1, 1), Reservation)


def test_gate_is_not_shortened_by_another_node(pair, gates_of):
    """The longest wait that any node was told holds for all."""
    a, b = pair
    gates_of(a).close(MODEL, 50.0, "slow_down", 0.0)
    gates_of(b).close(MODEL, 1.0, "slow_down", 0.0)

    assert a.reserve(1).retry_after_us > 40_000_000


def test_gate_that_is_removed_is_open_everywhere(pair, gates_of):
    """Its budget goes like any other."""
    a, b = pair
    gates_of(a).close(MODEL, 30.0, "slow_down", 0.0)
    assert isinstance(b.reserve(1), Decision)
    b.budgets.delete(gate_of(MODEL))

    assert isinstance(a.reserve(1), Reservation)


# --- learned limits -----------------------------------------------------------------------------------------


def test_limit_that_one_node_learns_binds_on_the_other(pair):
    """With its source, and with what was used of it."""
    a, b = pair
    told = Reading(10_000, 4000, b"36s", 4000)
    first, second = (Learned(node.backend, node.budgets, lambda _: None) for node in pair)
    first.apply(first.hear(MODEL, Meter.TOKENS, told, 1000.0))
    refused = b.reserve(5000)

    assert refused.binding.name == learned(10_000).name
    assert 4000 <= refused.binding.level < 4500
    assert second.hear(MODEL, Meter.TOKENS, told, 1000.0) is None
    (state,) = b.budgets.learned()
    assert state.budget == learned(10_000)
    assert a.budgets.learned()[0].budget == state.budget


def test_what_the_provider_tells_lowers_the_shared_level(pair):
    """A node that is told that less remains lowers it for all; what calls are given back, likewise."""
    a, b = pair
    a.budgets.put(learned(10_000), 10_000)
    call = a.limiter.reserve(Identity("alice"), MODEL, 10, 300, 1000)
    lowering = call.lowering(3000, -1)
    a.limiter.lower(call, lowering)
    a.limiter.settle(call, 50)

    assert level(b, learned(10_000)) < 4500


def test_budgets_with_a_source_are_read_back(shared):
    """A node that comes later knows them as what they are."""
    budgets = [
        learned(100),
        learned(200, source=Source.ADMIN),
        learned(300, source=Source.ADMIN_DAILY, meter=Meter.REQUESTS),
    ]
    with Node(shared.url, {}) as a:
        for budget in budgets:
            a.budgets.put(budget)
        a.set("global", grant(5), model=MODEL)
    with Node(shared.url, {}) as b:
        page, _ = b.budgets.page(b"", 100)

    assert {state.budget for state in page if state.budget.name.source is not None} == set(budgets)
    assert {state.budget.name for state in page} == {*(b.name for b in budgets), named("global", model=MODEL)}


def test_node_that_decides_on_its_own_never_lowers(redis):
    """While Redis is away its levels are not those of the bucket: it compares nothing."""
    with HastyNode(redis.url, {}, TOKENGUARD_REDIS_DOWN="open") as node:
        node.budgets.put(learned(10_000), 10_000)
        before = node.limiter.reserve(Identity("alice"), MODEL, 10, 300, 1000)
        redis.kill()
        node.goes_down()
        call = node.limiter.reserve(Identity("alice"), MODEL, 10, 300, 1000)

        assert isinstance(call, Reservation)
        assert call.lowering(5, -1) is None
        assert before.lowering(8000, -1) == (1000 + 10_000 // 32,)


# --- whose turn it is ---------------------------------------------------------------------------------------


def test_one_node_of_many_may(pair):
    """Of all that ask at once one does what all would do."""
    may = []
    barrier = threading.Barrier(8)

    def ask(node):
        barrier.wait()
        may.append(node.backend.claim("it", 60, NOW_S))

    threads = [threading.Thread(target=ask, args=(pair[number % 2],)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sorted(may) == [False] * 7 + [True]
    assert pair[0].backend.claim("that", 60, NOW_S)


def test_turn_ends_with_its_time(pair):
    """After that somebody else may."""
    a, b = pair
    assert a.backend.claim("it", 0.001, NOW_S)
    while not b.backend.claim("it", 60, NOW_S):
        pass
    assert not a.backend.claim("it", 60, NOW_S)


def test_nobody_may_while_redis_is_away(redis):
    """Whose turn it is cannot be told."""
    with HastyNode(redis.url, {}) as node:
        node.reserve(1)
        redis.kill()

        with pytest.raises(BackendDown):
            node.backend.claim("it", 60, NOW_S)


def test_nothing_is_waited_for_while_redis_is_known_to_be_away(redis):
    """Gates are opened by the same thread."""
    with HastyNode(redis.url, {}) as node:
        node.reserve(1)
        redis.freeze()
        node.goes_down()

        before_s = time.monotonic()
        for ask in (lambda: node.backend.claim("it", 60, NOW_S), lambda: node.backend.share("it", {}, 60)) * 5:
            with pytest.raises(BackendDown):
                ask()
        assert time.monotonic() - before_s < 5 * HastyNode.timeout_s
        redis.thaw()


# --- what nodes tell each other -----------------------------------------------------------------------------


def test_nodes_know_what_the_others_tell(pair):
    """A number holds in place of the one before it, beside others of the node, and nobody hears himself."""
    a, b = pair
    assert a.backend.share("it", {"one": 1}, 60) == []
    assert b.backend.share("it", {"one": 10, "two words": -(2**62)}, 60) == [("one", 1)]
    assert b.backend.share("that", {}, 60) == []
    assert sorted(a.backend.share("it", {"one": 2}, 60)) == [("one", 10), ("two words", -(2**62))]
    assert a.backend.share("it", {"three": 3}, 60)
    assert sorted(b.backend.share("it", {}, 60)) == [("one", 2), ("three", 3)]


def test_what_a_node_tells_ends_with_its_time(pair):
    """It may be no more."""
    a, b = pair
    a.backend.share("it", {"one": 1}, 0.001)
    for _ in range(1000):
        if not b.backend.share("it", {}, 60):
            break
    assert b.backend.share("it", {}, 60) == []


def test_nodes_add_up_what_each_sees_of_others(pair, caplog):
    """Each sees a twentieth of the limit, which is not notable; what they see together is. Each log says so."""
    crew = [(Others(node.backend), Watched(), 90) for node in pair]
    for _, watched, _ in crew:
        watched.spend(0)

    assert spends_of(crew, 300) == [{"m": pytest.approx(10_800, rel=0.05)}] * 2
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2


def test_worker_that_hears_nothing_leaves_what_its_node_tells(pair):
    """What another worker of the node sees counts all the same, whichever of them told Redis last."""
    first, second = pair
    crew = [(Others(node.backend), Watched(), per_s) for node, per_s in ((first, 90), (first, 0), (second, 90))]
    for _, watched, _ in crew:
        watched.spend(0)
    for step in range(1, 3001):
        for _, watched, per_s in crew:
            if per_s:
                watched.spend(per_s // 10)
        if step % 100 == 0:
            told = [looks(others, watched, now_s=step / 10) for others, watched, _ in crew]

    assert told == [{"m": pytest.approx(10_800, rel=0.05)}, {}, {"m": pytest.approx(10_800, rel=0.05)}]


def test_node_without_redis_tells_what_it_sees_itself(redis):
    """What other nodes see is not known then, and nothing breaks."""
    with HastyNode(redis.url, {}) as node, Node(redis.url, {}) as other:
        node.reserve(1)
        crew = [(Others(one.backend), Watched(), 500) for one in (node, other)]
        for _, watched, _ in crew:
            watched.spend(0)
        assert spends_of(crew, 300)[0]["m"] == pytest.approx(60_000, rel=0.05)
        redis.kill()

        spends_of(crew[:1], 10, 300)  # what was said last still counts
        assert spends_of(crew[:1], 10, 310)[0]["m"] == pytest.approx(30_000, rel=0.05)


def test_what_another_version_tells_is_passed_over(pair, shared):
    """Whatever it may be."""
    node, _ = pair
    told = {"": "", "alone": "1", "a node": "9999999999999999 many", b"\xff \xff": "9999999999999999 1"}
    with shared.client() as client:
        client.hset(node.backend._realm.share_key(TOPIC), mapping=told)
    others, watched = Others(node.backend), Watched()
    watched.spend(0)

    assert spends(others, watched, 150, 500)["m"] == pytest.approx(30_000, rel=0.05)
