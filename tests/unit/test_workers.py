"""The processes that share a table: who has which row, and what is counted in them."""

import os
from contextlib import ExitStack, contextmanager

import pytest

from tests.crew import Worker
from tokenguard._bucket import MAX_ROWS, MAX_SHARED, BucketTable, Shared
from tokenguard.backends.workers import STATES, TELLS, _began, counted, join, leave, living

CALLS, IN_FLIGHT = b"calls", STATES[0]
ME = os.getpid


@pytest.fixture
def table():
    return BucketTable(1)


def count(table, calls, in_flight=0):
    """Count some calls, of which some are in flight."""
    table.tally(CALLS).add(calls)
    table.tally(IN_FLIGHT).add(in_flight)


def told(table):
    """Return how many calls there were, and how many are in flight."""
    numbers = counted(table)
    return numbers[CALLS], numbers[IN_FLIGHT]


def serve_and_end(table, calls, in_flight):
    """Have a process join, count and end."""
    with Worker(lambda: (join(table), count(table, calls, in_flight), ME())) as worker:
        worker.go()
        return worker.answer()[2]


@contextmanager
def serving(table, calls, in_flight):
    """Have a process join and count, and live on for a while; yield its process id."""
    gate, opener = os.pipe()
    ready, say_ready = os.pipe()

    def serve():
        join(table)
        count(table, calls, in_flight)
        os.write(say_ready, b"!")
        os.read(gate, 1)

    with Worker(serve) as worker:
        worker.go()
        assert os.read(ready, 1) == b"!"
        yield worker.pid
        os.write(opener, b"!")
        worker.answer()
    for end in (gate, opener, ready, say_ready):
        os.close(end)


# --- rows -----------------------------------------------------------------------------------------------------


def test_who_joins_has_a_row_until_it_leaves(table):
    """A process that joins is told of among the living, once, however often it joins."""
    assert living(table) == {}
    join(table)
    join(table)
    assert list(living(table).values()) == [ME()]

    leave(table)

    assert living(table) == {}
    assert all(row == (0, 0) for row in table.rows())


def test_who_never_joined_can_leave(table):
    """Leaving takes nobody else's row."""
    with serving(table, 1, 0) as pid:
        leave(table)
        assert list(living(table).values()) == [pid]


def test_processes_have_rows_of_their_own(table):
    """Those that live side by side count apart, and are told of together."""
    join(table)
    count(table, 1, 1)
    with serving(table, 20, 2) as one, serving(table, 300, 3) as other:
        assert sorted(living(table).values()) == sorted([ME(), one, other])
        assert sorted(number for number in table.tallies()[CALLS] if number) == [1, 20, 300]
        assert told(table) == (321, 6)


def test_forked_child_has_a_row_of_its_own(table):
    """A child of a process that joined counts apart from it, without being told to; both go on."""
    join(table)
    count(table, 1, 1)

    with Worker(lambda: (count(table, 20, 2), sorted(living(table).values()), told(table))) as child:
        child.go()
        _, alive, seen = child.answer()

    assert alive == sorted([ME(), child.pid])
    assert seen == (21, 3)
    count(table, 1, 1)
    assert told(table) == (22, 2)


def test_child_of_a_child_has_a_row_of_its_own(table):
    """The same holds for whomever the child forks off."""
    join(table)

    def fork_again():
        pid = os.fork()
        if not pid:
            os._exit(len(living(table)))
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    with Worker(fork_again) as child:
        child.go()
        assert child.answer() == 3


# --- the dead -------------------------------------------------------------------------------------------------


def test_counts_of_the_dead_stay_and_their_states_do_not(table):
    """What a process counted counts for ever; its calls in flight ended with it."""
    serve_and_end(table, 5, 2)

    assert told(table) == (5, 0)


def test_counts_of_the_dead_stay_beside_the_living(table):
    """The dead and the living are added up, in whatever order they came."""
    with serving(table, 10, 1):
        serve_and_end(table, 5, 2)
        join(table)
        count(table, 100, 7)
        serve_and_end(table, 1000, 2)

        assert told(table) == (1115, 8)
    assert told(table) == (1115, 7)


def test_row_of_a_dead_process_is_taken_over(table):
    """A process goes on counting where a dead one stopped, and begins with no call in flight."""
    dead = serve_and_end(table, 5, 2)
    (row,) = (row for row, (pid, _) in enumerate(table.rows()) if pid == dead)

    join(table)
    count(table, 10, 1)

    assert living(table) == {row: ME()}
    assert table.tallies()[CALLS][row] == 15
    assert told(table) == (15, 1)


def test_many_processes_one_after_the_other_need_one_row(table):
    """Rows are not used up by those that end, nor do their counts get lost."""
    for _ in range(MAX_ROWS + 1):
        serve_and_end(table, 3, 1)

    assert sum(pid != 0 for pid, _ in table.rows()) == 1
    assert told(table) == (3 * (MAX_ROWS + 1), 0)


def test_zombie_does_not_live(table):
    """A process that was killed is dead before anybody has waited for it."""
    with Worker(lambda: (join(table), count(table, 5, 2))) as worker:
        worker.go()
        os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)

        assert living(table) == {}
        assert told(table) == (5, 0)


def test_process_that_was_given_a_dead_ones_id_is_another(table):
    """An id that came round again does not keep a row alive: the process began at another time."""
    table.hold_row(5, ME(), _began(ME()) - 1)
    count(table, 5, 2)

    assert living(table) == {}
    assert told(table) == (5, 0)
    join(table)
    assert list(living(table).values()) == [ME()]


# --- more than there are rows ---------------------------------------------------------------------------------


def test_more_processes_than_rows_count_all_the_same(table):
    """Whoever finds every row taken counts with others, and nothing is lost."""
    others = os.getppid()
    for row in range(MAX_ROWS):
        table.hold_row(row, others, _began(others))
    rows = table.rows()

    with Worker(lambda: (join(table), count(table, 7, 0), leave(table))) as worker:
        worker.go()
        worker.answer()

    assert table.rows() == rows
    assert told(table)[0] == 7


def test_what_the_dead_told_the_log_is_not_told_by_the_next_in_its_row(table):
    """Whoever takes the row over has told nothing yet."""
    for said in (1, 0):
        with Worker(lambda said=said: (join(table), table.tally(TELLS + b"it").add(said))) as worker:
            worker.go()
            worker.answer()
        assert sum(table.tallies()[TELLS + b"it"]) == said


def test_row_out_of_bounds_is_refused(table):
    """There are 128 rows."""
    for row in (-1, MAX_ROWS):
        with pytest.raises(ValueError, match=f"row must be between 0 and {MAX_ROWS - 1}, got {row}"):
            table.hold_row(row, ME(), 0)


# --- numbers that all share -------------------------------------------------------------------------------------


def test_numbers_of_a_key_are_shared(table):
    """Whoever asks for a key has the same numbers, another process too; those of another key are others."""
    mine = table.shared(b"a number")
    with Worker(lambda: table.shared(b"a number").add(3, 5)) as worker:
        worker.go()
        assert worker.answer() == 5
    table.shared(b"a number").set(0, -(2**62))

    assert mine.add(3, -7) == -2
    assert [mine.get(i) for i in range(7)] == [-(2**62), 0, 0, -2, 0, 0, 0]
    assert [table.shared(b"another.").get(i) for i in range(7)] == [0] * 7


def test_processes_that_add_at_once_lose_nothing(table):
    """A number is what all have added."""
    shared = table.shared(b"a number")

    def add():
        for _ in range(20_000):
            shared.add(6, 1)

    with ExitStack() as stack:
        crew = [stack.enter_context(Worker(add)) for _ in range(4)]
        for worker in crew:
            worker.go()
        for worker in crew:
            worker.answer()

    assert shared.get(6) == 80_000


def test_numbers_for_which_there_is_no_room_are_somebody_s_own(table):
    """What is beyond is not shared, and works all the same; nor is what was made without a table."""
    keys = [number.to_bytes(8) for number in range(MAX_SHARED + 1)]
    for number, key in enumerate(keys):
        table.shared(key).add(0, number)

    assert [table.shared(key).get(0) for key in keys] == [*range(MAX_SHARED), 0]
    assert Shared().add(0, 1) == Shared().add(0, 1) == 1


def test_numbers_that_were_forgotten_are_zero_again(table):
    """There is room for other keys then, and whoever has one begins anew."""
    for number in range(MAX_SHARED):
        table.shared(number.to_bytes(8)).set(6, 1)
    table.forget_shared()
    table.shared(b"a number").add(0, 1)

    assert [table.shared(b"a number").get(i) for i in range(7)] == [1, 0, 0, 0, 0, 0, 0]
    assert [table.shared(bytes(8)).get(i) for i in range(7)] == [0] * 7


@pytest.mark.parametrize("key", [b"", b"seven..", b"nine....."])
def test_key_of_another_length_is_refused(table, key):
    """Eight bytes, no more and no fewer."""
    with pytest.raises(ValueError, match=f"key must be 8 bytes, got {len(key)}"):
        table.shared(key)


@pytest.mark.parametrize("i", [-1, 7, 2**31 - 1])
def test_number_out_of_bounds_is_refused(table, i):
    """There are seven."""
    shared = table.shared(b"a number")
    for act in (lambda: shared.get(i), lambda: shared.set(i, 1), lambda: shared.add(i, 1)):
        with pytest.raises(IndexError, match=f"number must be between 0 and 6, got {i}"):
            act()
