"""What a node's policy decides, without any Redis."""

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.house import grant, named
from tests.strategies import properties
from tokenguard._bucket import BucketTable
from tokenguard.backends.mirror import Mirror
from tokenguard.backends.outage import Closed, Open, OwnHandle, Share
from tokenguard.backends.realm import Realm
from tokenguard.errors import BackendDown
from tokenguard.model import NEVER_US, Budget


def plan_of(table, *scales, epoch="1:abc"):
    """Return a plan of users' buckets, one for each scale, as a node makes it that knows the budgets."""
    realm = Realm("tests")
    realm.mirror = Mirror(epoch, {})
    return realm.prepare(table, [Budget(named(f"user:{i}"), scale) for i, scale in enumerate(scales)], None)


def test_closed_decides_on_nothing():
    """The error says why."""
    with pytest.raises(BackendDown, match="the moon"):
        Closed().reserve(plan_of(BucketTable(4), grant(10)), (1,), "the moon")


def test_share_and_open_say_how_to_settle():
    """What a node took on its own is settled in its own table, and charged to Redis."""
    for policy_of in (lambda table: Share(table, 2), Open):
        table = BucketTable(4)
        handle = plan_of(table, grant(100, 1))
        policy = policy_of(table)

        outcome = policy.reserve(handle, (10,), "")

        assert isinstance(outcome.handle, OwnHandle)
        assert outcome.handle.redis is handle
        assert outcome.handle.settle((-4,)) == 0
        assert table.peek(outcome.handle._plan).level(0) == (44 if isinstance(policy, Share) else 94)


@properties
@given(
    capacity=st.integers(1, 10**6),
    nodes=st.integers(1, 50),
    costs=st.lists(st.integers(1, 10**5), min_size=1, max_size=20),
)
def test_shares_of_all_nodes_come_to_no_more_than_the_whole(capacity, nodes, costs):
    """However calls spread over the nodes, together they reserve at most one budget."""
    admitted = 0
    for _ in range(nodes):
        table = BucketTable(4)
        handle, policy = plan_of(table, grant(capacity)), Share(table, nodes)
        for cost in costs:
            with suppress(BackendDown):
                outcome = policy.reserve(handle, (cost,), "")
                admitted += outcome.cost(0) * outcome.allowed

    assert admitted <= capacity


def test_never_of_one_bucket_stands_beside_a_share_that_is_short():
    """A call that asks more than a whole budget is told so."""
    table = BucketTable(4)
    handle, policy = plan_of(table, grant(100, 1), grant(10, 1)), Share(table, 2)

    outcome = policy.reserve(handle, (60, 11), "")

    assert outcome.retry_after_us == NEVER_US


def test_open_counts_beyond_what_there_is():
    """Debt, down to its floor."""
    table = BucketTable(4)
    handle, policy = plan_of(table, grant(10, 0, 1000)), Open(table)

    levels = [policy.reserve(handle, (9,), "").level(0) for _ in range(4)]

    assert levels == [1, -8, -17, -26]


def test_share_of_a_node_that_knows_no_budgets_is_nothing():
    """It must not go by defaults where somebody may have set less."""
    table = BucketTable(4)

    with pytest.raises(BackendDown, match="never seen"):
        Share(table, 2).reserve(plan_of(table, grant(10), epoch=""), (1,), "")
