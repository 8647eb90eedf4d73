"""What stands in Redis, and for how long."""

import re
from fractions import Fraction

from tests.house import grant
from tests.nodes import Node
from tests.strategies import S

KEY = "tg:{tests}:b:user\x1falice\x1ftokens\x1f"


def node_on(server, **defaults):
    return Node(server.url, defaults, TOKENGUARD_REALM="tests")


def keys_of(client):
    return {re.sub(r"lane:[0-9a-f]{16}$", "lane:…", key) for key in client.scan_iter()}


def test_every_key_has_the_hash_tag_of_the_realm(shared):
    """Buckets, budgets, epoch and records of one realm are in one slot of a cluster."""
    with node_on(shared, user=grant(1000, 1), team=grant(1000, 1)) as node, shared.client() as client:
        node.limiter.settle(node.taken(10, team="red {north}"), 5)
        node.set("user:bob", grant(9))

        assert keys_of(client) == {
            "tg:{tests}:epoch",
            "tg:{tests}:budgets",
            "tg:{tests}:changes",
            "tg:{tests}:lane:…",
            "tg:{tests}:b:team\x1fred {north}\x1ftokens\x1f",
            KEY,
        }


def test_bucket_is_stored_as_its_level_its_tick_and_its_scale(shared):
    """In plain numbers: anybody can read them."""
    with node_on(shared, user=grant(1000, 2, 50)) as node, shared.client() as client:
        node.taken(10)

        level, tick, *scale = client.get(KEY).split(" ")

        assert int(level) == 990 * 500_000
        assert abs(int(tick) - client.time()[0] * S) < 60 * S
        assert scale == ["1000", "50", "1", "500000", "1"]


def test_bucket_lives_as_long_as_it_is_not_full(shared):
    """It expires when it would be full, not before, and not long after; debt counts."""
    with node_on(shared, user=grant(1000, 10)) as node, shared.client() as client:
        for tokens, used, full_in_s in ((100, 100, 10), (100, 1100, 120)):
            node.limiter.settle(node.taken(tokens), used)
            assert full_in_s * 1000 - 200 <= client.pttl(KEY) <= full_in_s * 1000 + 1000


def test_bucket_that_never_fills_lives_for_ever(shared):
    """A fixed grant that expired would be granted anew."""
    with node_on(shared, user=grant(1000)) as node, shared.client() as client:
        node.taken(1)

        assert client.pttl(KEY) == -1


def test_bucket_that_is_full_again_is_no_more(shared):
    """What cannot be told from a new one need not be kept."""
    with node_on(shared, user=grant(1000)) as node, shared.client() as client:
        node.limiter.refund(node.taken(1))

        assert not client.exists(KEY)
        assert node.level() == 1000


def test_refusal_creates_no_key(shared):
    """Whoever is refused leaves no trace."""
    with node_on(shared, user=grant(1000), team=grant(10)) as node, shared.client() as client:
        node.taken(10, "bob", team="red")

        assert not node.reserve(6, team="red").allowed

        assert not client.exists(KEY)


def test_crowd_of_callers_leaves_nothing_behind(shared):
    """Buckets of callers who came once expire; only the realm's own keys remain."""
    with node_on(shared, user=grant(10, Fraction(10_000))) as node, shared.client() as client:
        for i in range(200):
            node.taken(5, f"u{i}")

        assert all(0 < client.pttl(key) <= 1100 for key in client.keys("*:b:*") if client.exists(key))
        assert all(client.pttl(key) > 0 for key in client.keys("*:lane:*"))


def test_record_of_a_lane_expires(shared):
    """A node that is gone for a day is forgotten."""
    with node_on(shared, user=grant(1000)) as node, shared.client() as client:
        node.limiter.settle(node.taken(10), 5)
        (record,) = client.keys("*:lane:*")

        assert 86_000_000 < client.pttl(record) <= 86_400_000


def test_clock_is_that_of_redis(shared):
    """A node's own clock counts for nothing: the tick is the time that Redis told within the call."""
    with node_on(shared, user=grant(1000, 1)) as node, shared.client() as client:
        before = client.time()
        node.taken(1)
        after = client.time()

        tick = int(client.get(KEY).split(" ")[1])

    assert before[0] * S + before[1] <= tick <= after[0] * S + after[1]
