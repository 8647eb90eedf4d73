"""Explicit budgets in a table that several backends share: each knows all of them, whoever set them."""

import os
import random
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.house import NOW_US, grant, named
from tests.strategies import properties
from tokenguard._bucket import BucketTable
from tokenguard.backends.memory import MemoryBackend
from tokenguard.backends.mirror import Mirror, read_records, record_of
from tokenguard.errors import BudgetNotFound, StaleHandle, TableFull
from tokenguard.model import Budget, Meter

ALICE, BOB = named("user:alice"), named("user:bob")


def shared(buckets=1, count=2):
    """Return a table and backends that share it."""
    table = BucketTable(buckets)
    return table, *(MemoryBackend(table) for _ in range(count))


def listed(model):
    """Return the budgets of a dict as a backend lists them."""
    return [Budget(name, model[name]) for name in sorted(model, key=lambda name: name.key)]


def fill(backend, length=20):
    """Set budgets with ids of a length until there is no room for another; return how many there are."""
    number = 0
    while True:
        try:
            backend.put(Budget(named(f"user:{number:0{length}}"), grant(10)))
        except TableFull:
            return number
        number += 1


# --- each knows what all did ----------------------------------------------------------------------------------


def test_budget_set_by_one_is_known_to_the_other():
    """A budget binds the next call of everybody: by name, by scope and in the list."""
    _, one, other = shared()
    assert other.budgets() == []

    one.put(Budget(ALICE, grant(10)))
    assert other.on(ALICE.scope) == (Budget(ALICE, grant(10)),)
    other.put(Budget(ALICE, grant(20)))
    assert one.budgets() == [Budget(ALICE, grant(20))]
    one.drop(ALICE, None)
    assert list(other.on(ALICE.scope)) == other.budgets() == []


def test_budget_that_the_other_removed_cannot_be_removed_again():
    """Who removes what is no longer there is told so, and nothing changes."""
    table, one, other = shared()
    one.put(Budget(ALICE, grant(10)))
    other.drop(ALICE, None)
    epoch = table.epoch

    with pytest.raises(BudgetNotFound, match="there is no budget for user:alice"):
        one.drop(ALICE, None)

    assert table.epoch == epoch


def test_every_change_makes_every_plan_stale():
    """The epoch moves with each budget that is set or removed, so that no plan outlives it."""
    _, one, other = shared()
    for change in (
        lambda: one.put(Budget(ALICE, grant(10))),
        lambda: one.put(Budget(ALICE, grant(10))),
        lambda: one.put(Budget(ALICE, grant(10)), 3),
        lambda: one.drop(ALICE, Budget(ALICE, grant(5))),
        lambda: one.put(Budget(BOB, grant(10))),
        lambda: one.drop(BOB, None),
    ):
        epoch, handle = other.epoch, other.prepare([])
        change()
        assert other.epoch > epoch
        with pytest.raises(StaleHandle):
            other.reserve(handle, ())


def test_budgets_of_one_scope_are_told_apart():
    """Meters and models make budgets of their own, in the other backend's eyes too."""
    _, one, other = shared()
    names = [ALICE, named("user:alice", Meter.REQUESTS), named("user:alice", model="gpt-4o"), BOB]
    for number, name in enumerate(names, 1):
        one.put(Budget(name, grant(number)))
    one.drop(ALICE, None)

    assert set(other.on(ALICE.scope)) == {Budget(names[1], grant(2)), Budget(names[2], grant(3))}


class WatchedTable:
    """A table that lets somebody do something when its log has just been read."""

    def __init__(self, table, then):
        self._table = table
        self._then = then

    def __getattr__(self, name):
        return getattr(self._table, name)

    def changes(self, since):
        told = self._table.changes(since)
        self._then()
        return told


def test_budget_that_is_set_while_another_backend_reads_is_not_missed():
    """Whoever read the log a moment too early reads on at his next call."""
    table, setter = shared(count=1)
    numbers = iter(range(1, 4))
    backend = MemoryBackend(WatchedTable(table, lambda: setter.put(Budget(ALICE, grant(next(numbers))))))

    assert backend.budgets() == []
    assert backend.budgets() == [Budget(ALICE, grant(1))]
    assert backend.budgets() == [Budget(ALICE, grant(2))]


# --- the log is written anew ----------------------------------------------------------------------------------


def test_log_is_rewritten_and_nobody_notices():
    """Through thousands of changes, for which the log has no room, both know the same, whenever they look."""
    table, one, other = shared(count=2)
    rng = random.Random(1)
    model, rewritten, room = {}, 0, table.log_room
    for number in range(1, 6_001):
        name = named(f"user:{rng.randrange(100)}")
        backend = rng.choice((one, other))
        if name in model and rng.random() < 0.3:
            backend.drop(name, None, NOW_US)
            del model[name]
        else:
            model[name] = grant(number)
            backend.put(Budget(name, model[name]), None, NOW_US)
        rewritten += table.log_room > room
        room = table.log_room
        if rng.random() < 0.1:
            assert rng.choice((one, other)).budgets() == listed(model), number

    assert rewritten >= 2
    assert one.budgets() == other.budgets() == listed(model)


@pytest.mark.parametrize("rewrites", [1, 2, 3])
def test_mirror_that_is_far_behind_reads_the_whole_log(rewrites):
    """Who did not look while the log was rewritten, once or often, knows no more and no less than what holds."""
    table, one, other = shared()
    one.put(Budget(ALICE, grant(10)))
    assert other.budgets() == [Budget(ALICE, grant(10))]
    one.drop(ALICE, None)
    number = 0
    while rewrites:
        room, number = table.log_room, number + 1
        one.put(Budget(BOB, grant(number)))
        rewrites -= table.log_room > room

    assert other.budgets() == [Budget(BOB, grant(number))]
    assert MemoryBackend(table).budgets() == [Budget(BOB, grant(number))]


names = st.builds(
    lambda kind, letter, meter, model: named(f"{kind}:{letter * 200}", meter, model),
    st.sampled_from(["team", "user"]),
    st.sampled_from("ab"),
    st.sampled_from(list(Meter)),
    st.sampled_from([None, "m" * 200]),
)
acts = st.one_of(
    st.tuples(st.just("put"), st.booleans(), names, st.integers(1, 10**12)),
    st.tuples(st.just("drop"), st.booleans(), names, st.none() | st.integers(1, 9)),
    st.tuples(st.just("look"), st.booleans(), names, st.none()),
)


@properties
@given(st.integers(0, 4_000), st.lists(acts, max_size=30))
def test_two_mirrors_and_a_dict_agree(room, steps):
    """However sets, removals and looks follow each other, wherever the log ends, both know what a dict does."""
    table, *backends = shared()
    filler = record_of(named("role:filler"), None)
    table.rewrite(filler * ((table.log_room - room) // len(filler)))
    model = {}
    for act, by, name, number in steps:
        backend = backends[by]
        if act == "put":
            model[name] = grant(number, max_debt=0)
            backend.put(Budget(name, model[name]), None, NOW_US)
        elif act == "look":
            on_scope = [budget for budget in listed(model) if budget.name.scope == name.scope]
            assert sorted(backend.on(name.scope), key=lambda budget: budget.name.key) == on_scope
        elif name in model:
            del model[name]
            backend.drop(name, number and Budget(name, grant(number)), NOW_US)
        else:
            with pytest.raises(BudgetNotFound):
                backend.drop(name, None, NOW_US)

    assert [backend.budgets() for backend in backends] == [listed(model)] * 2


# --- no room --------------------------------------------------------------------------------------------------


def test_budget_without_room_changes_nothing():
    """Where the log has no room for one more, both know the same as before, and no plan becomes stale."""
    table, one, other = shared()
    count = fill(one)
    before, epoch = other.budgets(), table.epoch
    assert len(before) == count > 1_000

    with pytest.raises(TableFull, match=f"the table has no room for more than the {count} budgets that are set"):
        other.put(Budget(named(f"user:{'one more':-<256}"), grant(10)), None, NOW_US)

    assert one.budgets() == other.budgets() == before
    assert table.epoch == epoch


@pytest.mark.parametrize("length", [6, 7, 8, 9, 20, 21, 45])
def test_budgets_can_be_changed_and_removed_where_no_more_can_be_set(length):
    """However little room is left, a limit can be lowered or removed, and then another budget be set."""
    _, one, other = shared()
    count = fill(one, length)
    first, second, *_ = (budget.name for budget in one.budgets())

    other.put(Budget(first, grant(9)))
    other.drop(first, None)
    other.drop(second, Budget(second, grant(1000)))
    assert len(one.budgets()) == count - 2

    one.put(Budget(first, grant(9)))
    assert other.budgets()[0] == Budget(first, grant(9))


def test_full_log_has_room_once_budgets_are_gone():
    """A log that was full takes as many budgets again when all have been removed."""
    _, one, other = shared()
    count = fill(one, 200)
    for budget in one.budgets():
        other.drop(budget.name, None)

    assert one.budgets() == other.budgets() == []
    assert fill(other, 200) == count


# --- records --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [None, grant(1), grant(10**12, 5, 0), grant(1000, 1, 10**9)])
def test_record_is_read_as_it_was_written(scale):
    """A change is the same after it was bytes, between others."""
    name = named(f"user:{'é' * 128}", Meter.REQUESTS, "m" * 256)
    changes = [(ALICE, grant(3)), (name, scale), (ALICE, None)]

    assert list(read_records(b"".join(record_of(*change) for change in changes))) == changes


def test_records_that_end_early_are_none():
    """Bytes that end within a record are an error that says where that begins, not a shorter list."""
    records = record_of(ALICE, grant(3)) + record_of(BOB, grant(4))
    whole = len(record_of(ALICE, grant(3)))
    for length in range(1, len(records)):
        if length == whole:
            continue
        with pytest.raises(ValueError, match=f"no budget begins at byte {0 if length < whole else whole}:"):
            list(read_records(records[:length]))


def test_mirror_is_not_changed_by_what_follows():
    """A mirror that somebody holds shows the budgets of its moment."""
    before = Mirror(1, {}).changed(2, [(ALICE, grant(1))])
    after = before.changed(3, [(ALICE, None), (BOB, grant(2))])

    assert (before.epoch, before.all) == (2, [Budget(ALICE, grant(1))])
    assert (after.epoch, after.all) == (3, [Budget(BOB, grant(2))])
    assert after.changed(4, read_records(before.records)).all == [Budget(ALICE, grant(1)), Budget(BOB, grant(2))]


# --- forks ----------------------------------------------------------------------------------------------------


class HaltingRecords(bytes):
    """Records that, when somebody begins to read them, have him wait."""

    reading, goes_on = threading.Event(), threading.Event()

    def __len__(self):
        self.reading.set()
        self.goes_on.wait(10)
        return super().__len__()


class HaltingTable:
    """A table that hands out such records."""

    def __init__(self, table):
        self._table = table

    def __getattr__(self, name):
        return getattr(self._table, name)

    def changes(self, since):
        read_to, whole, records = self._table.changes(since)
        return read_to, whole, HaltingRecords(records)


def test_child_forked_while_a_thread_reads_knows_what_was_read():
    """What another thread of the parent had half taken in when it forked is not lost to the child."""
    table, setter = shared(count=1)
    setter.put(Budget(ALICE, grant(10)))
    backend = MemoryBackend(HaltingTable(table))
    reader = threading.Thread(target=backend.budgets)
    reader.start()
    assert HaltingRecords.reading.wait(10)

    pid = os.fork()
    if not pid:
        HaltingRecords.goes_on.set()
        os._exit(backend.budgets() != [Budget(ALICE, grant(10))])
    HaltingRecords.goes_on.set()
    reader.join()

    assert os.waitpid(pid, 0)[1] == 0
    assert backend.budgets() == [Budget(ALICE, grant(10))]
