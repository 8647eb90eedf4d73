"""What holds for every bucket, whatever happens to it: the invariants of rate limiting with debt.

That dropping a full bucket is unobservable, and that the engine decides as the oracle does, is for the machines.
"""

from fractions import Fraction
from itertools import combinations

from hypothesis import assume, given
from hypothesis import strategies as st

from tests.oracle import NEVER_US, Terms
from tests.strategies import (
    LATEST_US,
    START_US,
    S,
    amount,
    budgets,
    pauses_us,
    prepared,
    properties,
    scale_of,
    seen,
    shares,
    verdict,
)
from tokenguard._bucket import BucketTable

flowing = budgets().filter(lambda terms: terms.rate > 0)
events = st.lists(
    st.tuples(pauses_us, st.sampled_from(["reserve", "reserve", "overage", "refund"]), shares),
    min_size=1,
    max_size=25,
)


def table_of(*terms):
    """Return a table and a handle of one bucket for each of the terms, by the keys b"0", b"1" and so on."""
    table = BucketTable(len(terms), seed=b"")
    return table, prepared(table, tuple((b"%d" % i, each) for i, each in enumerate(terms)))


def units(table, key, terms, now_us):
    """Return the level that a bucket has now, in units, from what is stored."""
    scale = scale_of(terms)
    full = scale.capacity * scale.unit
    state = table.state(key)
    if state is None:
        return full
    return min(full, state[0] + max(0, now_us // scale.tick_us - state[1]) * scale.gain)


def act(table, handle, what, tokens, now_us):
    """Do one thing to the one bucket of a handle; return the tokens asked of it, and those forgiven."""
    if what == "reserve":
        return (tokens if table.reserve(handle, (tokens,), now_us).allowed else 0), 0
    delta = tokens if what == "overage" else -tokens
    return delta, table.settle(handle, (delta,), now_us)


@properties
@given(budgets(), events)
def test_nothing_is_lost_and_nothing_made(terms, timeline):
    """Level = level before + refill - taken + refunds + forgiven, to the unit, and within its bounds."""
    table, handle = table_of(terms)
    scale = scale_of(terms)
    now_us, full, floor = START_US, terms.capacity * scale.unit, -terms.max_debt * scale.unit

    for pause_us, what, part in timeline:
        now_us += pause_us
        before = units(table, b"0", terms, now_us)
        asked, forgiven = act(table, handle, what, amount(part, terms), now_us)
        after = units(table, b"0", terms, now_us)

        due = before - asked * scale.unit
        assert after == min(full, max(floor, due))
        assert forgiven == -(min(0, due - after) // scale.unit)
        assert floor <= after <= full


@properties
@given(budgets(), events)
def test_over_no_interval_more_is_admitted_than_was_there_and_flowed_in(terms, timeline):
    """Reserved in (s, e] is at most the level at s, the refill of the ticks in between, and the refunds."""
    table, handle = table_of(terms)
    scale = scale_of(terms)
    now_us, reserved, refunded = START_US, 0, 0
    marks = [(now_us // scale.tick_us, terms.capacity * scale.unit, 0, 0)]

    for pause_us, what, part in timeline:
        now_us += pause_us
        before = units(table, b"0", terms, now_us)
        asked, _ = act(table, handle, what, amount(part, terms), now_us)
        level = units(table, b"0", terms, now_us)
        reserved += asked * scale.unit if what == "reserve" else 0
        refunded += max(0, level - before)
        marks.append((now_us // scale.tick_us, level, reserved, refunded))

    for (s, level, reserved, refunded), (e, _, reserved_by_e, refunded_by_e) in combinations(marks, 2):
        if reserved_by_e > reserved:
            assert reserved_by_e - reserved <= level + (e - s) * scale.gain + refunded_by_e - refunded


@properties
@given(budgets(), st.lists(st.tuples(pauses_us, shares, st.booleans()), min_size=1, max_size=25))
def test_from_the_start_no_more_is_admitted_than_capacity_and_refill(terms, calls):
    """Reserved less refunded never exceeds C + R * t, t in whole ticks."""
    table, handle = table_of(terms)
    scale = scale_of(terms)
    now_us, net = START_US, 0

    for pause_us, part, refunds in calls:
        now_us += pause_us
        cost = amount(part, terms)
        if table.reserve(handle, (cost,), now_us).allowed:
            net += cost
            if refunds:
                table.settle(handle, (-cost,), now_us)
                net -= cost
        ticks = now_us // scale.tick_us - START_US // scale.tick_us
        assert net * scale.unit <= terms.capacity * scale.unit + ticks * scale.gain


several = st.lists(budgets(), min_size=1, max_size=5)


@properties
@given(several, st.lists(st.tuples(pauses_us, st.lists(shares, min_size=5, max_size=5)), min_size=1, max_size=10))
def test_every_bucket_is_charged_or_none(many, calls):
    """After a refusal each stored integer is as before; after a pass each level is lower by exactly its cost."""
    table, handle = table_of(*many)
    keys, now_us = [b"%d" % i for i in range(len(many))], START_US

    for pause_us, parts in calls:
        now_us += pause_us
        costs = tuple(amount(part, terms) for terms, part in zip(many, parts, strict=False))
        stored = [table.state(key) for key in keys]
        before = [units(table, key, terms, now_us) for key, terms in zip(keys, many, strict=True)]
        if table.reserve(handle, costs, now_us).allowed:
            after = [units(table, key, terms, now_us) for key, terms in zip(keys, many, strict=True)]
            taken = [cost * scale_of(terms).unit for cost, terms in zip(costs, many, strict=True)]
            assert after == [b - t for b, t in zip(before, taken, strict=True)]
        else:
            assert [table.state(key) for key in keys] == stored


@properties
@given(several, st.lists(shares, min_size=5, max_size=5), st.lists(shares, min_size=5, max_size=5))
def test_call_passes_if_it_passes_each_bucket_alone(many, drains, parts):
    """A call over several buckets is refused by the one that would keep it waiting longest, and by no other."""
    table, handle = table_of(*many)
    drained = tuple(min(amount(part, terms), terms.capacity) for terms, part in zip(many, drains, strict=False))
    table.reserve(handle, drained, START_US)
    costs = tuple(amount(part, terms) for terms, part in zip(many, parts, strict=False))

    alone = []
    for terms, drain, cost in zip(many, drained, costs, strict=True):
        single, one = table_of(terms)
        single.reserve(one, (drain,), START_US)
        alone.append(single.reserve(one, (cost,), START_US + 1).retry_after_us)

    together = table.reserve(handle, costs, START_US + 1)
    longest = max(alone)
    assert verdict(together) == (not longest, alone.index(longest) if longest else -1, longest)
    assert seen(together).waits_us == tuple(alone)


def indebted(terms, taken, overage, table, handle):
    """Bring a bucket somewhere between full and its floor."""
    table.reserve(handle, (min(amount(taken, terms), terms.capacity),), START_US)
    table.settle(handle, (amount(overage, terms),), START_US + 1)


@properties
@given(budgets(), shares, shares, pauses_us, shares, st.integers(0, 10**6))
def test_wait_is_tight_shrinks_with_time_and_grows_with_cost(terms, taken, overage, pause_us, part, idle):
    """Refused until 1 µs before the end of the wait, however often one asks; then it passes."""
    table, handle = table_of(terms)
    indebted(terms, taken, overage, table, handle)
    now_us, cost = START_US + 1 + pause_us, amount(part, terms)
    first = table.reserve(handle, (cost,), now_us)
    wait_us = first.retry_after_us
    assume(not first.allowed)

    assert table.reserve(handle, (cost + 1,), now_us).retry_after_us >= wait_us
    if wait_us == NEVER_US:
        assert cost > terms.capacity or terms.rate == 0 or (cost + terms.max_debt) / terms.rate > 10**8
        return
    assert cost <= terms.capacity
    assert wait_us <= first.full_in_us(0)
    later_us = min(idle, wait_us - 1)
    assert table.reserve(handle, (cost,), now_us + later_us).retry_after_us == wait_us - later_us
    assert not table.reserve(handle, (cost,), now_us + wait_us - 1).allowed
    assert table.reserve(handle, (cost,), now_us + wait_us).allowed


neutral = st.lists(
    st.sampled_from(["peek", "refused", "nothing", "settled at that", "taken and returned"]), max_size=3
)


def do_nothing(table, handle, how, terms, now_us):
    """Touch a bucket in a way that must not matter."""
    if how == "peek":
        table.peek(handle, now_us)
    elif how == "refused":
        assert not table.reserve(handle, (terms.capacity + 1,), now_us).allowed
    elif how == "nothing":
        assert table.reserve(handle, (0,), now_us).allowed
    elif how == "settled at that":
        table.settle(handle, (0,), now_us)
    elif table.reserve(handle, (1,), now_us).allowed:
        table.settle(handle, (-1,), now_us)


@properties
@given(budgets(), st.lists(st.tuples(pauses_us, st.fractions(0, 1), neutral, shares), min_size=1, max_size=15))
def test_looking_asking_and_pausing_on_the_way_changes_no_later_decision(terms, timeline):
    """A path with peeks, refusals and returned tokens in between ends where the direct one does."""
    direct, handle = table_of(terms)
    winding, other = table_of(terms)
    now_us = START_US

    for pause_us, stop, touches, part in timeline:
        for how in touches:
            do_nothing(winding, other, how, terms, now_us + int(stop * pause_us))
        now_us += pause_us
        cost = amount(part, terms)
        assert seen(direct.reserve(handle, (cost,), now_us)) == seen(winding.reserve(other, (cost,), now_us))
        assert units(direct, b"0", terms, now_us) == units(winding, b"0", terms, now_us)


@properties
@given(flowing, shares, shares, st.integers(0, S), st.integers(0, S))
def test_small_step_back_freezes_the_bucket_until_time_has_caught_up(terms, taken, overage, back_us, on_us):
    """Between a step back of up to a second and the time before it, nothing flows in."""
    table, handle = table_of(terms)
    indebted(terms, taken, overage, table, handle)
    assume(table.state(b"0") is not None)
    before = table.state(b"0")
    now_us = before[1] * scale_of(terms).tick_us

    at_us = min(now_us - back_us + on_us, now_us)
    level = table.peek(handle, at_us).level(0)
    table.reserve(handle, (terms.capacity + 1,), at_us)

    assert level == table.peek(handle, now_us).level(0)
    assert table.state(b"0") == before
    assert table.stats()["clock_steps"] == 0


@properties
@given(budgets(), shares, shares, st.integers(3 * S, 86_400 * S), pauses_us)
def test_large_step_back_adds_nothing_and_flows_on_from_there(terms, taken, overage, back_us, on_us):
    """At the moment of the step the level is as before; from then on the bucket is refilled as ever."""
    table, handle = table_of(terms)
    indebted(terms, taken, overage, table, handle)
    assume(table.state(b"0") is not None)
    level, tick = table.state(b"0")[:2]
    now_us = START_US + 1 - back_us
    scale = scale_of(terms)

    table.reserve(handle, (terms.capacity + 1,), now_us)

    assert table.state(b"0")[:2] == (level, now_us // scale.tick_us)
    assert table.state(b"0")[1] < tick
    assert table.stats()["clock_steps"] == 1
    due = (now_us + on_us) // scale.tick_us - now_us // scale.tick_us
    assert units(table, b"0", terms, now_us + on_us) == min(terms.capacity * scale.unit, level + due * scale.gain)


@properties
@given(
    flowing.filter(lambda terms: terms.max_debt > 0), st.fractions(0, 2), st.lists(st.integers(1, 12), max_size=5)
)
def test_debt_lets_nothing_pass_is_not_deepened_by_asking_and_is_paid_back_in_time(terms, part, costs):
    """While the level is negative every call is refused, and ceil(debt / gain) ticks later it is not negative."""
    table, handle = table_of(terms)
    table.reserve(handle, (terms.capacity,), START_US)
    table.settle(handle, (1 + int(part * terms.max_debt),), START_US)
    before = level, tick, _, gain, unit, tick_us = table.state(b"0")

    for cost in costs:
        assert not table.reserve(handle, (min(cost, terms.capacity),), START_US).allowed

    assert table.state(b"0") == before
    assert -terms.max_debt * unit <= level < 0
    paid_us = (tick - level // gain) * tick_us
    assume(paid_us <= LATEST_US)
    assert table.peek(handle, paid_us - 1).level(0) < 0 <= table.peek(handle, paid_us).level(0)


@properties
@given(budgets(), st.integers(1, 40), shares)
def test_at_one_instant_a_full_bucket_admits_exactly_what_it_holds(terms, calls, part):
    """Of k calls for n tokens, min(k, C // n) pass, the first ones."""
    cost = max(1, amount(part, terms))
    table, handle = table_of(terms)

    passed = [table.reserve(handle, (cost,), START_US).allowed for _ in range(calls)]

    admitted = min(calls, terms.capacity // cost)
    assert passed == [True] * admitted + [False] * (calls - admitted)


def configured(table, terms, now_us):
    table.configure(b"0", scale_of(terms), None, now_us)
    return prepared(table, ((b"0", terms),))


@properties
@given(budgets(), budgets(), shares, shares, pauses_us)
def test_change_of_budget_keeps_what_was_used_and_mints_nothing(old, new, taken, overage, pause_us):
    """Used tokens stay used to less than one, within the new bounds, and there and back is no gain."""
    table, handle = table_of(old)
    indebted(old, taken, overage, table, handle)
    now_us = START_US + 1 + pause_us
    before = table.peek(handle, now_us).level(0)

    after = table.peek(configured(table, new, now_us), now_us).level(0)
    back = table.peek(configured(table, old, now_us), now_us).level(0)

    used = old.capacity - before
    assert after == max(-new.max_debt, new.capacity - used)
    assert back == before + table.stats()["forgiven"] - before_forgiven(old, taken, overage)


def before_forgiven(terms, taken, overage):
    """Return what is forgiven when a bucket is brought where ``indebted`` brings it."""
    table, handle = table_of(terms)
    indebted(terms, taken, overage, table, handle)
    return table.stats()["forgiven"]


@properties
@given(budgets(), budgets(), st.lists(st.tuples(pauses_us, st.booleans(), shares), min_size=1, max_size=25))
def test_no_sequence_of_changes_admits_more_than_the_larger_budget_would(one, two, timeline):
    """Admitted in all is at most the larger capacity, the faster refill, and what lowering has forgiven."""
    table, _ = table_of(one)
    now_us, admitted = START_US, 0

    for pause_us, first, part in timeline:
        now_us += pause_us
        terms = one if first else two
        handle = configured(table, terms, now_us)
        cost = amount(part, terms)
        admitted += cost if table.reserve(handle, (cost,), now_us).allowed else 0

    most = max(one.capacity, two.capacity) + max(one.rate, two.rate) * Fraction(now_us - START_US, S)
    assert admitted <= most + table.stats()["forgiven"]


@properties
@given(flowing, flowing, st.lists(st.integers(0, 3 * S), min_size=1, max_size=15))
def test_change_of_budget_grants_no_time_twice(one, two, pauses):
    """However often the scale changes, what flows in is at most the faster rate over the time that passed."""
    one, two = Terms(10**9, one.rate % 1000, 0), Terms(10**9, two.rate % 1000, 0)
    table, handle = table_of(one)
    table.reserve(handle, (10**9,), START_US)
    now_us = START_US

    for i, pause_us in enumerate(pauses):
        now_us += pause_us
        handle = configured(table, two if i % 2 else one, now_us)

    assert table.peek(handle, now_us).level(0) <= max(one.rate, two.rate) * Fraction(now_us - START_US, S)
