"""Our level of the provider's buckets, beside the provider's own count of them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.house import ALICE, MODEL, NOW_US, House, grant, named
from tests.mirror import Mirror, learned
from tests.strategies import properties
from tokenguard._bucket import Shared
from tokenguard.backends.memory import MemoryBackend
from tokenguard.headroom import MAX_MODELS, Headroom, Pace
from tokenguard.limiter import Limiter, Reservation
from tokenguard.model import Budget, Meter, Source
from tokenguard.plan import GATE_COST, Plan, Plans
from tokenguard.provider_limits.gates import gate_of

# --- one bucket, by example ---------------------------------------------------------------------------------


def told(room, remaining, level):
    """Tell of a call that has just been charged."""
    return room.told(remaining, room.charge(level, 0))


def test_less_than_we_think_lowers_our_level():
    """What remains less than our level is missing from it, and as much again is kept for what is under way."""
    room = Headroom()

    assert told(room, 900, 1000) == 200
    assert room.moved == -200


def test_level_is_lowered_by_what_is_missing_and_what_is_kept_at_most():
    """A limit that was cut to a third is no reason to be in debt."""
    room = Headroom()
    room.hold(30_000, 937)

    assert told(room, 9000, 30_000) == 21_937


def test_slow_bucket_is_lowered_by_half_of_what_is_missing():
    """One answer that errs does not hold calls back for hours; when several say so, they are believed."""
    room, level, lowered = Headroom(), 10_000, []
    room.hold(10_000, 0, True)
    for _ in range(16):
        lowered.append(told(room, 200, level))
        level -= lowered[-1]

    assert lowered[:4] == [4900, 2450, 1225, 613]
    assert level == 200
    assert told(room, 199, level) == 1


def test_as_much_or_more_lowers_nothing():
    """A provider that grants more than we do leaves our level alone."""
    room = Headroom()

    assert told(room, 1000, 1000) == 0
    assert told(room, 5000, 1000) == 0
    assert room.moved == 0


def test_nothing_is_given_before_anything_is_told():
    """Until the provider has told what remains, there is no headroom."""
    assert Headroom().give(100, 0) == 0


def test_headroom_is_given_once():
    """What is given back is headroom no more, and never more than a call was charged."""
    room = Headroom()
    told(room, 1500, 1000)

    assert [room.give(300, 0) for _ in range(3)] == [300, 200, 0]
    assert room.moved == 500


def test_some_of_the_headroom_is_kept():
    """Calls are given back only what goes beyond what is kept in hand."""
    room = Headroom()
    told(room, 1500, 1000)

    assert [room.give(300, 400) for _ in range(2)] == [100, 0]
    assert room.give(300, 600) == 0


def test_headroom_that_grows_is_believed_little_by_little():
    """One answer that overtook others does not raise what may be given by all that it tells."""
    room = Headroom()
    told(room, 1000, 1000)
    told(room, 1400, 1000)

    assert room.give(1000, 0) == 100


def test_headroom_that_shrinks_is_believed_at_once():
    """What remains less than it did is not given back any more."""
    room = Headroom()
    told(room, 2000, 1000)
    told(room, 1010, 1000)

    assert room.give(1000, 0) == 10


def test_what_was_given_meanwhile_is_not_taken_for_headroom():
    """An answer tells of the moment of its call; what was given back since is in our level alone."""
    room = Headroom()
    told(room, 1500, 1000)
    before = room.charge(1000, 0)
    room.give(400, 0)

    assert room.told(1500, before) == 0
    assert room.give(1000, 0) == 100


def test_late_answer_tells_nothing_new():
    """An answer to a call from before the latest that was heard of lowers nothing, and allows nothing."""
    room = Headroom()
    before = room.charge(1000, 0)
    told(room, 1500, 1000)
    room.give(500, 0)

    assert room.told(10, before) == 0
    assert room.told(9000, before) == 0
    assert room.give(1000, 0) == 0


def test_call_that_the_provider_never_got_is_given_back_all():
    """It is charged no headroom beyond what there is, and what is told later knows that it was given back."""
    room = Headroom()
    told(room, 1100, 1000)
    room.gave(400)

    assert room.moved == 400
    assert room.give(1000, 0) == 0


def test_processes_of_a_node_lower_it_once():
    """What one heard of and saw to is no news to another, whose call was sent before."""
    shared = Shared()
    one, other = Headroom(shared), Headroom(shared)
    charges = [room.charge(1000, 0) for room in (one, other)]

    assert one.told(900, charges[0]) == 200
    assert other.told(900, charges[1]) == 0
    assert other.told(690, other.charge(800, 0)) == 220


def test_processes_of_a_node_give_headroom_once():
    """What one gave back, another does not."""
    shared = Shared()
    one, other = Headroom(shared), Headroom(shared)
    for room in (one, other):
        told(room, 1500, 1000)

    assert [room.give(300, 0) for room in (one, other, one)] == [300, 200, 0]


def test_processes_of_a_node_hear_in_one_order():
    """What an answer tells is of the past if another process has heard of a later call."""
    shared = Shared()
    one, other = Headroom(shared), Headroom(shared)
    before = one.charge(1000, 0)
    told(other, 1000, 1000)

    assert one.told(10, before) == 0
    assert one.moved == 0


def test_process_that_comes_late_knows_what_the_others_do():
    """Its first answer, too, is believed little by little where it tells of more."""
    shared = Shared()
    told(Headroom(shared), 1000, 1000)
    late = Headroom(shared)
    told(late, 1400, 1000)

    assert late.give(1000, 0) == 100


@properties
@given(
    st.lists(
        st.tuples(st.integers(0, 10**15), st.integers(-(10**15), 10**15), st.integers(0, 10**15)), max_size=20
    )
)
def test_headroom_stays_within_bounds(answers):
    """Whatever is told, no more is given than was told to be there, and nothing negative."""
    room, most = Headroom(), 0
    for remaining, level, cost in answers:
        most = max(most, 2 * abs(remaining - level))
        assert told(room, remaining, level) >= 0
        assert 0 <= room.give(cost, 0) <= min(cost, most)


# --- plans --------------------------------------------------------------------------------------------------


def house_of(*budgets, defaults=None):
    house = House(defaults)
    for budget in budgets:
        house.backend.put(budget, None, NOW_US)
    return house


def asks(house, prompt, total, most, now_us=NOW_US):
    reserved = house.limiter.reserve(ALICE, MODEL, prompt, total, most, now_us=now_us)
    assert isinstance(reserved, Reservation), reserved
    return reserved


def level_of(house, source, now_us=NOW_US):
    states = house.limiter.peek(ALICE, MODEL, now_us)
    return next(state.level for state in states if state.name.source is source)


def test_budget_set_by_hand_is_settled_to_usage_beside_learned_ones():
    """The provider's bucket follows the provider, ours follows what was used; the order is ours first."""
    house = house_of(learned(10_000), learned(50, meter=Meter.REQUESTS), defaults={"user": grant(5000)})
    call = asks(house, 10, 300, 900)

    assert [str(budget.name.source) for budget in call.plan.budgets] == ["headers", "headers", "None"]
    assert call.costs == (900, 1, 300)
    assert call.lowering(9500, 49) is None
    house.limiter.settle(call, 40, NOW_US)

    assert [state.level for state in house.limiter.peek(ALICE, MODEL, NOW_US)] == [9_188, 49, 4960]


@properties
@given(
    st.integers(1, 10**6),
    st.integers(0, 10**6),
    st.integers(0, 10**6),
    st.integers(0, 10**6),
    st.integers(0, 10**7),
)
def test_learned_budgets_change_no_cost_and_no_delta_of_others(capacity, prompt, more, beyond, used):
    """Beside a learned budget, one that was set by hand is asked and settled as it is alone."""
    ours = Budget(named("user:alice"), grant(capacity))
    alone, beside = Plan([ours], None), Plan([learned(1000), ours], None)
    costs = alone.costs(prompt, prompt + more)
    both = beside.costs(prompt, prompt + more, prompt + more + beyond)

    assert both[1:] == costs
    assert beside.deltas(both, used)[1:] == alone.deltas(costs, used)


@properties
@given(st.integers(1, 10**6), st.integers(0, 10**6), st.integers(0, 10**6), st.integers(0, 10**6))
def test_call_is_never_too_large_for_a_learned_budget(capacity, prompt, more, beyond):
    """What the provider cannot hold it refuses itself; a call is charged what it may count, or half the bucket."""
    plan = Plan([learned(capacity)], None)
    most = prompt + more + beyond
    (cost,) = plan.costs(prompt, prompt + more, most)

    assert 0 <= cost <= capacity
    least = max(prompt, more + beyond)
    assert cost == next((fits for fits in (most, least) if fits <= capacity), min(prompt, -(-capacity // 2)))


def test_both_sources_are_charged_and_given_back_alike():
    """What headers tell that was not counted is given back to the admin API's bucket too."""
    house = house_of(learned(10_000), learned(20_000, source=Source.ADMIN))
    call = asks(house, 10, 300, 900)
    call.lowering(9900, -1)
    house.limiter.settle(call, 40, NOW_US)

    given = 800 - 10_000 // 32
    assert level_of(house, Source.HEADERS) == 10_000 - 900 + given
    assert level_of(house, Source.ADMIN) == 20_000 - 900 + given


def test_without_headers_the_admin_budget_is_settled_to_usage():
    """Where nobody tells what remains, usage is the best guess."""
    house = house_of(learned(20_000, source=Source.ADMIN))
    house.limiter.settle(asks(house, 10, 300, 900), 40, NOW_US)

    assert level_of(house, Source.ADMIN) == 19_960


def test_call_that_was_never_sent_is_given_back_whole():
    """While the provider cannot be reached, calls do not drain the mirror of its bucket."""
    house = house_of(learned(10_000), defaults={"user": grant(5000)})
    told_of = asks(house, 10, 300, 900)
    told_of.lowering(9100, -1)
    house.limiter.settle(told_of, 900, NOW_US)
    for _ in range(50):
        house.limiter.refund(asks(house, 10, 300, 900), NOW_US)

    assert level_of(house, Source.HEADERS) == 9100


def test_call_that_the_provider_refused_is_given_back_what_was_not_counted():
    """A refusal may have been counted or not; what remains tells which."""
    house = house_of(learned(10_000))
    counted = asks(house, 10, 300, 900)
    assert counted.lowering(9100, -1) is None
    house.limiter.settle(counted, 0, NOW_US)

    assert level_of(house, Source.HEADERS) == 9100


def test_less_than_we_think_lowers_only_the_bucket_that_was_told_of():
    """The deltas of a lowering leave everything else as it is."""
    house = house_of(learned(10_000), learned(50, meter=Meter.REQUESTS), defaults={"user": grant(5000)})
    call = asks(house, 10, 300, 900)

    assert call.lowering(9000, -1) == (200, 0, 0)
    assert asks(house, 0, 1, 1).lowering(-1, 40) == (0, 9, 0)


def test_process_that_is_told_of_the_past_gives_back_what_the_others_know_of():
    """To whom it has not told anything newer, the provider has still told of this very call."""
    house = house_of(learned(10_000))
    other = Limiter(MemoryBackend(house.table), Plans(MemoryBackend(house.table), {}))
    call = other.reserve(ALICE, MODEL, 10, 300, 900, now_us=NOW_US)
    asks(house, 10, 300, 900).lowering(8200, -1)
    assert call.lowering(9100, -1) is None
    other.settle(call, 40, NOW_US)

    assert level_of(house, Source.HEADERS) == 8200


def test_call_whose_answer_tells_nothing_goes_by_its_usage():
    """Where header fields go missing, what calls took is all that is known."""
    house = house_of(learned(10_000))
    heard, not_heard = asks(house, 10, 300, 900), asks(house, 10, 300, 900)
    heard.lowering(9100, -1)

    assert not_heard.close_at(40)[1] == (40 - 900,)
    assert heard.close_at(40)[1] == (0,)


def test_call_whose_answer_tells_nothing_is_missed_by_nobody():
    """What it is given back by its usage is no spending of others."""
    house = house_of(learned(10_000))
    house.limiter.settle(asks(house, 10, 300, 9000), 9000, NOW_US)
    room = asks(house, 10, 20, 20).plan.tokens_room
    asks(house, 10, 300, 400).lowering(580, -1)
    house.limiter.settle(asks(house, 10, 300, 300), 40, NOW_US)
    asks(house, 10, 20, 20).lowering(260, -1)

    assert room.drift.missed == 0


def test_plans_of_all_callers_share_what_is_known():
    """What one caller's answer tells counts for the next caller's call."""
    house = house_of(learned(10_000))
    plan = asks(house, 10, 300, 900).plan
    other = house.plans.resolve(ALICE._replace(user="bob"), MODEL)

    assert other is not plan
    assert other.tokens_room is plan.tokens_room
    assert house.plans.resolve(ALICE, "another").tokens_room is None


def test_plan_counts_a_gate_in_thousandths():
    """A call asks a gate for one call, and what it took changes nothing of that."""
    plan = Plan([Budget(gate_of(MODEL), grant(1000))], None)

    assert plan.costs(5, 10, 20) == (GATE_COST,)
    assert plan.deltas((GATE_COST,), 500) == (0,)
    assert (plan.tokens_at, plan.requests_at, plan.limit_at(-1)) == (-1, -1, 0)


def test_limit_of_a_day_is_not_lowered_below_what_remains():
    """What is kept in hand of a minute's limit would be most of an hour of a day's."""
    house = house_of(learned(10_000, meter=Meter.REQUESTS, window_s=86_400))
    for _ in range(20):
        if (deltas := (call := asks(house, 10, 20, 20)).lowering(-1, 205)) is not None:
            house.limiter.lower(call, deltas, NOW_US)

    (state,) = house.limiter.peek(ALICE, MODEL, NOW_US)
    assert 185 <= state.level <= 205


def test_limit_of_a_day_is_looked_at_each_time():
    """A plan knows limits per minute by heart; whoever took a minute for a day would be far too strict."""
    plan = Plan([learned(10_000), learned(10_000, meter=Meter.REQUESTS, window_s=86_400)], None)

    assert (plan.limit_at(plan.tokens_at), plan.limit_at(plan.requests_at)) == (10_000, 0)


# --- against a provider with a count of its own -------------------------------------------------------------


@pytest.mark.parametrize("counting", ["openai", "azure"])
@pytest.mark.parametrize("others", [0.0, 0.3])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("processes", [1, 4])
def test_level_is_above_the_providers_by_what_has_not_been_heard_at_most(counting, others, seed, processes):
    """What the provider counted since the latest answer that was heard is the most that it is too high by."""
    mirror = Mirror(seed, counting, others=others, long=0.1, processes=processes)

    def looks(mirror, now_us):
        unheard = sum(mirror.history[mirror.heard_to :])
        assert mirror.excess(now_us) <= unheard + 2 * mirror.MEAN, f"seed {seed}"

    mirror.run(90, looks)


@pytest.mark.parametrize("seed", range(3))
def test_level_is_below_the_providers_once_all_is_heard(seed):
    """With all answers in, and none overtaken, our level is not above the provider's."""
    mirror = Mirror(seed, "openai", reordered=False, load=3.0)
    mirror.run(90)

    assert mirror.excess(mirror.provider.at_us) <= 1


@pytest.mark.parametrize("processes", [1, 4])
@pytest.mark.parametrize("counting", ["openai", "azure", "usage"])
@pytest.mark.parametrize("long", [0.0, 0.3])
def test_hardly_a_call_is_refused_upstream_and_the_grant_is_used(counting, processes, long):
    """Under three times the limit, over 90 % of it is used, and under 1 % of the calls is refused upstream."""
    forwarded = refused = used = 0
    for seed in range(3):
        mirror = Mirror(seed, counting, processes=processes, long=long)
        mirror.run(240)
        forwarded += mirror.forwarded
        refused += mirror.refused
        used += mirror.counted / (mirror.limit + mirror.limit * 240 / 60)

    assert refused < 0.01 * forwarded
    assert used / 3 > 0.9


def test_nothing_is_lowered_while_nobody_else_spends():
    """Answers of very different length, heard in any order, do not lower our level again and again."""
    mirror = Mirror(1, "openai", long=0.3)
    mirror.run(240)

    assert mirror.lowered < 0.01 * mirror.limit


@pytest.mark.parametrize("processes", [1, 3])
def test_level_follows_while_others_spend(processes):
    """With a third of the limit spent by others, our level stays near the provider's."""
    mirror = Mirror(5, "openai", others=0.3, processes=processes)
    worst = []
    mirror.run(240, lambda mirror, now_us: worst.append(mirror.excess(now_us)))

    assert max(worst) < 0.05 * mirror.limit
    assert mirror.refused < 0.05 * mirror.forwarded


# --- how fast calls are answered ----------------------------------------------------------------------------


def test_pace_is_calls_a_second_of_late():
    """Calls of the last periods are counted, and of each model for itself."""
    pace = Pace()
    for i in range(80):
        pace.passed("m", 1000 + i / 10)

    assert pace.rate("m", 1008.0) == pytest.approx(10, rel=0.15)
    assert pace.rate("other", 1008.0) == 0
    assert (pace.last_s("m"), pace.last_s("other")) == (pytest.approx(1007.9), -1)


def test_pace_ends_when_calls_do():
    """Four seconds after the last call there is no pace."""
    pace = Pace()
    pace.passed("m", 1000)

    assert pace.rate("m", 1000) > 0
    assert pace.rate("m", 1004) == 0


def test_pace_forgets_the_first_of_too_many_models():
    """Models that a caller makes up do not fill the memory."""
    pace = Pace()
    for i in range(MAX_MODELS + 10):
        pace.passed(f"m{i}", 1000)

    assert pace.last_s("m0") == -1
    assert pace.last_s(f"m{MAX_MODELS + 9}") == 1000
