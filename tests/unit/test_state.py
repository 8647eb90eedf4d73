"""The state on disk: what is kept, what is refused, and that it is there before anybody is told."""

import os
import resource
import shutil
import time
from contextlib import contextmanager

import pytest

from tests.crew import Worker
from tests.golden import FOLDER as GOLDEN
from tests.golden.state import BUDGETS, DEFAULT, LEVELS, LEVELS_LATER, STATES, path_of, recorded
from tests.house import MODEL, NOW_US, S, grant, named
from tests.mirror import learned
from tests.nodes import until
from tokenguard._bucket import BucketTable
from tokenguard.backends import state
from tokenguard.backends.memory import MemoryBackend
from tokenguard.backends.mirror import read_records, record_of
from tokenguard.backends.node import open_node
from tokenguard.backends.state import State, StateFile
from tokenguard.budgets import Budgets
from tokenguard.errors import InvalidSetting, StateUnwritable, TableFull
from tokenguard.headroom import Pace
from tokenguard.model import Budget, Meter, Source
from tokenguard.plan import GATE_COST, Plans
from tokenguard.provider_limits.background import Background
from tokenguard.provider_limits.gates import Gates, gate_of

SLOT_BYTES = 64
ALICE, BOB = named("user:alice"), named("user:bob")


@pytest.fixture
def path(tmp_path):
    """Where a state may be kept, in a folder of its own."""
    folder = tmp_path / "kept"
    folder.mkdir()
    return folder / "state"


@contextmanager
def running(path, buckets=64):
    """Run a backend with a state, and stop it."""
    backend = MemoryBackend(*open_node(buckets, state=path))
    try:
        yield backend
    finally:
        backend.close()


def around(path):
    """Return the names in a file's folder."""
    return sorted(entry.name for entry in path.parent.iterdir())


def refused(path, buckets=64):
    """Return the error that opening a state ends in; the file, and its folder, must be as they were."""
    before = path.read_bytes(), around(path)
    with pytest.raises(InvalidSetting) as caught:
        open_node(buckets, state=path)
    assert (path.read_bytes(), around(path)) == before
    return caught.value


def take(backend, budget, tokens, now_us=NOW_US):
    """Take tokens of a budget's bucket, into debt where they are not there."""
    backend.settle(backend.prepare([budget]), (tokens,), now_us)


def levels(backend, budgets, now_us=NOW_US):
    """Return what is in the buckets of some budgets."""
    outcome = backend.peek(backend.prepare(budgets), now_us)
    return [outcome.level(i) for i in range(len(outcome))]


def kept_budgets(path):
    """Return the budgets that a file holds, by name."""
    return dict(read_records(state._decoded(path.read_bytes()).budgets))


# --- a start goes on from where the last one stopped ----------------------------------------------------------

ALL_KINDS = [
    Budget(named("global"), grant(10**12, 0, 10**12)),
    Budget(named("team:red"), grant(500)),
    Budget(named("user:alice", Meter.REQUESTS), grant(5)),
    Budget(named("user:alice", Meter.REQUESTS, MODEL), grant(3)),
    Budget(named("user:alice"), grant(100, 0, 50)),
    Budget(named("user:alice", model=MODEL), grant(70)),
]


def test_budgets_and_levels_are_there_after_a_restart(path):
    """Budgets of every kind come back exactly, and their buckets: spent, empty, full, in debt, at the floor."""
    with running(path) as before:
        for budget, tokens in zip(ALL_KINDS, [1, 500, 5, 0, 1000, 71], strict=True):
            before.put(budget, None, NOW_US)
            take(before, budget, tokens)

    with running(path) as after:
        assert after.budgets() == ALL_KINDS
        assert levels(after, ALL_KINDS) == [10**12 - 1, 0, 0, 3, -50, -1]


def test_bucket_of_a_default_is_there_after_a_restart(path):
    """A bucket without an explicit budget is kept as well, and no budget is made of it."""
    default = Budget(ALICE, grant(1000))
    with running(path) as before:
        take(before, default, 1)

    with running(path) as after:
        assert levels(after, [default]) == [999]
        assert after.budgets() == []


def test_time_that_passed_meanwhile_refills(path):
    """Buckets go on by the wall clock, to the microsecond, as if nothing had happened."""
    now_us = time.time_ns() // 1000
    drained, owing = Budget(ALICE, grant(10**6, 10)), Budget(BOB, grant(10**6, 10))
    with running(path) as before:
        take(before, drained, 10**6, now_us)
        take(before, owing, 10**6 + 25, now_us)

    with running(path) as after:
        assert levels(after, [drained, owing], now_us + 5 * S - 1) == [49, 24]
        assert levels(after, [drained, owing], now_us + 5 * S) == [50, 25]
        assert after.reserve(after.prepare([drained]), (51,), now_us + 5 * S).retry_after_us == S // 10


def test_level_that_comes_with_a_budget_is_kept(path):
    """A level is on the disk when put returns, as its budget is."""
    budget = Budget(ALICE, grant(100))
    with running(path) as before:
        before.put(budget, -7, NOW_US)
        copy = shutil.copy(path, path.with_name("copy"))

    with running(copy) as after:
        assert levels(after, [budget]) == [-7]


def test_removed_budget_stays_removed(path):
    """What was removed does not come back: neither the budget, nor what was taken of it."""
    with running(path) as before:
        before.put(Budget(ALICE, grant(100)), 5, NOW_US)
        before.put(Budget(BOB, grant(100)), 5, NOW_US)
        before.drop(ALICE, None, NOW_US)
        assert kept_budgets(path) == {BOB: grant(100)}

    with running(path) as after:
        assert after.budgets() == [Budget(BOB, grant(100))]
        assert levels(after, [Budget(ALICE, grant(100))]) == [100]


def test_full_buckets_are_not_written(path):
    """What is full, or full again by now, cannot be told from what never was."""
    with running(path) as backend:
        take(backend, Budget(ALICE, grant(10, 1)), 3)
        take(backend, Budget(BOB, grant(10)), 3)
        take(backend, Budget(named("user:carol"), grant(10)), 3)
        take(backend, Budget(named("user:carol"), grant(10)), -3)

    assert len(state._decoded(path.read_bytes()).buckets) == SLOT_BYTES


def test_last_spending_is_saved_when_a_server_stops(path):
    """What was spent since the last snapshot is on the disk when a server has stopped."""
    budget = Budget(ALICE, grant(10))
    with running(path) as before:
        before.put(budget)
        take(before, budget, 4)

    with running(path) as after:
        assert levels(after, [budget]) == [6]


def test_state_lasts_through_many_restarts(path):
    """Each start goes on from the one before."""
    budget = Budget(ALICE, grant(100))
    for spent in range(10):
        with running(path) as backend:
            assert levels(backend, [budget]) == [100 - spent]
            backend.put(Budget(named(f"team:{spent}"), grant(1 + spent)), None, NOW_US)
            take(backend, budget, 1)

    with running(path) as backend:
        assert backend.budgets() == [Budget(named(f"team:{i}"), grant(1 + i)) for i in range(10)]


def test_state_goes_into_a_table_of_another_size(path):
    """Where there is room for what is kept, the number of buckets may change."""
    budgets = [Budget(named(f"user:{i}"), grant(10)) for i in range(20)]
    with running(path) as before:
        for budget in budgets:
            take(before, budget, 4)

    for buckets in (20, 1000):
        with running(path, buckets) as after:
            assert levels(after, budgets) == [6] * 20


def test_state_is_its_owners(path):
    """Nobody else may read who has which budget."""
    with running(path):
        assert path.stat().st_mode & 0o777 == 0o600


# --- versions -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STATES)
def test_state_of_every_version_is_gone_on_from(name, path):
    """What any version wrote is read with its budgets and its levels."""
    shutil.copy(GOLDEN / name, path)
    key, scale, level = DEFAULT

    with running(path) as backend:
        assert backend.budgets() == BUDGETS
        assert levels(backend, BUDGETS) == LEVELS
        assert levels(backend, BUDGETS, NOW_US + 600 * S) == LEVELS_LATER
        handle = backend.table.prepare([(key, scale)])
        assert backend.peek(handle, NOW_US + S).level(0) == level + 5


def test_every_version_was_recorded():
    """There is a file for each version that is read, and today's is what is written today."""
    assert sorted(path_of(version).name for version in state._READERS) == STATES
    assert path_of(state.VERSION).read_bytes() == recorded()


# --- files that are not what was written ----------------------------------------------------------------------


@pytest.fixture
def small(path):
    """A file that holds one budget and one bucket."""
    with running(path) as backend:
        backend.put(Budget(ALICE, grant(10)), 5, NOW_US)
    return path


def test_file_that_ends_anywhere_is_refused(small):
    """Whatever length is left, it is not taken for the state, and is left as it is."""
    whole = small.read_bytes()
    for length in range(len(whole)):
        small.write_bytes(whole[:length])

        error = refused(small)

        assert error.field == "TOKENGUARD_STATE"
        assert f"the state in {small} cannot be used: it " in str(error), length


def flipped(data, bit):
    """Return bytes of which one bit is another."""
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def test_file_with_any_byte_changed_is_refused(small):
    """Wherever one bit is another, the file is refused, and left as it is."""
    whole = small.read_bytes()
    for byte in range(len(whole)):
        small.write_bytes(flipped(whole, 8 * byte + byte % 8))

        error = refused(small)

        assert error.field == "TOKENGUARD_STATE"
        assert f"the state in {small} cannot be used: it" in str(error), byte


def test_no_bit_may_be_another(small):
    """There is not one bit in the file that does not count."""
    whole = small.read_bytes()
    for bit in range(8 * len(whole)):
        with pytest.raises(ValueError, match=r"^it (is|ends)|^its checksum"):
            state._decoded(flipped(whole, bit))


def test_file_with_something_behind_is_refused(small):
    """A byte too many is one that nobody wrote."""
    small.write_bytes(small.read_bytes() + b"\n")

    assert "its checksum is wrong" in str(refused(small))


@pytest.mark.parametrize("content", [b"", b"\0" * 4096, b"capacity: 10\n", b"TGTABLE\n" + bytes(100), b"TGSTATE "])
def test_foreign_file_is_refused(content, path):
    """Something else's file is neither read nor written over."""
    path.write_bytes(content)

    error = str(refused(path))

    assert f"in {path} cannot be used: it is no state of TokenGuard's" in error
    assert "move it away to begin with full buckets" in error


def test_newer_version_is_refused(path):
    """A state that a later TokenGuard wrote is not guessed at; the message says which versions are read."""
    data = state._HEAD.pack(state._MAGIC, 7, 5) + b"later"
    path.write_bytes(data + state._digest(data))

    assert f"it is of version 7, and this TokenGuard reads 1 to {state.VERSION}" in str(refused(path))


@pytest.mark.parametrize("body", [b"", b"\xc0", b"\x80", b"\x81\xa5table\xc4\x00", b"\xff" * 9])
def test_body_that_holds_something_else_is_refused(body, path):
    """A body that cannot be read is refused, though its checksum is right."""
    data = state._HEAD.pack(state._MAGIC, state.VERSION, len(body)) + body
    path.write_bytes(data + state._digest(data))

    assert f"in {path} cannot be used" in str(refused(path))


@pytest.mark.parametrize(
    ("budgets", "buckets"),
    [
        (b"\x00\x05abcde", b""),
        (b"\x00", b""),
        (record_of(ALICE, grant(1))[:-1], b""),
        (b"", b"x"),
        (b"", bytes(64)),
    ],
)
def test_budgets_or_buckets_that_cannot_be_are_refused(budgets, buckets, path):
    """Records that are none, in a file that is otherwise right, are refused, and the file is left as it is."""
    path.write_bytes(state._encoded(State(bytes(16), 1, b"seed", budgets, buckets)))

    assert f"the state in {path} cannot be used" in str(refused(path))


def test_folder_in_the_place_of_the_file_is_refused(path):
    """What cannot be read is no reason to begin anew."""
    path.mkdir()

    with pytest.raises(InvalidSetting, match=f"in {path} cannot be read: Is a directory"):
        open_node(64, state=path)


def test_folder_that_is_not_there_is_named(tmp_path):
    """A state whose folder is missing is an error at the start."""
    path = tmp_path / "nowhere" / "state"

    with pytest.raises(InvalidSetting, match=f"cannot be kept at {path}: there is no folder {path.parent}"):
        open_node(64, state=path)


def test_write_that_was_cut_short_counts_for_nothing(small):
    """A half-written successor, of whatever length, is not read, and is written over."""
    new = small.with_name("state.new")
    for torn in (b"", small.read_bytes()[:-7], b"\xff" * 100_000):
        new.write_bytes(torn)

        with running(small) as backend:
            assert backend.budgets() == [Budget(ALICE, grant(10))]
            assert levels(backend, backend.budgets()) == [5]
        assert not new.exists()


# --- room -----------------------------------------------------------------------------------------------------


def test_more_buckets_than_there_is_room_for_name_the_setting(path):
    """A table that is too small for what was kept is refused, and nothing of it is lost."""
    with running(path) as backend:
        for number in range(20):
            take(backend, Budget(named(f"user:{number}"), grant(10)), 1)

    error = refused(path, buckets=19)

    assert error.field == "TOKENGUARD_BUCKETS"
    assert str(error).startswith(f"TOKENGUARD_BUCKETS must be higher: the state in {path} has no room, for ")


def test_more_budgets_than_there_is_room_for_name_the_setting(path):
    """The same holds for budgets."""
    many = b"".join(record_of(named(f"user:{number}"), grant(10)) for number in range(5_000))
    path.write_bytes(state._encoded(State(bytes(16), 1, b"seed", many, b"")))

    error = refused(path, buckets=1)

    assert error.field == "TOKENGUARD_BUCKETS"
    assert "TOKENGUARD_BUCKETS must be higher" in str(error)


# --- whose it is ----------------------------------------------------------------------------------------------


def test_state_of_a_running_server_is_refused(path):
    """Two servers cannot keep one state; when the first has ended, the other goes on from there."""
    with running(path) as first:
        first.put(Budget(ALICE, grant(10)))
        error = str(refused(path))
        first.put(Budget(BOB, grant(10)))

    assert f"is kept at {path} by another server that runs" in error
    assert "TOKENGUARD_TABLE in common" in error
    with running(path) as second:
        assert second.budgets() == [Budget(ALICE, grant(10)), Budget(BOB, grant(10))]


def test_lock_goes_with_the_server(path):
    """What lies beside the state while a server runs is gone when it has stopped."""
    with running(path):
        assert around(path) == ["state", "state.lock"]

    assert around(path) == ["state"]


def test_lock_that_a_killed_server_left_is_no_obstacle(small):
    """A lock that nobody holds counts for nothing, whatever is written in it."""
    small.with_name("state.lock").write_bytes(b"some other table")

    with running(small) as backend:
        assert backend.budgets() == [Budget(ALICE, grant(10))]
    assert around(small) == ["state"]


def test_forked_child_that_stops_leaves_its_parent_the_state(path):
    """A worker's end frees no lock of those that go on."""
    with running(path) as backend:
        backend.put(Budget(ALICE, grant(10)))
        with Worker(backend.close) as child:
            child.go()
            child.answer()

        refused(path)
        backend.put(Budget(BOB, grant(10)))
        assert kept_budgets(path) == {ALICE: grant(10), BOB: grant(10)}


def test_forked_child_has_the_state_when_its_parent_is_gone(path):
    """A worker that lives on keeps others away, though who opened the state is no more."""
    gate, opener = os.pipe()

    def open_and_fork():
        backend = MemoryBackend(*open_node(64, state=path))
        if not os.fork():
            os.read(gate, 1)
            backend.put(Budget(ALICE, grant(10)))
            os._exit(0)

    def goes_on():
        try:
            with running(path) as backend:
                return backend.budgets() == [Budget(ALICE, grant(10))]
        except InvalidSetting:
            return False

    with Worker(open_and_fork) as parent:
        parent.go()
        assert parent.wait() == 0
    try:
        refused(path)
    finally:
        os.write(opener, b"!")
    until(goes_on, "the worker does not end")
    os.close(gate)
    os.close(opener)


# --- the disk first, then the table, then the answer ----------------------------------------------------------


class WatchedFile(StateFile):
    """A state's file that notes, whenever it was written, the budgets on the disk and those in the table."""

    def __init__(self, path, table):
        super().__init__(path)
        self._table = table
        self.seen = []

    def write(self, state):
        super().write(state)
        in_table = dict(read_records(self._table.changes(0)[2]))
        self.seen.append((kept_budgets(self.path), {name: scale for name, scale in in_table.items() if scale}))


@pytest.fixture
def watched(path):
    """A backend whose file is watched."""
    table = BucketTable(64)
    backend = MemoryBackend(table, WatchedFile(path, table))
    yield backend
    backend.close()


def test_change_is_on_the_disk_before_it_is_in_the_table(watched):
    """What a crash leaves on the disk may have been told to nobody; what was told to somebody is there."""
    watched.put(Budget(ALICE, grant(10)))
    watched.put(Budget(ALICE, grant(20)))
    watched.drop(ALICE, None)
    watched.put(Budget(BOB, grant(10)))
    watched.drop(BOB, Budget(BOB, grant(5)))

    ten, twenty = grant(10), grant(20)
    assert watched._file.seen == [
        ({ALICE: ten}, {}),
        ({ALICE: twenty}, {ALICE: ten}),
        ({}, {ALICE: twenty}),
        ({BOB: ten}, {}),
        ({}, {BOB: ten}),
    ]


@pytest.mark.parametrize(("error", "level"), [(TableFull, 3), (ValueError, 11)])
def test_budget_that_the_table_refuses_is_not_left_on_the_disk(error, level, path):
    """Where the table has no room for a level, or it cannot be, the disk has the budgets that hold."""
    with running(path, buckets=1) as backend:
        backend.put(Budget(ALICE, grant(10)), 5)

        with pytest.raises(error):
            backend.put(Budget(BOB, grant(10)), level)

        assert backend.budgets() == [Budget(ALICE, grant(10))]
        assert kept_budgets(path) == {ALICE: grant(10)}


def folder_in_the_way(path):
    """Have the successor's name taken; return what undoes it."""
    new = path.with_name("state.new")
    new.mkdir()
    return new.rmdir


def folder_gone(path):
    """Move the state's folder away; return what undoes it."""
    elsewhere = path.parent.rename(path.parent.with_name("elsewhere"))
    return lambda: elsewhere.rename(path.parent)


def target_taken(path):
    """Put a folder in the place of the state; return what undoes it."""
    kept = path.rename(path.with_name("kept"))
    (path / "taken").mkdir(parents=True)
    return lambda: (shutil.rmtree(path), kept.rename(path))


def picture(backend):
    """Return all that a change of a budget could change."""
    budgets = backend.budgets()
    return budgets, levels(backend, budgets), backend.epoch, backend.table.changes(0)[2]


@pytest.mark.parametrize("block", [folder_in_the_way, folder_gone, target_taken])
def test_change_that_cannot_be_written_changes_nothing(block, path):
    """If the disk refuses, budgets, levels and epoch are as before; it is said until it can be written again."""
    with running(path) as backend:
        backend.put(Budget(ALICE, grant(10)), 5, NOW_US)
        before, kept = picture(backend), path.read_bytes()
        unblock = block(path)

        for change in (
            lambda: backend.put(Budget(ALICE, grant(20)), None, NOW_US),
            lambda: backend.put(Budget(ALICE, grant(20)), 1, NOW_US),
            lambda: backend.put(Budget(BOB, grant(20)), None, NOW_US),
            lambda: backend.drop(ALICE, None, NOW_US),
            lambda: backend.drop(ALICE, Budget(ALICE, grant(3)), NOW_US),
        ):
            with pytest.raises(StateUnwritable, match=f"the state cannot be written to {path}: "):
                change()
            assert picture(backend) == before
            assert f"the state cannot be written to {path}" in backend.trouble()

        unblock()
        assert path.read_bytes() == kept
        assert around(path) == ["state", "state.lock"]
        backend.put(Budget(BOB, grant(20)), None, NOW_US)
        assert backend.trouble() is None
        assert kept_budgets(path) == {ALICE: grant(10), BOB: grant(20)}


def test_file_that_may_not_grow_changes_nothing(path):
    """Where only a part of a successor can be written, no piece of it is left."""

    def work():
        with running(path) as backend:
            backend.put(Budget(ALICE, grant(10)), 5, NOW_US)
            before, kept = picture(backend), path.read_bytes()
            soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
            with pytest.raises(StateUnwritable, match="File too large"):
                backend.put(Budget(BOB, grant(20)), None, NOW_US)
            assert (picture(backend), path.read_bytes()) == (before, kept)
            assert around(path) == ["state", "state.lock"]
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    with Worker(work) as worker:
        worker.go()
        worker.answer()


def test_idle_server_finds_that_the_disk_is_back(path):
    """Once a change could not be written, writing is tried again, even if nothing else changes."""
    with running(path) as backend:
        look = backend._keeper._look_after_state
        backend.put(Budget(ALICE, grant(10)))
        look(at_once=True)
        unblock = folder_in_the_way(path)
        with pytest.raises(StateUnwritable):
            backend.put(Budget(BOB, grant(10)))

        look(at_once=False)
        assert backend.trouble() is not None
        unblock()
        look(at_once=False)

        assert backend.trouble() is None


def test_failure_is_logged_when_it_begins_and_when_it_ends(path, caplog):
    """However often writing fails, the log says so once."""
    with running(path) as backend:
        unblock = folder_in_the_way(path)
        for _ in range(3):
            with pytest.raises(StateUnwritable):
                backend.put(Budget(ALICE, grant(10)))
        unblock()
        backend.put(Budget(ALICE, grant(10)))
        backend.put(Budget(BOB, grant(10)))

    began, ended = [record.getMessage() for record in caplog.records if record.levelname in ("ERROR", "WARNING")]
    assert began.startswith(f"the state cannot be written to {path}: Is a directory; until it can, ")
    assert ended == "the state can be written again"


# --- limits of the provider's -------------------------------------------------------------------------------


def test_learned_budget_survives_a_restart_with_its_source(path):
    """Its level, its source and what was set by hand beside it are read back."""
    budgets = [
        learned(60_000),
        learned(900, meter=Meter.REQUESTS, window_s=86_400),
        learned(30_000, source=Source.ADMIN),
        learned(500, source=Source.ADMIN_DAILY, meter=Meter.REQUESTS, window_s=86_400),
        Budget(named("global", model=MODEL), grant(70)),
    ]
    with running(path) as backend:
        for budget in budgets:
            backend.put(budget, 40)

    with running(path) as backend:
        assert set(backend.budgets()) == set(budgets)
        seen = backend.peek(backend.prepare([budgets[1], budgets[4]]))
        assert [seen.level(at) for at in range(2)] == [40, 40]


def test_gate_survives_a_restart_closed(path):
    """A provider that asked to wait is not asked by whoever comes next."""
    with running(path) as backend:
        house = Budgets(backend, Plans(backend, {}))
        background = Background()
        gates = Gates(house, Pace(), background, lambda work: work(), lambda: 1)
        gates.close(MODEL, 50.0, "slow_down", 0.0)
        background.stop()

    with running(path) as backend:
        (budget,) = backend.budgets()
        assert budget.name == gate_of(MODEL)
        assert not backend.reserve(backend.prepare([budget]), (GATE_COST,)).allowed
