"""What the operator is told of the provider: that it wants to be paid, that others spend; and who asks it."""

import logging
import os

import pytest

from tests.house import House
from tokenguard._bucket import BucketTable
from tokenguard.backends import workers
from tokenguard.backends.memory import MemoryBackend
from tokenguard.backends.workers import join
from tokenguard.provider_limits.alarms import LINES, STALE_S, Alarms

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
