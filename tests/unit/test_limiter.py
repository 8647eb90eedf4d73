"""Reserve, settle, refund and peek over the whole hierarchy, by one thread and by many."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.house import ALICE, MODEL, NOW_US, House, S, grant, named
from tokenguard.errors import AlreadySettled, BudgetNotFound, StaleHandle, TableBusy, TableFull
from tokenguard.limiter import Limiter, Reservation
from tokenguard.model import NEVER_US, Decision, Identity, Meter, Scope
from tokenguard.plan import Plans

ALL_SCOPES = ("global", "team:red", "rolegroup:staff", "role:dev", "user:alice")


def staircase(**more):
    """Return a house where every level holds less than the one above: 5000 to 1000 tokens."""
    scales = {"global": 5000, "team": 4000, "rolegroup": 3000, "role": 2000, "user": 1000, **more}
    return House({kind: grant(capacity) for kind, capacity in scales.items()})


def levels(house, who=ALICE):
    return list(house.levels(who).values())


# --- reserve ------------------------------------------------------------------------------------------------


def test_reserve_takes_from_every_level():
    """A call is charged to every bucket on its path, and the decision tells what is left."""
    house = staircase()

    reservation = house.taken(300)

    assert levels(house) == [4700, 3700, 2700, 1700, 700]
    assert [state.level for state in reservation.decision.buckets] == [4700, 3700, 2700, 1700, 700]
    assert reservation.decision.allowed
    assert reservation.decision.binding is None
    assert reservation.decision.retry_after_us == 0


def test_call_on_no_bucket_passes():
    """A caller whom nothing limits may always call."""
    house = House()

    reservation = house.taken(10**9)

    assert reservation.decision == Decision(True, 0, None, ())
    assert house.table.stats()["used"] == 0


@pytest.mark.parametrize("short", ALL_SCOPES)
def test_refusal_names_the_binding_scope_and_touches_no_bucket(short):
    """Whichever level is short, it is named, all others are told, and no bucket changes by a byte."""
    house = House()
    for scope in ALL_SCOPES:
        house.set(scope, grant(100 if scope == short else 1000))
    house.taken(50)
    before = house.stored(*ALL_SCOPES)

    decision = house.reserve(51, prompt=51)

    assert isinstance(decision, Decision)
    assert not decision.allowed
    assert decision.binding.name == named(short)
    assert (decision.binding.limit, decision.binding.level, decision.binding.cost) == (100, 50, 51)
    assert decision.retry_after_us == decision.binding.wait_us == NEVER_US
    assert [state.name for state in decision.buckets] == [named(scope) for scope in ALL_SCOPES]
    assert [state.wait_us for state in decision.buckets if state is not decision.binding] == [0] * 4
    assert house.stored(*ALL_SCOPES) == before


def test_bucket_with_the_longest_wait_binds():
    """Of several short buckets the slowest one is named, and its wait is the call's."""
    house = House()
    house.set("global", grant(100, rate=10))
    house.set("user:alice", grant(100, rate=1))
    house.taken(50, prompt=50)
    house.taken(50, prompt=50)

    decision = house.reserve(20)

    assert decision.binding.name == named("user:alice")
    assert [state.wait_us for state in decision.buckets] == [2 * S, 20 * S]
    assert decision.retry_after_us == 20 * S


def test_refused_call_passes_exactly_after_its_wait():
    """At retry_after the same call passes, and one µs earlier it does not."""
    house = House({"user": grant(100, rate=3)})
    house.taken(100, prompt=100)
    wait_us = house.reserve(50).retry_after_us

    early = house.reserve(50, now_us=NOW_US + wait_us - 1)

    assert early.retry_after_us == 1
    assert house.taken(50, now_us=NOW_US + wait_us)


def test_prompt_twice_the_bucket_never_passes():
    """A prompt of which even half the estimate does not fit is refused for ever."""
    house = House({"user": grant(100, rate=10)})

    assert house.reserve(201, prompt=201).retry_after_us == NEVER_US
    assert house.taken(200, prompt=200).costs == (100,)


def test_requests_are_counted_beside_tokens():
    """A budget of requests is charged one for each call, and binds like any other."""
    house = House({"user": grant(1000)})
    house.set("user:alice", grant(2), Meter.REQUESTS)

    assert house.taken(10).costs == (10, 1)
    house.taken(10)
    decision = house.reserve(10)

    assert decision.binding.name == named("user:alice", Meter.REQUESTS)
    assert decision.binding.cost == 1
    assert house.levels() == {"user:alice on tokens": 980, "user:alice on requests": 0}


def test_users_have_buckets_of_their_own_and_share_their_team():
    """What one user takes is missing for the team, and not for another user."""
    house = House({"team": grant(1500), "user": grant(1000)})
    bob = ALICE._replace(user="bob")
    house.taken(1000, prompt=1000)

    assert levels(house) == [500, 0]
    assert levels(house, bob) == [500, 1000]
    assert house.reserve(501, who=bob, prompt=501).binding.name == named("team:red")


def test_table_without_room_refuses_new_callers_and_charges_nobody():
    """Where there is no room for a bucket, the call ends in TableFull with every other bucket as before."""
    house = House({"global": grant(1000), "user": grant(1000)}, buckets=2)
    house.taken(10)
    before = house.stored("global", "user:alice")

    with pytest.raises(TableFull):
        house.reserve(10, who=Identity("bob"))

    assert house.stored("global", "user:alice") == before


# --- settle and refund --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("actual", "left"), [(0, 1000), (1, 999), (299, 701), (300, 700), (301, 699), (1000, 0)])
def test_settle_replaces_the_reservation_by_the_usage(actual, left):
    """After settling every bucket has been charged what the call took, and nothing is forgiven."""
    house = staircase()
    reservation = house.taken(300)

    assert house.limiter.settle(reservation, actual, NOW_US) == 0
    assert levels(house) == [left + 4000, left + 3000, left + 2000, left + 1000, left]


def test_usage_beyond_the_bucket_becomes_debt():
    """Overage is charged to every bucket, also where it goes below zero, and later calls wait for it."""
    house = House({"user": grant(1000, rate=100)})
    reservation = house.taken(5000)

    house.limiter.settle(reservation, 3000, NOW_US)

    assert reservation.costs == (500,)
    assert levels(house) == [-2000]
    assert house.reserve(1).retry_after_us == 2001 * S // 100


def test_debt_ends_at_its_floor_and_the_rest_is_told():
    """What falls below a bucket's floor is forgiven, and settle says how much."""
    house = House({"user": grant(1000, max_debt=100)})
    reservation = house.taken(1000)

    assert house.limiter.settle(reservation, 1500, NOW_US) == 400
    assert levels(house) == [-100]


def test_refund_gives_back_all_tokens_and_keeps_the_request_counted():
    """A refund is complete for tokens; the request stays counted."""
    house = House({"user": grant(1000), "team": grant(2000)})
    house.set("user:alice", grant(5), Meter.REQUESTS)
    reservation = house.taken(300)

    house.limiter.refund(reservation, NOW_US)

    assert house.levels() == {
        "team:red on tokens": 2000,
        "user:alice on tokens": 1000,
        "user:alice on requests": 4,
    }


def test_capped_cost_is_settled_bucket_by_bucket():
    """Buckets that were asked for different amounts all end at the real usage."""
    house = House({"global": grant(10_000), "user": grant(100)})
    reservation = house.taken(300)
    assert reservation.costs == (300, 50)

    house.limiter.settle(reservation, 120, NOW_US)

    assert levels(house) == [9880, -20]


def settle(house, reservation):
    house.limiter.settle(reservation, 100, NOW_US)


def refund(house, reservation):
    house.limiter.refund(reservation, NOW_US)


def keep(_, reservation):
    reservation.close()


@pytest.mark.parametrize("again", [settle, refund, keep])
@pytest.mark.parametrize("first", [settle, refund, keep])
def test_reservation_is_dealt_with_once(first, again):
    """Settling, refunding or keeping a reservation a second time is an error that changes nothing."""
    house = staircase()
    reservation = house.taken(300)
    first(house, reservation)
    before = house.stored(*ALL_SCOPES)

    with pytest.raises(AlreadySettled):
        again(house, reservation)

    assert house.stored(*ALL_SCOPES) == before


@pytest.mark.parametrize("tokens", [-1, -1000])
def test_negative_usage_mints_no_tokens(tokens):
    """A call cannot have taken less than nothing: that is an error, and no bucket gains by it."""
    house = House({"user": grant(1000)})
    house.taken(500)
    reservation = house.taken(300)

    with pytest.raises(ValueError, match="tokens"):
        house.limiter.settle(reservation, tokens, NOW_US)

    assert levels(house) == [200]


class LockedOnce:
    """A backend whose table is found locked at the first settle."""

    def __init__(self, backend):
        self._backend = backend
        self._locked = True

    def __getattr__(self, name):
        return getattr(self._backend, name)

    def settle(self, handle, deltas, now_us=None):
        if self._locked:
            self._locked = False
            raise TableBusy("the table of buckets was locked for over a second")
        return self._backend.settle(handle, deltas, now_us)


def test_settlement_that_failed_can_be_tried_again():
    """A reservation whose settling met a locked table is not settled: the next try settles it."""
    house = House({"user": grant(1000)})
    limiter = Limiter(LockedOnce(house.backend), house.plans)
    reservation = house.taken(300)

    with pytest.raises(TableBusy):
        limiter.settle(reservation, 100, NOW_US)
    limiter.settle(reservation, 100, NOW_US)

    assert levels(house) == [900]


# --- budgets that change ------------------------------------------------------------------------------------


def test_budget_acts_on_the_very_next_call():
    """A budget set between two calls holds for the second one, and what was used stays used."""
    house = House({"user": grant(1000)})
    house.taken(400)

    house.set("user:alice", grant(500))

    assert levels(house) == [100]
    assert house.reserve(101, prompt=101).binding.limit == 500
    house.set("user:alice", grant(2000))
    assert levels(house) == [1600]
    assert house.taken(1600, prompt=1600)


def test_new_level_of_the_hierarchy_acts_on_the_very_next_call():
    """A scope that was unlimited is on the path as soon as it has a budget."""
    house = House({"user": grant(1000)})
    house.taken(100)

    house.set("team:red", grant(50))

    assert house.reserve(101, prompt=101).binding.name == named("team:red")


def test_removed_budget_gives_way_to_the_default():
    """Removing a budget is a change back to the default; what was used stays used."""
    house = House({"user": grant(1000)})
    house.set("user:alice", grant(5000))
    house.taken(400)

    house.backend.drop(named("user:alice"), grant_of(house), NOW_US)

    assert levels(house) == [600]
    assert house.reserve(601, prompt=601).binding.limit == 1000


def grant_of(house):
    """Return the default that holds for alice."""
    return house.plans.default(named("user:alice"))


def test_removed_budget_without_a_default_is_unlimited():
    """Removing a budget from a scope that has no default takes the bucket off the path."""
    house = House()
    house.set("team:red", grant(10))
    assert isinstance(house.reserve(50, prompt=50), Decision)

    house.backend.drop(named("team:red"), None, NOW_US)

    assert house.taken(50).costs == ()


def test_reservation_is_settled_whatever_became_of_the_budget():
    """A call in flight while its budget changes is settled to its usage under the new one."""
    house = House({"user": grant(1000)})
    first, second, third = house.taken(300), house.taken(300), house.taken(300)

    house.set("user:alice", grant(2000))
    house.limiter.settle(first, 100, NOW_US)
    house.limiter.refund(second, NOW_US)
    house.limiter.settle(third, 400, NOW_US)

    assert levels(house) == [1500]


# --- stale plans --------------------------------------------------------------------------------------------


class Restless:
    """A backend where somebody changes a budget just before a reserve, for the first few times."""

    def __init__(self, backend, changes):
        self._backend = backend
        self.changes = changes

    def __getattr__(self, name):
        return getattr(self._backend, name)

    @property
    def epoch(self):
        return self._backend.epoch

    def reserve(self, handle, costs, now_us=None):
        if self.changes:
            self.changes -= 1
            house_budget = grant(1000 + self.changes)
            self._backend.put(next(iter(self.on(Scope("team", "red"))))._replace(scale=house_budget), None, NOW_US)
        return self._backend.reserve(handle, costs, now_us)


def restless(changes):
    """Return a limiter over a backend whose budget changes, and the house it stands in."""
    house = House({"user": grant(5000)})
    house.set("team:red", grant(3000))
    backend = Restless(house.backend, changes)
    return Limiter(backend, Plans(backend, {"user": grant(5000)})), house


@pytest.mark.parametrize("changes", [1, 2, 5])
def test_call_that_meets_changing_budgets_is_decided_under_the_last_one(changes):
    """A plan that turned stale is resolved anew, and the call is charged once."""
    limiter, house = restless(changes)

    reserved = limiter.reserve(ALICE, MODEL, 0, 200, now_us=NOW_US)

    assert isinstance(reserved, Reservation)
    assert [state.limit for state in reserved.decision.buckets] == [1000, 5000]
    assert house.levels() == {"team:red on tokens": 800, "user:alice on tokens": 4800}


def test_budgets_that_never_rest_end_in_an_error_that_charges_nothing():
    """A caller hears of budgets that change faster than plans can be made, and nothing was taken."""
    limiter, house = restless(10**6)

    with pytest.raises(StaleHandle):
        limiter.reserve(ALICE, MODEL, 0, 200, now_us=NOW_US)

    assert house.levels()["user:alice on tokens"] == 5000


# --- peek ---------------------------------------------------------------------------------------------------


def test_peek_changes_nothing():
    """Looking at the buckets, now or later, writes nothing and makes no bucket."""
    house = House({kind: grant(1000, rate=7) for kind in ("global", "user")})
    house.taken(300)
    before = house.stored("global", "user:alice", "user:bob")

    house.limiter.peek(ALICE, MODEL, NOW_US + 10 * S)
    house.limiter.peek(Identity("bob"), MODEL, NOW_US + 10 * S)

    assert house.stored("global", "user:alice", "user:bob") == before
    assert house.table.stats()["used"] == 2


def test_peek_shows_the_buckets_as_they_are():
    """Each bucket on the path is told with its level, nothing asked of it, and when it will be full."""
    house = House({"user": grant(1000, rate=10)})
    house.taken(300)

    (state,) = house.limiter.peek(ALICE, MODEL, NOW_US + 10 * S)

    assert (state.name, state.limit, state.level, state.cost, state.wait_us) == (
        named("user:alice"),
        1000,
        800,
        0,
        0,
    )
    assert state.full_in_us == 20 * S


def test_peek_sees_fresh_budgets():
    """A budget that was set since the plan was made is the one that is shown."""
    house = House({"user": grant(1000)})
    house.limiter.peek(ALICE, MODEL, NOW_US)

    house.set("user:alice", grant(50))
    house.set("team:red", grant(70))

    assert house.levels() == {"team:red on tokens": 70, "user:alice on tokens": 50}


# --- many threads -------------------------------------------------------------------------------------------


def together(*jobs):
    """Run jobs in threads of their own that begin at once; return what each returned."""
    gate = threading.Barrier(len(jobs))

    def started(job):
        gate.wait()
        return job()

    with ThreadPoolExecutor(len(jobs)) as pool:
        return [future.result() for future in [pool.submit(started, job) for job in jobs]]


def test_of_many_threads_exactly_one_settles():
    """However many threads settle, refund or keep one reservation, one of them gets through."""
    house = House({"user": grant(100_000)})

    def tried(deal, reservation):
        try:
            deal(house, reservation)
        except AlreadySettled:
            return 0
        return 1

    for _ in range(50):
        reservation = house.taken(100)
        jobs = [lambda d=deal, r=reservation: tried(d, r) for deal in (settle, settle, settle, settle)]
        assert sum(together(*jobs)) == 1
    assert levels(house) == [100_000 - 50 * 100]


def test_threads_never_take_more_than_there_is():
    """Threads that race for a fixed grant get it all, and not a token more."""
    house = House({"global": grant(1000), "user": grant(900)})

    def grab(user):
        who = Identity(user)
        return sum(isinstance(house.reserve(3, who=who), Reservation) for _ in range(400))

    got = together(*[lambda u=user: grab(u) for user in ("a", "b", "c", "d")])

    assert sum(got) == 333
    assert house.levels(Identity("a")) == {"global:* on tokens": 1, "user:a on tokens": 900 - 3 * got[0]}


def test_nothing_is_lost_while_a_budget_changes_all_the_time():
    """While a budget is set thousands of times, what threads take and settle is counted to the token."""
    house = House({"user": grant(10**6)})
    house.set("team:red", grant(500_000))
    done = threading.Event()

    def call(number):
        used = 0
        who = ALICE._replace(user=f"user-{number}")
        for i in range(3000):
            try:
                reservation = house.taken(10, who=who)
            except StaleHandle:  # nothing was charged
                continue
            tokens = (0, 7, 10, 25)[i % 4]
            house.limiter.settle(reservation, tokens, NOW_US)
            used += tokens
        return used

    def calls(number):
        try:
            return call(number)
        finally:
            if number == 0:
                done.set()

    def change():
        changes = 0
        while changes < 5000 or not done.is_set():
            house.set("team:red", grant(500_000 + changes % 3))
            changes += 1
        house.set("team:red", grant(500_000))

    *used, _ = together(*[lambda n=number: calls(n) for number in range(4)], change)

    assert sum(used) > 0
    assert house.levels()["team:red on tokens"] == 500_000 - sum(used)
    for number, tokens in enumerate(used):
        assert (
            house.levels(ALICE._replace(user=f"user-{number}"))[f"user:user-{number} on tokens"] == 10**6 - tokens
        )


def test_nothing_is_lost_while_a_budget_comes_and_goes():
    """While a budget is set and removed all the time, every call is charged to the default's bucket exactly."""
    house = House({"global": grant(10**6), "user": grant(10**6)})
    name = named("user:alice")

    def calls():
        used = 0
        for _ in range(3000):
            try:
                house.taken(10)
            except StaleHandle:
                continue
            used += 10
        return used

    def change():
        for _ in range(2000):
            house.set("user:alice", grant(2 * 10**6))
            house.backend.drop(name, house.plans.default(name), NOW_US)

    *used, _ = together(calls, calls, calls, change)

    assert levels(house)[0] == 10**6 - sum(used)
    assert levels(house)[-1] == 10**6 - sum(used)


def test_removing_a_budget_that_is_not_there_is_an_error():
    """There is no explicit budget to remove, and the epoch need not move."""
    house = House({"user": grant(10)})

    with pytest.raises(BudgetNotFound):
        house.backend.drop(named("user:alice"), None, NOW_US)


# --- look ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0, 3, 0.7])
@pytest.mark.parametrize("tokens", [0, 1, 400, 401, 1000, 1500, 2001, 10_001])
def test_look_tells_what_reserve_would(tokens, rate):
    """A refusal is foretold to the unit and the µs, and what would pass is told to pass; nothing is taken."""
    house = House({"global": grant(5000, rate), "team": grant(900, rate), "user": grant(1000)})
    house.taken(600, prompt=600)
    then_us = NOW_US + 7 * S
    before = levels(house)

    seen = house.limiter.look(ALICE, MODEL, tokens, tokens, then_us)

    assert levels(house) == before
    came = house.reserve(tokens, prompt=tokens, now_us=then_us)
    assert seen.allowed == isinstance(came, Reservation)
    if seen.allowed:
        assert (seen.binding, seen.retry_after_us) == (None, 0)
    else:
        assert seen == came


def test_what_is_asked_is_asked_of_every_bucket():
    """As many costs as buckets, or an error."""
    house = staircase()
    seen = house.backend.peek(house.limiter.plan(ALICE, MODEL).handle, NOW_US)

    for costs in ((), (1,) * 4, (1,) * 6):
        with pytest.raises(ValueError, match=f"the plan has 5 buckets, got {len(costs)} costs"):
            seen.asked(costs)
    assert not seen.asked((0, 0, 0, 0, 1001)).allowed
    assert seen.asked((5000, 4000, 3000, 2000, 1000)).allowed
