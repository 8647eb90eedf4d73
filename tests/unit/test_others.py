"""The operator is told that somebody else uses the provider's key, and of nobody who does not."""

import os
import random
from tempfile import TemporaryFile

import pytest

from tests.crew import Worker
from tests.house import ALICE, MODEL, NOW_US
from tests.mirror import Mirror
from tests.watched import Watched, looks, spends, spends_of
from tokenguard._bucket import BucketTable, region_bytes
from tokenguard.backends import workers
from tokenguard.backends.memory import MemoryBackend
from tokenguard.backends.workers import counted
from tokenguard.metrics import Metrics
from tokenguard.model import Meter
from tokenguard.provider_limits.others import MAX_LIMITS, OTHERS, Others

NOBODY = 2**22 - 1
"""A process that is not there."""


@pytest.fixture
def others():
    return Others(MemoryBackend(BucketTable(16)))


def sharing(processes):
    """Return backends of several processes that share a table, each with a row of its own."""
    with TemporaryFile() as file:
        file.truncate(region_bytes(64))
        seen = [BucketTable(64, fd=file.fileno()) for _ in range(processes)]
    for row, table in enumerate(seen):
        table.hold_row(row, os.getpid(), workers._began(os.getpid()), (*workers.STATES, *workers.ALIKE))
    return [MemoryBackend(table) for table in seen]


def test_others_are_told_of_once_they_have_spent_for_long(others, caplog):
    """A notable amount, for some time, with its rate; in one line, and until it is long past."""
    watched = Watched()
    assert looks(others, watched, now_s=0) == {}
    watched.spend(0)
    assert spends(others, watched, 30, 500) == {}
    assert caplog.records == []

    assert spends(others, watched, 270, 500, start_s=30)["m"] == pytest.approx(30_000, rel=0.05)
    (line,) = caplog.messages
    assert line.startswith("somebody else uses the provider's key: of m about 30000")
    assert "tokens per minute" in line
    assert looks(others, watched, now_s=900) == {}


def test_requests_of_others_are_told_of_too(others, caplog):
    """Of a limit on requests, even one for a day, of which a few a minute are much."""
    minutes = Watched(600, meter=Meter.REQUESTS)
    days = Watched(10_000, "mini", meter=Meter.REQUESTS, window_s=86_400)
    for step in range(200):
        minutes.spend(20)
        days.spend(1 if step % 2 else 0)
        told = looks(others, minutes, days, now_s=10 * step)

    assert told == {"m": pytest.approx(120, rel=0.1), "mini": pytest.approx(3, abs=1)}
    assert all("requests per minute" in line for line in caplog.messages)


def test_little_is_not_worth_telling(others):
    """Less than a tenth of the limit, or than a thousand tokens per minute, is none."""
    assert spends(others, Watched(), 300, 80) == {}
    assert spends(others, Watched(1000, "small"), 300, 10) == {}


def test_process_with_few_calls_tells_no_more_than_others_spend(others):
    """What an answer tells after minutes was spent in all of them, and not just now."""
    watched, told = Watched(), []
    watched.spend(0)
    for step in range(300):
        if step % 30 == 29:
            watched.spend(150_000)
        told.append(looks(others, watched, now_s=10 * step).get("m", 0))

    assert 0 < max(told) < 30_000


def test_what_is_given_back_was_nobody_elses(others):
    """Where more remains again, nobody else has spent: calls overtook each other."""
    watched, rnd = Watched(), random.Random(7)
    for step in range(300):
        watched.spend(rnd.randrange(-1000, 1000))
        assert looks(others, watched, now_s=step) == {}


def test_limit_that_is_changed_is_spent_by_nobody(others):
    """Where the provider grants less from now on, less remains, and nobody took it."""
    watched = Watched()
    watched.spend(0)
    looks(others, watched, now_s=0)
    watched.room.hold(50_000, 0)
    watched.spend(40_000)

    assert [looks(others, watched, now_s=10 * step) for step in range(20)] == [{}] * 20


def test_limit_that_is_followed_no_more_is_forgotten(others):
    """A budget that was removed has nobody who spends of it."""
    watched = Watched()
    watched.spend(0)
    spends(others, watched, 100, 500)

    assert looks(others, now_s=101) == {}
    assert looks(others, watched, now_s=102) == {}


def test_all_processes_tell_of_others_and_one_logs_it(caplog):
    """A node says it once; if who said so ends, another one does the next time."""
    backends = sharing(3)
    crew = [(Others(one), Watched(), 500) for one in backends]

    assert spends_of(crew, 300) == [{"m": pytest.approx(30_000, rel=0.05)}] * 3
    assert len(caplog.messages) == 1
    assert spends_of([(others, watched, 0) for others, watched, _ in crew], 600, 300) == [{}] * 3
    assert spends_of(crew[:2], 300, 900) == [{"m": pytest.approx(30_000, rel=0.05)}] * 2
    assert len(caplog.messages) == 2

    for backend in backends[:2]:
        backend.table.hold_row(backend.table.held_row, NOBODY, 1)
    spends_of(crew[2:], 300, 900)
    assert len(caplog.messages) == 3


def test_one_of_two_processes_that_find_others_at_once_logs_it():
    """Each says that it tells, and looks whether another one does, before that one looks."""
    table, name = BucketTable(16), Watched().budget.name
    steps = table.shared(b"in step.")

    def find():
        workers.join(table)
        others, logged = Others(MemoryBackend(table)), []
        for step in range(400):
            steps.add(0, 1)
            while steps.get(0) < 2 * (step + 1):
                pass
            logged.append(others._say(name, 1 - step % 2))
        return logged[::2]

    with Worker(find) as one, Worker(find) as other:
        one.go()
        other.go()
        logged = [a + b for a, b in zip(one.answer(), other.answer(), strict=True)]

    assert logged == [1] * 200


def test_process_without_calls_tells_what_the_others_do():
    """Whichever worker answers, a node says the same, as long as whoever found it lives."""
    backends = sharing(2)
    crew = [(Others(backends[0]), Watched(), 500)]
    idle, names = Others(backends[1]), [crew[0][1].budget.name]
    spends_of(crew, 300)
    looks(idle, now_s=300)

    told = crew[0][0].told(names)
    assert told == idle.told(names) == {Meter.TOKENS: {"m": pytest.approx(30_000, rel=0.05)}, Meter.REQUESTS: {}}
    assert idle.told([]) == {Meter.TOKENS: {}, Meter.REQUESTS: {}}
    backends[0].table.hold_row(0, NOBODY, 1)
    assert idle.told(names) == {Meter.TOKENS: {}, Meter.REQUESTS: {}}


def test_process_that_follows_a_limit_no_more_tells_nobody_of_others(caplog):
    """Whoever does tells the log, when it begins anew."""
    crew = [(Others(one), Watched(), 500) for one in sharing(2)]
    spends_of(crew[:1], 300)
    looks(crew[0][0], now_s=301)
    spends_of(crew[1:], 300)

    assert len(caplog.messages) == 2


def test_limits_are_told_of_however_many_they_are(caplog):
    """Beyond some, each process of the node logs it."""
    crew = [Others(one) for one in sharing(2)]
    limits = [[Watched(model=f"m{number}") for number in range(MAX_LIMITS + 3)] for _ in crew]
    for step in range(100):
        for others, watched in zip(crew, limits, strict=True):
            for one in watched:
                one.spend(5_000)
            told = looks(others, *watched, now_s=10 * step)

    assert told == {f"m{number}": pytest.approx(30_000, rel=0.05) for number in range(MAX_LIMITS + 3)}
    assert len(caplog.messages) == MAX_LIMITS + 2 * 3


def test_what_others_spend_is_shown_as_long_as_a_process_tells_it():
    """The node's metric has what all of its processes say, or those who know of it."""
    backends = sharing(2)
    table = backends[1].table
    metrics = Metrics(backends[1])
    spends_of([(Others(backends[0]), Watched(), 500), (Others(backends[1]), Watched(), 0)], 150)
    name = OTHERS[Meter.TOKENS]
    shown = counted(table)[name]
    assert shown == pytest.approx(30_000, rel=0.05)
    assert f"{name.decode()} {float(shown)}" in metrics.exposition(None)[1].decode()

    backends[0].table.hold_row(0, NOBODY, 1)
    assert counted(table)[name] == 0


@pytest.mark.parametrize("counting", ["openai", "azure", "usage"])
@pytest.mark.parametrize("load", [0.3, 0.7, 3.0])
@pytest.mark.parametrize(("burst", "long"), [(1, 0.2), (20, 0.0)])
@pytest.mark.parametrize("processes", [1, 4])
def test_nobody_is_accused_while_nobody_else_spends(counting, load, burst, long, processes):
    """Calls in any order and crowd, of any length, whose estimates are too low at times, are nobody else's."""
    crowd = {"load": load, "burst": burst, "long": long, "processes": processes}
    mirror = Mirror(3, counting, estimates=(0.7, 1.2), **crowd)

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
@pytest.mark.parametrize("processes", [1, 4])
def test_somebody_who_spends_much_is_found(counting, processes):
    """Three fifths of the limit, beside as much of our own: what remains keeps falling. It is a lower bound."""
    told = told_of(Mirror(3, counting, load=0.6, others=0.6, processes=processes))

    assert 20_000 < max(told) < 80_000


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("processes", [1, 4])
def test_somebody_is_found_in_what_the_provider_does_not_count(seed, processes):
    """OpenAI counts far less than it may; once that has shown, three tenths of the limit do not hide in it."""
    told = told_of(Mirror(seed, "openai", load=3.0, others=0.3, reordered=False, processes=processes))

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
    """Run a simulation; return what a process tells of others, every ten seconds."""
    others = [Others(one) for one in sharing(mirror.processes)]
    told = []

    def looks(mirror, now_us):
        if now_us < NOW_US + len(told) * 10_000_000:
            return
        for one, node in zip(others, mirror.nodes, strict=True):
            plan = node.plan(ALICE, MODEL)
            room = plan.tokens_room or plan.requests_room
            found = one.look([(mirror.budget, room)], now_us / 1e6)
        told.append(sum(sum(rates.values()) for rates in found.values()))

    mirror.run(240, looks)
    return told
