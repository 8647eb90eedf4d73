"""What the operator is told of the provider: that it wants to be paid, that others spend; and who asks it."""

import logging
import os
import random

import pytest

from tests.house import ALICE, MODEL, NOW_US, House
from tests.mirror import Mirror, learned
from tokenguard._bucket import BucketTable
from tokenguard.backends import workers
from tokenguard.backends.memory import MemoryBackend
from tokenguard.backends.workers import counted, join
from tokenguard.headroom import Headroom
from tokenguard.metrics import Metrics
from tokenguard.model import Meter
from tokenguard.provider_limits.alarms import LINES, OTHERS, STALE_S, Alarms, Others

NOW_S = 1_790_000_000
NOBODY = 2**22 - 1
"""A process that is not there."""


@pytest.fixture
def table():
    return BucketTable(16)


def in_row_of(table, pid, began=1):
    """Count in the first row, which is another process's."""
    table.hold_row(0, pid, began, workers.STATES)


def a_living_process():
    """Return a process beside this one, and when it began."""
    return os.getppid(), workers._began(os.getppid())


# --- it wants to be paid ------------------------------------------------------------------------------------


def test_alarm_stands_until_a_call_is_answered(table, caplog):
    """One line when it begins, one when it ends; and both are told of by every process of the node."""
    join(table)
    mine, others = Alarms(table), Alarms(table)

    mine.sound("insufficient_quota", NOW_S)
    mine.sound("insufficient_quota", NOW_S + 5)
    assert mine.standing(NOW_S + 5) == others.standing(NOW_S + 5) == ["insufficient_quota"]
    assert (mine.raised, others.raised) == (True, True)

    others.clear(NOW_S + 6)
    mine.clear(NOW_S + 7)
    assert mine.standing(NOW_S + 8) == others.standing(NOW_S + 8) == []
    assert [record.levelno for record in caplog.records] == [logging.ERROR, logging.WARNING]


def test_alarm_ends_by_itself(table, caplog):
    """Five minutes after the provider said so last, nobody knows whether it still holds; the log has a line."""
    join(table)
    alarms = Alarms(table)
    alarms.sound("insufficient_quota", NOW_S)
    alarms.sound("insufficient_quota", NOW_S + 100)
    caplog.clear()

    alarms.look(NOW_S + 100 + STALE_S - 1)
    assert alarms.standing(NOW_S + 100 + STALE_S - 1) == ["insufficient_quota"]
    assert caplog.messages == []
    for more in (0, 1, 100):
        alarms.look(NOW_S + 100 + STALE_S + more)
    assert alarms.standing(NOW_S + 100 + STALE_S) == []
    assert caplog.messages == ["the provider has not refused calls for want of money for 300 s"]


def test_alarm_that_another_process_ended_is_not_told_of_again(table, caplog):
    """One line is enough for a node."""
    join(table)
    mine, others = Alarms(table), Alarms(table)
    mine.sound("insufficient_quota", NOW_S)
    others.clear(NOW_S + 1)
    caplog.clear()
    mine.look(NOW_S + 10)
    mine.look(NOW_S + STALE_S + 10)

    assert caplog.messages == []


def test_log_is_not_flooded_where_some_calls_are_refused_and_others_are_not(table, caplog):
    """Three lines of each kind a minute; the last one tells how things are."""
    join(table)
    alarms = Alarms(table)
    for tenth in range(1200):
        alarms.sound("insufficient_quota", NOW_S + tenth / 10)
        alarms.clear(NOW_S + tenth / 10 + 0.05)
    assert [record.levelno for record in caplog.records] == 2 * LINES * [logging.ERROR, logging.WARNING]

    alarms.sound("insufficient_quota", NOW_S + 119.99)
    for second in (130, 160, 190):
        alarms.look(NOW_S + second)
    assert [record.levelno for record in caplog.records[4 * LINES :]] == [logging.ERROR]


def test_clock_that_is_set_back_ends_an_alarm(table, caplog):
    """When the provider said so is not known then; if it still does, it says so again."""
    join(table)
    alarms = Alarms(table)
    alarms.sound("insufficient_quota", NOW_S + 3600)
    alarms.clear(NOW_S + 3601)
    alarms.sound("insufficient_quota", NOW_S + 3602)
    assert alarms.standing(NOW_S) == []

    alarms.sound("insufficient_quota", NOW_S + 1)
    assert alarms.standing(NOW_S + 1) == ["insufficient_quota"]
    alarms.clear(NOW_S + 2)
    assert alarms.standing(NOW_S + 2) == []


def test_several_codes_stand_beside_each_other(table, caplog):
    """Each is told of, in order, and an answered call ends all; what is no known code counts as the first."""
    join(table)
    alarms = Alarms(table)
    for code in ("project_spend_limit_exceeded", "what else", "credit_balance_exhausted"):
        alarms.sound(code, NOW_S)

    assert alarms.standing(NOW_S) == [
        "credit_balance_exhausted",
        "insufficient_quota",
        "project_spend_limit_exceeded",
    ]
    assert [message.count("_") for message in caplog.messages] == [3, 4, 6]
    alarms.clear(NOW_S + 1)
    assert alarms.standing(NOW_S + 1) == []


def test_alarm_outlives_the_process_that_was_told(table):
    """A worker that dies has not paid: the alarm stands until another's call is answered."""
    in_row_of(table, NOBODY)
    Alarms(table).sound("insufficient_quota", NOW_S)
    table.hold_row(1, *a_living_process())
    alarms = Alarms(table)

    assert alarms.standing(NOW_S) == ["insufficient_quota"]
    alarms.clear(NOW_S + 1)
    assert alarms.standing(NOW_S + 1) == []


def test_alarm_of_another_process_stands(table):
    """A worker tells of what another one was told."""
    in_row_of(table, *a_living_process())
    Alarms(table).sound("insufficient_quota", NOW_S)
    join(table)

    assert Alarms(table).standing(NOW_S) == ["insufficient_quota"]


def test_alarm_in_a_row_that_was_somebody_elses_ends_too(table):
    """A process that takes the row of one that died with an alarm does not add its own time to that one's."""
    in_row_of(table, NOBODY)
    Alarms(table).sound("insufficient_quota", NOW_S)
    join(table)
    alarms = Alarms(table)
    alarms.sound("insufficient_quota", NOW_S + 1000)

    assert alarms.standing(NOW_S + 1000) == ["insufficient_quota"]
    assert alarms.standing(NOW_S + 1000 + STALE_S) == []
    alarms.clear(NOW_S + 1001)
    assert alarms.standing(NOW_S + 1001) == []


# --- somebody else spends -----------------------------------------------------------------------------------


class Watched:
    """The provider's limit of a model, of which others spend as a test says.

    Args:
        limit: Of a minute, unless ``of`` says otherwise.
    """

    def __init__(self, limit=100_000, model="m", **of):
        self.budget = learned(limit, model=model, **of)
        self.room = Headroom()
        self.room.hold(limit, 0)
        self.above = 0

    def spend(self, amount):
        """Have a call's answer tell that others have spent some more."""
        self.above -= amount
        level = self.budget.scale.capacity // 2
        self.room.told(level + self.above - self.room.moved, self.room.charge(level, 1))


def looks(others, *watched, processes=1, now_s):
    """Return what is told of all meters."""
    told = others.look([(one.budget, one.room) for one in watched], processes, now_s)
    return {model: rate for rates in told.values() for model, rate in rates.items()}


def spends(others, watched, seconds, per_s, *, start_s=0, processes=1):
    """Have others spend ten times a second, with a look every ten seconds; return the last that is told."""
    for step in range(1, seconds * 10 + 1):
        watched.spend(per_s // 10)
        if step % 100 == 0:
            told = looks(others, watched, processes=processes, now_s=start_s + step / 10)
    return told


def test_others_are_told_of_once_they_have_spent_for_long(table, caplog):
    """A notable amount, for some time, with its rate; in one line, and until it is long past."""
    others, watched = Others(table), Watched()
    assert looks(others, watched, now_s=0) == {}
    watched.spend(0)
    assert spends(others, watched, 30, 500) == {}
    assert caplog.records == []

    assert spends(others, watched, 270, 500, start_s=30)["m"] == pytest.approx(30_000, rel=0.05)
    (line,) = caplog.messages
    assert line.startswith("somebody else uses the provider's key: of m about 29")
    assert "tokens per minute" in line
    assert looks(others, watched, now_s=900) == {}


def test_requests_of_others_are_told_of_too(table, caplog):
    """Of a limit on requests, even one for a day, of which a few a minute are much."""
    others = Others(table)
    minutes = Watched(600, meter=Meter.REQUESTS)
    days = Watched(10_000, "mini", meter=Meter.REQUESTS, window_s=86_400)
    for step in range(200):
        minutes.spend(20)
        days.spend(1 if step % 2 else 0)
        told = looks(others, minutes, days, now_s=10 * step)

    assert told == {"m": pytest.approx(120, rel=0.1), "mini": pytest.approx(3, abs=1)}
    assert all("requests per minute" in line for line in caplog.messages)


def test_little_is_not_worth_telling(table):
    """Less than a tenth of the limit, or than a thousand tokens per minute, is none."""
    others = Others(table)

    assert spends(others, Watched(), 300, 80) == {}
    assert spends(others, Watched(1000, "small"), 300, 10) == {}


def test_what_is_given_back_was_nobody_elses(table):
    """Where more remains again, nobody else has spent: calls overtook each other."""
    others, watched, rnd = Others(table), Watched(), random.Random(7)
    for step in range(300):
        watched.spend(rnd.randrange(-1000, 1000))
        assert looks(others, watched, now_s=step) == {}


def test_limit_that_is_changed_is_spent_by_nobody(table):
    """Where the provider grants less from now on, less remains, and nobody took it."""
    others, watched = Others(table), Watched()
    watched.spend(0)
    looks(others, watched, now_s=0)
    watched.room.hold(50_000, 0)
    watched.spend(40_000)

    assert [looks(others, watched, now_s=10 * step) for step in range(20)] == [{}] * 20


def test_limit_that_is_followed_no_more_is_forgotten(table):
    """A budget that was removed has nobody who spends of it."""
    others, watched = Others(table), Watched()
    watched.spend(0)
    spends(others, watched, 100, 500)

    assert looks(others, now_s=101) == {}
    assert looks(others, watched, now_s=102) == {}


def test_what_others_spend_is_shown_of_all_processes(table):
    """The node's metric adds up what its processes saw, and forgets one that is no more."""
    metrics = Metrics(MemoryBackend(table))
    in_row_of(table, *a_living_process())
    spends(Others(table), Watched(), 100, 500, processes=2)
    join(table)
    spends(Others(table), Watched(), 100, 500, processes=2)
    name = OTHERS[Meter.TOKENS]
    shown = counted(table)[name]
    assert shown > 30_000
    assert f"{name.decode()} {float(shown)}" in metrics.exposition(None)[1].decode()

    in_row_of(table, NOBODY)
    assert counted(table)[name] == pytest.approx(shown / 2, abs=1)


def test_processes_that_share_the_calls_tell_all_that_others_spend(table):
    """A quarter is what each sees: it tells the whole, and the metric adds up."""
    four = [Others(table) for _ in range(4)]
    for others in four:
        told = spends(others, Watched(), 300, 200, processes=4)
        assert told["m"] == pytest.approx(4 * 12_000, rel=0.05)

    assert counted(table)[OTHERS[Meter.TOKENS]] == pytest.approx(4 * 12_000, rel=0.05)


@pytest.mark.parametrize("counting", ["openai", "azure", "usage"])
@pytest.mark.parametrize("load", [0.3, 0.7, 3.0])
@pytest.mark.parametrize(("burst", "long"), [(1, 0.2), (20, 0.0)])
def test_nobody_is_accused_while_nobody_else_spends(counting, load, burst, long):
    """Calls in any order and crowd, of any length, whose estimates are too low at times, are nobody else's."""
    mirror = Mirror(3, counting, load=load, long=long, estimates=(0.7, 1.2), burst=burst)

    assert not any(told_of(mirror))


@pytest.mark.parametrize("counting", ["openai", "azure"])
@pytest.mark.parametrize("load", [0.3, 3.0])
def test_nobody_is_accused_where_the_provider_counts_in_windows(counting, load):
    """What fills all the time here, and there at the end of a minute, are not the same: nothing is told."""
    assert not any(told_of(Mirror(3, counting, load=load, windows=True)))


@pytest.mark.parametrize("processes", [1, 4])
@pytest.mark.parametrize("load", [0.3, 0.9, 3.0])
def test_nobody_is_accused_of_requests_while_nobody_else_calls(processes, load):
    """A request is one, whoever counts it."""
    mirror = Mirror(3, "azure", limit=600, load=load, processes=processes, burst=5, meter=Meter.REQUESTS)

    assert not any(told_of(mirror))


@pytest.mark.parametrize("counting", ["openai", "azure", "usage"])
def test_somebody_who_spends_much_is_found(counting):
    """Three fifths of the limit, beside as much of our own: what remains keeps falling. It is a lower bound."""
    told = told_of(Mirror(3, counting, load=0.6, others=0.6))

    assert 20_000 < max(told) < 80_000


@pytest.mark.parametrize("seed", range(3))
def test_somebody_is_found_in_what_the_provider_does_not_count(seed):
    """OpenAI counts far less than it may; once that has shown, three tenths of the limit do not hide in it."""
    told = told_of(Mirror(seed, "openai", load=3.0, others=0.3, reordered=False))

    assert 20_000 < max(told) < 36_000


@pytest.mark.parametrize("counting", ["azure", "usage"])
@pytest.mark.parametrize("seed", range(3))
def test_nobody_is_accused_of_what_the_provider_does_count(counting, seed):
    """Where it counts more than the least, or later, that is not believed to be all."""
    assert not any(told_of(Mirror(seed, counting, load=0.7, reordered=False)))


@pytest.mark.parametrize("processes", [1, 4])
def test_requests_of_somebody_else_are_counted_well(processes):
    """360 a minute, beside 420 of our own, of 600."""
    told = told_of(Mirror(3, "azure", limit=600, load=0.7, others=0.6, processes=processes, meter=Meter.REQUESTS))

    assert sum(told[-10:]) / 10 == pytest.approx(360, rel=0.15)


def told_of(mirror):
    """Run a simulation; return what all processes together told of others, every ten seconds."""
    others = [Others(BucketTable(64)) for _ in mirror.nodes]
    told = []

    def looks(mirror, now_us):
        if now_us < NOW_US + len(told) * 10_000_000:
            return
        told.append(0)
        for one, node in zip(others, mirror.nodes, strict=True):
            plan = node.plan(ALICE, MODEL)
            room = plan.tokens_room or plan.requests_room
            found = one.look([(mirror.budget, room)], mirror.processes, now_us / 1e6)
            told[-1] += sum(sum(rates.values()) for rates in found.values()) / mirror.processes

    mirror.run(240, looks)
    return told


# --- whose turn it is ---------------------------------------------------------------------------------------


def test_one_of_many_may(table):
    """Of all who share the table one may, and again only once the time is over."""
    join(table)
    first, second = MemoryBackend(table), MemoryBackend(table)

    assert [backend.claim("it", 10, NOW_S + 0.5) for backend in (first, second, first)] == [True, False, False]
    assert not second.claim("it", 10, NOW_S + 9)
    assert second.claim("it", 10, NOW_S + 11)
    assert not first.claim("it", 10, NOW_S + 11)


def test_turn_outlasts_no_clock_that_is_set_back(table):
    """What was claimed in the future keeps nobody waiting until then."""
    join(table)
    backend = MemoryBackend(table)
    assert backend.claim("it", 10, NOW_S + 86_400)

    assert backend.claim("it", 10, NOW_S)
    assert not backend.claim("it", 10, NOW_S + 5)


def test_turns_of_different_things_are_apart(table):
    """What is claimed is claimed for itself."""
    backend = MemoryBackend(table)

    assert backend.claim("this", 10, NOW_S)
    assert backend.claim("that", 10, NOW_S)


def test_turn_of_a_process_that_is_no_more_is_over_in_time(table):
    """Whoever takes the row of a process that had claimed something claims it for no longer than it says."""
    in_row_of(table, NOBODY)
    assert MemoryBackend(table).claim("it", 10, NOW_S)
    join(table)
    backend = MemoryBackend(table)

    assert not backend.claim("it", 10, NOW_S + 5)
    assert backend.claim("it", 10, NOW_S + 20)
    assert backend.claim("it", 10, NOW_S + 40)


def test_turn_is_had_by_who_never_joined():
    """A table of one process needs no row."""
    backend = House().backend

    assert [backend.claim("it", 10, NOW_S + at) for at in (0, 5, 15, 30)] == [True, False, True, True]
