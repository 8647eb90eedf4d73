"""What Redis is owed: it adds up, it is settled in the right order, and it takes bounded memory."""

from hypothesis import given
from hypothesis import strategies as st

from tests.house import grant
from tests.oracle import OracleTable, Terms
from tests.strategies import START_US, properties
from tokenguard._bucket import MAX_PLAN
from tokenguard.backends import owed as module
from tokenguard.backends.batch import MAX_CALLS, Kind, Ref, scale_text
from tokenguard.backends.owed import Owed

TEXT = scale_text(grant(1000))
A, B = Ref(b"a", TEXT), Ref(b"b", TEXT)


def settlements(owed):
    """Take all that is owed, as pairs of key and amount, in order."""
    taken = []
    while calls := owed.take():
        assert len(calls) <= MAX_CALLS
        for call in calls:
            assert call.kind is Kind.SETTLE
            assert len(call.refs) <= MAX_PLAN
            taken += [(ref.key, amount) for ref, amount in zip(call.refs, call.amounts, strict=True)]
    return taken


def test_charges_of_one_bucket_add_up():
    """However many calls there were, a bucket is one amount."""
    owed = Owed()
    for _ in range(1000):
        owed.add((A, B), (3, 0))

    assert len(owed) == 1
    assert settlements(owed) == [(b"a", 3000)]
    assert len(owed) == 0


def test_refund_makes_less_of_what_is_owed():
    """What was charged here and given back here, Redis need not hear of."""
    owed = Owed()
    owed.add((A, B), (100, 100))
    owed.add((A, B), (-30, -100))

    assert settlements(owed) == [(b"a", 70)]


def test_refund_of_what_redis_knows_goes_before_later_charges():
    """It came first: had the bucket been full, it would have been lost."""
    owed = Owed()
    owed.add((A,), (-50,))
    owed.add((A,), (80,))

    assert settlements(owed) == [(b"a", -50), (b"a", 80)]


@properties
@given(st.lists(st.integers(-200, 200), max_size=30))
def test_nobody_gets_more_than_if_redis_had_been_told_at_once(deltas):
    """On a grant that does not refill, what is settled later leaves no more than what is settled one by one."""
    plan = ((b"a", Terms(1000, 0, 10_000)),)
    at_once, later, owed = OracleTable(), OracleTable(), Owed()
    for table in (at_once, later):
        table.reserve(plan, (300,), START_US)

    for delta in deltas:
        at_once.settle(plan, (delta,), START_US)
        owed.add((A,), (delta,))
    for _, amount in settlements(owed):
        later.settle(plan, (amount,), START_US)

    assert later.peek(plan, START_US).levels <= at_once.peek(plan, START_US).levels


def test_room_is_bounded_and_what_has_none_is_counted():
    """Buckets that something is owed for already go on; new ones are dropped."""
    owed = Owed()
    refs = [Ref(b"%d" % i, TEXT) for i in range(module.MAX_BUCKETS)]
    owed.add(refs, [1] * len(refs))

    owed.add((A, refs[0]), (-7, 5))

    assert owed.dropped == 7
    assert len(owed) == module.MAX_BUCKETS
    assert dict(settlements(owed))[b"0"] == 6
