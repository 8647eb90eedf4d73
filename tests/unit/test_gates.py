"""Gates: calls of a model are held back for as long as its provider asks, then pass one by one."""

import heapq
from itertools import count

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.house import MODEL, NOW_US, House, S
from tests.strategies import properties
from tokenguard.errors import BackendDown
from tokenguard.headroom import Pace
from tokenguard.limiter import Reservation
from tokenguard.model import Meter
from tokenguard.provider_limits.gates import FIRST_WAIT_S, GENTLE_S, LONGEST_WAIT_S, MAX_GATES, Gates, gate_of


class Clock:
    """A clock that is set by hand, and what is to be done when it comes to its time."""

    def __init__(self):
        self.us = 0
        self._due = []
        self._numbers = count()

    @property
    def s(self):
        return self.us / S

    def now_us(self):
        return NOW_US + self.us

    def after(self, seconds, work):
        heapq.heappush(self._due, (self.us + round(seconds * S), next(self._numbers), work))

    def goes_to(self, seconds):
        """Go on, and do on the way what is due."""
        end = round(seconds * S)
        while self._due and self._due[0][0] <= end:
            self.us, _, work = heapq.heappop(self._due)
            work()
        self.us = end


class Process:
    """A process with gates of its own, on a house that it may share."""

    def __init__(self, house=None, clock=None, calls_per_s=0, budgets=None):
        self.house = house or House()
        self.clock = clock or Clock()
        self.pace = Pace()
        for number in range(calls_per_s * 4):
            self.pace.passed(MODEL, -4 + number / calls_per_s)
        budgets = budgets or self.house.budgets
        self.gates = Gates(budgets, self.pace, self.clock, lambda work: work(), lambda: 1, self.clock.now_us)

    def closes(self, wait_s, why="rate_limit_exceeded", model=MODEL):
        self.gates.close(model, wait_s, why, self.clock.s)

    def asks(self, model=MODEL):
        return self.house.reserve(1, model=model, now_us=self.clock.now_us())

    def passes(self, model=MODEL):
        return isinstance(self.asks(model), Reservation)

    def opens_s(self):
        """Return at which second the next call will pass."""
        if self.passes():
            return self.clock.s
        return self.clock.s + self.asks().retry_after_us / S

    @property
    def is_there(self):
        return any(budget.name == gate_of(MODEL) for budget in self.house.backend.budgets())


waits = st.integers(1, 60_000).map(lambda ms: ms / 1000)


@properties
@given(waits, st.integers(0, 500))
@example(2.015, 0)
def test_gate_is_closed_for_the_wait_to_the_millisecond(wait_s, calls_per_s):
    """One millisecond before nobody passes; at it, or within one more, one call does."""
    process = Process(calls_per_s=calls_per_s)
    process.closes(wait_s)
    assert not process.passes()

    process.clock.goes_to(wait_s - 0.001)
    assert not process.passes()
    process.clock.goes_to(wait_s if calls_per_s == 0 else wait_s + 0.001)
    assert process.passes()


@pytest.mark.parametrize(("calls_per_s", "passed"), [(0, 5), (10, 45), (100, 450)])
def test_no_herd_passes(calls_per_s, passed):
    """For five seconds calls pass at nine tenths of the pace of their answers, one a second at least."""
    process = Process(calls_per_s=calls_per_s)
    process.closes(2.0)
    counted = 0
    for ms in range(2000, 7000):
        process.clock.us = ms * 1000
        second = sum(process.passes() for _ in range(3))
        assert second <= 1
        counted += second

    assert counted == pytest.approx(passed, abs=1 + 0.05 * passed)


def test_burst_at_the_opening_is_one_call():
    """Of a crowd that waited for the gate one passes."""
    process = Process(calls_per_s=100)
    process.closes(2.0)
    process.clock.goes_to(2.0)

    assert sum(process.passes() for _ in range(1000)) == 1


def test_gate_holds_back_its_model_alone():
    """Another model's calls pass."""
    process = Process()
    process.closes(2.0)

    assert not process.passes()
    assert process.passes("another")


def test_many_refusals_close_it_once(caplog):
    """Calls that were under way are refused too, and ask for about the same wait: budgets change once."""
    process = Process()
    process.closes(2.0)
    epoch = process.house.backend.epoch
    for number in range(500):
        process.clock.us = number * 1000
        process.closes(2.0 - number / 1000)
        process.closes(None)

    assert process.house.backend.epoch == epoch
    assert len(caplog.records) == 1
    assert process.opens_s() == pytest.approx(2.0)


def test_longer_wait_extends_it():
    """Whoever is told a longer wait closes the gate for longer; a shorter one shortens nothing."""
    process = Process()
    process.closes(2.0)
    process.clock.goes_to(1.0)
    process.closes(30.0)
    process.closes(5.0)

    assert process.opens_s() == pytest.approx(31.0, abs=0.002)


def test_wait_that_is_not_told_doubles():
    """One second first, then twice as long each time, a minute at most."""
    process = Process()
    told = []
    for _ in range(9):
        process.closes(None)
        told.append(round(process.opens_s() - process.clock.s, 3))
        process.clock.goes_to(process.opens_s() + 0.5)

    assert told == [FIRST_WAIT_S * 2**times for times in range(6)] + [LONGEST_WAIT_S] * 3


def test_wait_begins_anew_once_calls_have_passed_for_long():
    """After a gate has opened for good, the next wait that is not told is short again."""
    process = Process()
    process.closes(None)
    process.clock.goes_to(2.0)
    process.closes(None)
    process.clock.goes_to(60.0)
    process.closes(None)

    assert process.opens_s() == pytest.approx(60.0 + FIRST_WAIT_S)


@pytest.mark.parametrize("wait_s", [61.0, 86_400.0, float("inf")])
def test_gate_is_closed_for_a_minute_at_most(wait_s):
    """However long the provider asks for: then one call is tried."""
    process = Process()
    process.closes(wait_s)

    assert process.opens_s() == pytest.approx(LONGEST_WAIT_S)


def test_no_wait_at_all_slows_down_only():
    """A wait of nothing lets the next call pass, and no herd behind it; and budgets change once."""
    process = Process()
    process.closes(0.0)
    epoch = process.house.backend.epoch
    for ms in range(200):
        process.clock.us = ms * 1000
        process.closes(0.0)

    assert process.house.backend.epoch == epoch
    assert [process.passes(), process.passes()] == [True, False]


def test_gate_is_removed_once_it_has_been_open():
    """Five seconds after it opened the budget is gone, and was there until then."""
    process = Process()
    process.closes(2.0)
    process.clock.goes_to(2.0 + GENTLE_S - 0.01)
    assert process.is_there
    process.clock.goes_to(2.0 + GENTLE_S)

    assert not process.is_there
    assert [process.passes() for _ in range(5)] == [True] * 5


def test_gate_that_was_extended_is_gentle_for_as_long():
    """The first closing's time does not end the second's."""
    process = Process()
    process.closes(1.0)
    process.clock.goes_to(0.9)
    process.closes(4.0)
    process.clock.goes_to(4.9 + GENTLE_S - 0.01)
    assert process.is_there
    process.clock.goes_to(4.9 + GENTLE_S + 0.01)

    assert not process.is_there


def test_gate_that_was_removed_by_hand_closes_at_the_next_refusal():
    """Whoever removes it wants calls to pass, until the provider refuses the next."""
    process = Process()
    process.closes(20.0)
    process.clock.goes_to(2.0)
    process.house.budgets.delete(gate_of(MODEL))
    assert process.passes()

    process.closes(10.0)
    assert process.opens_s() == pytest.approx(12.0, abs=0.01)
    process.clock.goes_to(12.0 + GENTLE_S + 1)
    assert not process.is_there


def test_shorter_wait_that_another_process_is_told_opens_nothing():
    """Of two processes that are refused the one that is told the longer wait is heeded."""
    first = Process()
    second = Process(first.house, first.clock)
    first.closes(40.0)
    second.closes(1.0)

    assert first.opens_s() == pytest.approx(40.0)


def test_gate_that_another_process_closed_again_is_not_removed():
    """It is that one's business, and stays closed and gentle for as long as that one was asked for."""
    first = Process()
    second = Process(first.house, first.clock)
    first.closes(1.0)
    first.clock.goes_to(5.9)
    second.closes(10.0)
    first.clock.goes_to(15.8)
    assert not first.passes()
    first.clock.goes_to(15.9 + GENTLE_S - 0.1)
    assert first.is_there
    first.clock.goes_to(15.9 + GENTLE_S + 0.1)

    assert not first.is_there


def test_gate_of_a_process_that_is_no_more_is_removed():
    """Whoever had closed it before sees to it that it goes."""
    first = Process()
    dead = Process(first.house)
    first.closes(1.0)
    first.clock.goes_to(3.0)
    dead.clock.us = first.clock.us
    dead.closes(10.0)
    first.clock.goes_to(12.9)
    assert not first.passes()
    first.clock.goes_to(60.0)

    assert not first.is_there


def test_orphans_are_removed():
    """A gate whose closer is no more goes some time after it has opened, and not before."""
    house = House()
    dead = Process(house)
    dead.closes(30.0)
    process = Process(house)
    process.gates.sweep([gate_of(MODEL)])
    process.gates.sweep([gate_of(MODEL)])
    process.clock.goes_to(30.0 + GENTLE_S)
    assert process.is_there
    process.clock.goes_to(60.0)

    assert not process.is_there


def test_sweeping_leaves_a_gate_of_ones_own_alone():
    """Who has closed a gate removes it in its time."""
    process = Process()
    process.closes(2.0)
    process.gates.sweep([gate_of(MODEL)])
    process.clock.goes_to(2.0 + GENTLE_S)

    assert not process.is_there


class Down:
    """Budgets that cannot be reached, until they can."""

    def __init__(self, budgets):
        self.budgets = budgets
        self.down = True

    def __getattr__(self, name):
        if self.down and name != "find":
            raise BackendDown("it is down", "lost")
        return getattr(self.budgets, name)


def test_gate_that_could_not_be_closed_is_closed_at_the_next_refusal(caplog):
    """Where budgets cannot be reached it stays open, and the log says so; the next refusal tries again."""
    house = House()
    down = Down(house.budgets)
    process = Process(house, budgets=down)
    process.closes(10.0)
    assert process.passes()
    down.down = False
    process.clock.goes_to(0.5)
    process.closes(9.5)

    assert not process.passes()
    assert any("stays open" in record.getMessage() for record in caplog.records)


def test_gate_that_cannot_be_closed_is_told_of_once_in_a_while(caplog):
    """Every refusal tries again, and nearly all of them say nothing."""
    process = Process(budgets=Down(House().budgets))
    for tenth in range(1300):
        process.clock.us = tenth * 100_000
        process.closes(9.5)

    assert sum("stays open" in record.getMessage() for record in caplog.records) == 3


def test_gates_of_models_that_callers_make_up_are_bounded():
    """Who refuses all calls, whatever model they ask for, fills neither the table nor the memory."""
    process = Process(House(buckets=4096))
    for number in range(2 * MAX_GATES):
        process.closes(10.0, model=f"m{number}")
    assert len(process.house.backend.budgets()) == MAX_GATES
    process.closes(20.0, model="m0")
    process.clock.goes_to(20.0)

    assert [budget.name.model for budget in process.house.backend.budgets()] == ["m0"]
    process.closes(10.0, model="another")
    assert not process.passes("another")


def test_gate_that_cannot_be_removed_is_an_orphan():
    """It is left to whoever sweeps next."""
    house = House()
    down = Down(house.budgets)
    down.down = False
    process = Process(house, budgets=down)
    process.closes(1.0)
    down.down = True
    process.clock.goes_to(20.0)
    assert process.is_there
    down.down = False
    process.gates.sweep([gate_of(MODEL)])
    process.clock.goes_to(60.0)

    assert not process.is_there


def test_log_tells_of_the_wait_and_why_and_of_its_end(caplog):
    """The operator reads which model, for how long, in the provider's own words, and when it is over."""
    process = Process()
    process.closes(2.5, "Slow down.")
    process.closes(2.5, "Slow down.")
    process.clock.goes_to(2.5 + GENTLE_S + 1)

    assert caplog.messages == [
        f"the provider asks to wait: calls of {MODEL} are held back for 2.5 s (Slow down.)",
        f"calls of {MODEL} pass again",
    ]


def test_log_tells_of_a_longer_wait_at_once(caplog):
    """A wait of a minute does not hide behind one of a second; waits that are about the same have one line."""
    process = Process()
    for wait_s in (1.0, 1.2, 60.0):
        process.closes(wait_s, "429")

    assert [message.partition("held back for ")[2] for message in caplog.messages] == ["1 s (429)", "60 s (429)"]


def test_gate_is_the_only_thing_that_a_refusal_binds_to():
    """Its refusal tells the wait, and that it is a gate."""
    process = Process()
    process.closes(2.5)
    refused = process.asks()

    assert refused.binding.name.meter is Meter.GATE
    assert refused.retry_after_us == 2_500_000


@given(st.lists(st.tuples(st.integers(0, 3000), st.none() | st.integers(0, 90_000), st.booleans()), max_size=30))
def test_gates_always_open_in_the_end(events):
    """Whatever two processes are told, and when: no gate is closed for over a minute, and none stays."""
    first = Process()
    second = Process(first.house, first.clock)
    for later_ms, wait_ms, which in events:
        first.clock.goes_to(first.clock.s + later_ms / 1000)
        (first if which else second).closes(None if wait_ms is None else wait_ms / 1000)
        assert first.opens_s() - first.clock.s <= LONGEST_WAIT_S + 1.01
    first.clock.goes_to(first.clock.s + 200)

    assert not first.is_there
    assert first.passes()
