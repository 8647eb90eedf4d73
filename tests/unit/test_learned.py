"""Budgets that are made of what the provider tells of its limits, and when they change."""

import random
from itertools import pairwise

import pytest

from tests.house import ALICE, MODEL, NOW_US, House, S, grant, named
from tests.mirror import learned
from tests.unit.test_provider_wire import go_duration
from tokenguard._heads import Told
from tokenguard.arithmetic import MAX_CAPACITY
from tokenguard.backends.memory import MemoryBackend
from tokenguard.errors import BudgetNotFound, InvalidValue
from tokenguard.model import EVERYBODY, BucketName, Budget, Meter, Scope, Source
from tokenguard.provider_limits.gates import gate_of
from tokenguard.provider_limits.learned import (
    AGREEING,
    MAX_LEARNED,
    STEADY_S,
    Change,
    Learned,
    Reading,
    limits_of,
    per_minute,
    window_of,
)
from tokenguard.providers.limits import DAY_S, MINUTE_S, AdminLimit


def told(limit, remaining=None, window_s=MINUTE_S):
    """Return what header fields tell of a bucket."""
    remaining = limit - max(1, limit // 10) if remaining is None else remaining
    reset = go_duration(round((limit - remaining) / limit * window_s * 1000))
    return Reading(limit, remaining, reset, remaining)


class Desk:
    """What a process has learned, on a house of its own."""

    def __init__(self, house=None):
        self.house = house or House(buckets=4096)
        self.counted = []
        self.learned = Learned(self.house.backend, self.house.budgets, self.counted.append)
        self.changes = []

    def hears(self, what, now_s=1000.0, meter=Meter.TOKENS, model=MODEL):
        """Hear what an answer tells, and do what follows; return it."""
        change = self.learned.hear(model, meter, what, now_s)
        if change is not None:
            self.changes.append((now_s, change))
            self.learned.apply(change)
        return change

    def reads(self, *limits):
        changes = list(self.learned.read(limits))
        for change in changes:
            self.learned.apply(change)
        return changes

    def limit(self, source=Source.HEADERS, meter=Meter.TOKENS, model=MODEL):
        """Return a learned budget's limit and window; None if there is none."""
        name = learned(1, meter=meter, source=source, model=model).name
        budget = self.learned.current().get(name)
        return budget and (budget.scale.capacity, window_of(budget))

    def level(self, source=Source.HEADERS, meter=Meter.TOKENS):
        return self.house.budgets.get(learned(1, meter=meter, source=source).name).level


@pytest.fixture
def desk():
    return Desk()


# --- of header fields ---------------------------------------------------------------------------------------


def test_first_limit_is_believed_at_once(desk):
    """The first answer that tells a limit per minute makes a budget, whose level is what remains."""
    change = desk.hears(told(10_000, 7000))

    assert change == Change(learned(10_000).name, None, learned(10_000), 7000)
    assert desk.limit() == (10_000, MINUTE_S)
    assert desk.level() == pytest.approx(7000, abs=200)
    assert desk.counted == ["learned"]


def test_level_is_the_least_of_what_a_call_has_to_pass(desk):
    """Where a project's limit is the tighter one, but less remains of the organization's, that is the level."""
    desk.hears(Reading(60_000, 57_000, b"3s", 20_000))

    assert desk.limit() == (60_000, MINUTE_S)
    assert desk.level() == pytest.approx(20_000, abs=1000)


def test_known_limit_changes_nothing(desk):
    """An answer that tells what is known does not touch the budgets."""
    desk.hears(told(10_000))
    epoch = desk.house.backend.epoch
    for remaining in range(9000, 9999, 7):
        assert desk.hears(told(10_000, remaining)) is None

    assert desk.house.backend.epoch == epoch


def test_limit_of_a_day_is_believed_when_three_answers_tell_it(desk):
    """A day throttles 1,440 times as much as a minute: one answer may be chance."""
    for _ in range(AGREEING - 1):
        assert desk.hears(told(10_000, window_s=DAY_S), meter=Meter.REQUESTS) is None
    desk.hears(told(10_000, 9000, window_s=DAY_S), meter=Meter.REQUESTS)

    assert desk.limit(meter=Meter.REQUESTS) == (10_000, DAY_S)
    assert desk.level(meter=Meter.REQUESTS) == 9000


@pytest.mark.parametrize("between", [Reading(10_000, 9000, b"42s", 9000), Reading(10_000, 9000, b"?", 9000)])
def test_answer_that_contradicts_a_day_begins_anew(desk, between):
    """Three answers in a row must tell a day: one between them that fits no window is no such row."""
    for _ in range(20):
        desk.hears(told(10_000, window_s=DAY_S), meter=Meter.REQUESTS)
        desk.hears(told(10_000, window_s=DAY_S), meter=Meter.REQUESTS)
        desk.hears(between, meter=Meter.REQUESTS)

    assert desk.limit(meter=Meter.REQUESTS) is None


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("per_minute", [5, 30, 300])
def test_windows_of_a_minute_are_never_taken_for_a_day(desk, seed, per_minute):
    """A provider that counts in windows, and tells in Go's words when this one ends, makes no budget of a day."""
    rnd, now_s, used, window = random.Random(seed), 0.0, 0, 0
    for _ in range(3000):
        now_s += rnd.expovariate(per_minute / 60)
        if int(now_s // 60) != window:
            window, used = int(now_s // 60), 0
        used += 1
        left_s = 60 - now_s % 60
        for meter, limit, by in ((Meter.REQUESTS, 10_000, used), (Meter.TOKENS, 200_000, used * 321)):
            if by < limit:
                desk.hears(Reading(limit, limit - by, go_duration(int(left_s * 1000)), limit - by), now_s, meter)
        for meter in (Meter.REQUESTS, Meter.TOKENS):
            assert (desk.limit(meter=meter) or (0, MINUTE_S))[1] == MINUTE_S, f"seed {seed} at {now_s} s"
        for change in desk.learned.heard():
            assert window_of(change.after) == MINUTE_S


def test_another_limit_is_believed_when_three_answers_in_a_row_tell_it(desk):
    """Not before, and not if the known one is told in between."""
    desk.hears(told(10_000), 1000)
    for now_s in (1020, 1021):
        desk.hears(told(5000), now_s)
    desk.hears(told(10_000), 1022)
    for now_s in (1023, 1024):
        desk.hears(told(5000), now_s)
    assert desk.limit() == (10_000, MINUTE_S)

    desk.hears(told(5000), 1025)
    assert desk.limit() == (5000, MINUTE_S)
    assert desk.counted == ["learned", "changed"]


def test_higher_limit_has_to_wait_for_ten_seconds(desk):
    """However many answers tell it: budgets are not rewritten all the time."""
    desk.hears(told(10_000), 1000)
    for tenth in range(1, 10 * int(STEADY_S)):
        assert desk.hears(told(15_000), 1000 + tenth / 10) is None

    assert desk.hears(told(15_000), 1000 + STEADY_S) is not None


def test_lower_limit_is_believed_at_the_third_answer(desk):
    """Whoever goes on as before meanwhile is refused by the provider."""
    desk.hears(told(10_000), 1000)

    assert [desk.hears(told(5000), 1000 + tenth / 10) is not None for tenth in (1, 2, 3)] == [False, False, True]


def test_flapping_rewrites_little_and_is_counted(desk):
    """A provider whose machines disagree does not change budgets with every answer."""
    rnd = random.Random(4)
    for second in range(3000):
        desk.hears(told(rnd.choice([10_000, 5000, 7000])), 1000 + second / 10)

    assert desk.counted.count("flapping") > 500
    raises_s = [
        now_s
        for now_s, change in desk.changes
        if change.before is not None and change.before.scale.rate < change.after.scale.rate
    ]
    assert min(after - before for before, after in pairwise(raises_s)) >= STEADY_S
    assert len(desk.changes) < 100


def test_raised_limit_raises_no_level(desk):
    """What had been used is missing still: it flows in at the new rate."""
    desk.hears(told(10_000, 3000), 1000)
    for now_s in (1020, 1021, 1022):
        desk.hears(told(20_000, 19_000), now_s)

    assert desk.limit() == (20_000, MINUTE_S)
    assert desk.level() < 4000


@pytest.mark.parametrize(("level", "left"), [(7000, 6000), (4000, 4000)])
def test_lowered_limit_lowers_the_level_to_itself_at_most(desk, level, left):
    """What remains tells what was used; it does not count twice."""
    desk.hears(told(10_000, level), 1000)
    for now_s in (1000.1, 1000.2, 1000.3):
        desk.hears(told(6000, 5900), now_s)

    assert desk.limit() == (6000, MINUTE_S)
    assert desk.level() == pytest.approx(left, abs=300)


def test_debt_beyond_the_floor_of_a_lowered_limit_is_forgiven(desk):
    """A limit that all but vanishes is learned, however deep in debt the bucket was."""
    desk.hears(told(1_000_000, 10), 1000)
    call = desk.house.limiter.reserve(ALICE, MODEL, 0, 1)
    desk.house.backend.settle(call.handle, (5_000_000,))
    for now_s in (1020, 1021, 1022):
        desk.hears(told(60, 30), now_s)

    assert desk.limit() == (60, MINUTE_S)
    assert -600 <= desk.level() <= -590


@pytest.mark.parametrize(
    ("what", "counted"),
    [
        (Reading(10_000, 10_000, b"0s", 10_000), "unclear"),
        (Reading(10_000, 9000, b"", 9000), "unclear"),
        (Reading(10_000, 9000, b"52s", 9000), "unclear"),
        (Reading(MAX_CAPACITY + 1, MAX_CAPACITY // 2, b"30s", 1), "unusable"),
    ],
)
def test_what_cannot_be_used_is_counted_and_changes_nothing(desk, what, counted):
    """No window, or more than can be counted."""
    assert desk.hears(what) is None
    assert desk.counted == [counted]


def test_what_tells_no_window_of_a_known_limit_is_nothing_new(desk):
    """A full bucket tells no window, and need not."""
    desk.hears(told(10_000))
    desk.hears(Reading(10_000, 10_000, b"0s", 10_000))

    assert desk.counted == ["learned"]


def test_models_and_meters_are_learned_apart(desk):
    """Each has a budget of its own."""
    desk.hears(told(10_000))
    desk.hears(told(500), meter=Meter.REQUESTS)
    desk.hears(told(77), model="other")

    assert desk.limit() == (10_000, MINUTE_S)
    assert desk.limit(meter=Meter.REQUESTS) == (500, MINUTE_S)
    assert desk.limit(model="other") == (77, MINUTE_S)


def test_only_so_many_limits_are_learned(desk):
    """Models that callers make up do not fill the table; that there is no room is counted."""
    desk.house = House(buckets=64)
    budgets = [learned(100, model=f"m{number}") for number in range(MAX_LEARNED)]
    full = Learned(Full(budgets), desk.house.budgets, desk.counted.append)

    assert full.hear(MODEL, Meter.TOKENS, told(10_000), 1000) is None
    assert desk.counted == ["full"]
    assert full.hear("m7", Meter.TOKENS, told(100), 1000) is None
    assert len(list(full.read([AdminLimit(f"a{n}", "tokens", 5, MINUTE_S) for n in range(3000)]))) == MAX_LEARNED


class Full:
    """A backend with so many budgets."""

    def __init__(self, budgets):
        self._budgets = budgets

    def on(self, _scope):
        return self._budgets


def test_budget_that_is_being_set_is_not_set_again(desk):
    """Answers that come before it is there are not believed too."""
    assert desk.learned.hear(MODEL, Meter.TOKENS, told(10_000), 1000) is not None
    assert desk.learned.hear(MODEL, Meter.TOKENS, told(10_000), 1000.5) is None
    assert desk.learned.hear(MODEL, Meter.TOKENS, told(10_000), 1001.5) is not None


def test_heard_last_is_believed_when_somebody_asks(desk):
    """A sync does not wait for three answers."""
    desk.hears(told(10_000), 1000)
    desk.hears(told(5000), 1001)

    (change,) = desk.learned.heard()
    assert (change.before, change.after) == (learned(10_000), learned(5000))
    desk.learned.apply(change)
    assert desk.limit() == (5000, MINUTE_S)
    assert list(desk.learned.heard()) == []


def test_heard_before_another_process_changed_the_budget_is_no_news(desk):
    """Who has seen no call since then has nothing newer to tell when somebody asks."""
    other = Desk(desk.house)
    desk.hears(told(5000), 1000)
    for now_s in (1020, 1021, 1022):
        other.hears(told(10_000), now_s)

    assert desk.limit() == (10_000, MINUTE_S)
    assert list(desk.learned.heard()) == []
    desk.hears(told(5000), 1023)
    assert [change.after for change in desk.learned.heard()] == [learned(5000)]


def test_probe_is_believed_at_once(desk):
    """Whoever asks for one gets what it tells, a day too; of a full bucket nothing."""
    (change,) = desk.learned.probed(MODEL, Meter.REQUESTS, told(10_000, 9999, DAY_S))

    assert window_of(change.after) == DAY_S
    assert change.level == 9999
    assert list(desk.learned.probed(MODEL, Meter.TOKENS, Reading(10_000, 10_000, b"0s", 10_000))) == []


# --- of the admin API ---------------------------------------------------------------------------------------


def test_admin_limits_stand_beside_those_of_headers(desk):
    """Each source has a budget of its own, and the tighter one binds."""
    desk.hears(told(10_000, 9999))
    desk.reads(
        AdminLimit(MODEL, "tokens", 4000, MINUTE_S),
        AdminLimit(MODEL, "requests", 60, MINUTE_S),
        AdminLimit(MODEL, "requests", 900, DAY_S),
    )

    assert desk.limit(Source.ADMIN) == (4000, MINUTE_S)
    assert desk.limit(Source.ADMIN, Meter.REQUESTS) == (60, MINUTE_S)
    assert desk.limit(Source.ADMIN_DAILY, Meter.REQUESTS) == (900, DAY_S)
    refused = (
        desk.house.limiter.reserve(ALICE, MODEL, 10, 3000),
        desk.house.limiter.reserve(ALICE, MODEL, 10, 3000),
    )
    assert refused[1].binding.source is Source.ADMIN


def test_admin_limit_that_vanishes_is_removed(desk):
    """What the admin API tells no more is gone; what headers told, and what was set by hand, is not."""
    desk.house.set("global", grant(5000), model=MODEL)
    desk.hears(told(10_000))
    desk.reads(AdminLimit(MODEL, "tokens", 4000, MINUTE_S), AdminLimit("old", "tokens", 7, MINUTE_S))
    (change,) = desk.reads(AdminLimit(MODEL, "tokens", 4000, MINUTE_S))

    assert (change.name.model, change.after) == ("old", None)
    assert desk.limit(Source.ADMIN, model="old") is None
    assert desk.limit(Source.ADMIN) == (4000, MINUTE_S)
    assert desk.limit() == (10_000, MINUTE_S)
    assert desk.house.budgets.get(named("global", model=MODEL)).budget.scale == grant(5000)


def test_reading_the_same_again_changes_nothing(desk):
    """Budgets are rewritten only where something changed."""
    limits = [AdminLimit(MODEL, "tokens", 4000, MINUTE_S), AdminLimit(MODEL, "tokens", 4000, MINUTE_S)]
    assert len(desk.reads(*limits)) == 1

    assert desk.reads(*limits) == []


@pytest.mark.parametrize("limits", [(100, 5000), (5000, 100), (100, MAX_CAPACITY + 1)])
def test_least_counts_of_a_model_that_is_listed_twice(desk, limits):
    """In whatever order, on one page or on two."""
    desk.reads(*(AdminLimit(MODEL, "tokens", limit, MINUTE_S) for limit in limits))

    assert desk.limit(Source.ADMIN) == (100, MINUTE_S)


def test_limit_that_cannot_be_counted_is_none(desk):
    """Some accounts have 10^13 tokens per minute, to say that there is no limit."""
    assert desk.reads(AdminLimit(MODEL, "tokens", MAX_CAPACITY + 1, MINUTE_S)) == []


@pytest.mark.parametrize("model", ["", " m", "m\n", "m\x1fn", "x" * 257, "\ud800"])
def test_model_that_is_no_name_is_an_error(desk, model):
    """A model's name becomes part of a key: what cannot be one changes nothing at all."""
    with pytest.raises(InvalidValue):
        desk.reads(AdminLimit("fine", "tokens", 5, MINUTE_S), AdminLimit(model, "tokens", 5, MINUTE_S))

    assert desk.learned.current() == {}


def test_removing_what_is_gone_is_no_error(desk):
    """Somebody else may have removed it."""
    desk.learned.apply(Change(learned(5).name, learned(5), None))

    with pytest.raises(BudgetNotFound):
        desk.house.budgets.get(learned(5).name)


def test_budgets_set_by_hand_are_never_overwritten(desk):
    """Both bind: a learned limit has a name of its own."""
    desk.house.set("global", grant(123), model=MODEL)
    desk.hears(told(10_000))
    desk.reads(AdminLimit(MODEL, "tokens", 4000, MINUTE_S))

    assert desk.house.budgets.get(named("global", model=MODEL)).budget.scale == grant(123)
    assert [budget.scale.capacity for budget in desk.house.plans.resolve(ALICE, MODEL).budgets] == [
        123,
        4000,
        10_000,
    ]


def test_all_that_was_learned_is_told_of(desk):
    """With its level, in the order of keys; what was set by hand is not among it."""
    desk.house.set("global", grant(123))
    for number in range(40):
        desk.hears(told(10_000 + number), model=f"m{number:02}")

    states = desk.learned.states()
    assert [state.budget.name.model for state in states] == [f"m{number:02}" for number in range(40)]
    assert all(0 < state.level <= state.budget.scale.capacity for state in states)


def test_change_is_told_in_words():
    """Whoever reads the log learns what it was and what it is."""
    name = BucketName(EVERYBODY, Meter.REQUESTS, "m", Source.ADMIN)
    few, many = (learned(limit, meter=Meter.REQUESTS, source=Source.ADMIN, model="m") for limit in (30, 600))
    daily = learned(10_000, meter=Meter.REQUESTS, window_s=DAY_S, model="m")

    assert [str(Change(name, *change)) for change in ((None, few), (few, many), (many, None), (None, daily))] == [
        "requests of m is 30 per minute (admin)",
        "requests of m is 600 per minute (admin); it was 30 per minute",
        "requests of m is none (admin); it was 600 per minute",
        "requests of m is 10000 per day (admin)",
    ]


def test_amounts_per_minute():
    """A limit of a day is so much per minute, too."""
    assert per_minute(learned(60_000)) == 60_000
    assert per_minute(learned(14_400, window_s=DAY_S)) == pytest.approx(10)


# --- names --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        BucketName(Scope("user", "alice")),
        BucketName(Scope("global", "*"), Meter.REQUESTS),
        BucketName(Scope("global", "*"), Meter.REQUESTS, MODEL),
        *(BucketName(Scope("global", "*"), Meter.TOKENS, MODEL, source) for source in Source),
        BucketName(Scope("global", "*"), Meter.TOKENS, None, Source.ADMIN),
        gate_of(MODEL),
    ],
)
def test_name_is_read_back_from_its_key(name):
    """With a source and without one."""
    assert BucketName.from_key(name.key) == name


def test_names_of_sources_are_apart():
    """Budgets of different sources, and those set by hand, never share a bucket; old keys are as they were."""
    names = [BucketName(Scope("global", "*"), Meter.TOKENS, MODEL, source) for source in (None, *Source)]

    assert len({name.key for name in names}) == len(names)
    assert names[0].key == f"global\x1f*\x1ftokens\x1f{MODEL}".encode()


def test_learned_budgets_are_known_to_all_processes():
    """What one process learned binds in another at its next call, and is not learned again."""
    first = Desk()
    second = House(buckets=4096)
    second.backend = MemoryBackend(first.house.table)
    first.hears(told(10_000, 5000))
    other = Desk(first.house)

    assert other.hears(told(10_000, 9000)) is None
    assert [budget.name.source for budget in second.backend.budgets()] == [Source.HEADERS]
    assert other.level() == pytest.approx(5000, abs=200)


# --- of a head ----------------------------------------------------------------------------------------------


def test_head_tells_tokens_and_requests():
    """In this order; the window is that of the limit which is the tightest, whatever else remains."""
    head = Told(
        [
            (b"x-ratelimit-limit-requests", b"500"),
            (b"x-ratelimit-remaining-requests", b"499"),
            (b"x-ratelimit-reset-requests", b"120ms"),
            (b"x-ratelimit-limit-tokens", b"150000"),
            (b"x-ratelimit-remaining-tokens", b"20000"),
            (b"x-ratelimit-reset-tokens", b"52s"),
            (b"x-ratelimit-limit-project-tokens", b"60000"),
            (b"x-ratelimit-remaining-project-tokens", b"57000"),
            (b"x-ratelimit-reset-project-tokens", b"3s"),
        ]
    )
    (tokens, of_tokens), (requests, of_requests) = limits_of(head)

    assert (tokens, requests) == (Meter.TOKENS, Meter.REQUESTS)
    assert of_tokens == Reading(60_000, 57_000, b"3s", 20_000)
    assert of_requests == Reading(500, 499, b"120ms", 499)
    assert (of_tokens.window_s, of_requests.window_s) == (MINUTE_S, MINUTE_S)


def test_head_without_limits_tells_none():
    """Nothing is made up."""
    assert list(limits_of(Told([(b"content-type", b"text/plain")]))) == []


def test_learned_budget_holds_until_the_time_that_its_level_says():
    """A call that is more than remains waits for as long as the provider would make it wait."""
    house = House()
    house.backend.put(learned(60_000), 1000, NOW_US)
    refused = house.reserve(3000, prompt=10)

    assert refused.retry_after_us == 2 * S
    assert isinstance(refused.binding.name, BucketName)
    assert Budget(refused.binding.name, learned(60_000).scale) == learned(60_000)
