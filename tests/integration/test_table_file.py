"""A table in a file: what processes that were started apart share, and what becomes of a file that others left."""

import gc
import os
import signal
from collections import Counter
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.crew import Worker, crew
from tests.disks import LimitedDisk, MountedDisk, can_mount, killed, on_disk
from tests.house import NOW_US, grant, named
from tests.integration.apart import Apart
from tests.region import HEADER, Header
from tokenguard._bucket import MAX_PLAN, MAX_ROWS, region_bytes
from tokenguard.backends.memory import MemoryBackend
from tokenguard.backends.mirror import read_records
from tokenguard.backends.node import open_node
from tokenguard.backends.state import _decoded
from tokenguard.backends.table_file import open_table
from tokenguard.errors import InvalidSetting
from tokenguard.model import Budget

BUCKETS = 64
DEFAULT_BUCKETS = 500_000
BOOT = Path("/proc/sys/kernel/random/boot_id")
ALICE = Budget(named("user:alice"), grant(10))
BOB = Budget(named("user:bob"), grant(20))


@pytest.fixture
def path(tmp_path):
    """Where a table may be, in a folder of its own."""
    folder = tmp_path / "shared"
    folder.mkdir()
    return folder / "table"


@pytest.fixture
def start(path):
    """Starts processes apart, with the table in common; they are killed in the end."""
    with ExitStack() as stack:

        def start(**settings):
            common = {"TOKENGUARD_TABLE": path, "TOKENGUARD_BUCKETS": BUCKETS}
            return stack.enter_context(Apart(**{**common, **settings}))

        yield start


@contextmanager
def opened(path, state=None, buckets=BUCKETS):
    """Open a table as a process does, and stop."""
    backend = MemoryBackend(*open_node(buckets, path, state))
    try:
        yield backend
    finally:
        backend.close()


def leave(path, *budgets, state=None, buckets=BUCKETS):
    """Have a process make a table, set budgets, take one token of each, and be killed; return the identity."""

    def work():
        backend = MemoryBackend(*open_node(buckets, path, state))
        for budget in budgets:
            backend.put(budget, None, NOW_US)
            take(backend, budget, 1)
        return backend.table.identity

    with Worker(work) as worker:
        worker.go()
        return worker.answer()


def take(backend, budget, tokens):
    backend.settle(backend.prepare([budget]), (tokens,), NOW_US)


def levels(backend, *budgets):
    outcome = backend.peek(backend.prepare(budgets), NOW_US)
    return [outcome.level(i) for i in range(len(outcome))]


def refusal(path, buckets=BUCKETS, state=None):
    """Return what opening a table is refused with."""
    with pytest.raises(InvalidSetting) as caught:
        open_node(buckets, path, state)
    said = str(caught.value)
    del caught
    gc.collect()  # the lock goes with the mapping, and that with the frames of the error
    return said


# --- started apart --------------------------------------------------------------------------------------------


def test_processes_share_buckets_exactly(start):
    """Of a grant, as much is given out by all processes together as there is, to the token."""
    processes = [start() for _ in range(3)]
    for process in processes:
        process.begin("spend", "alice", 3, 200)

    allowed = [process.end() for process in processes]

    assert sum(allowed) == 1000 // 3
    assert [process.level("alice") for process in processes] == [1] * 3
    assert not processes[0].reserve("alice", 2)
    assert processes[2].reserve("alice", 1)


def test_budget_set_by_one_process_binds_the_next_call_in_another(start):
    """A budget that is set, lowered or removed in one process holds for the very next reserve elsewhere."""
    one, other = start(), start()
    assert other.reserve("alice", 300)

    one.put("user:alice", 500)
    assert (other.reserve("alice", 201), other.reserve("alice", 150)) == (False, True)
    one.put("user:alice", 460)
    assert (other.reserve("alice", 11), other.reserve("alice", 10)) == (False, True)
    one.put("global", 7)
    assert (other.reserve("bob", 8), other.reserve("bob", 7)) == (True, False)
    other.drop("global")
    one.put("user:alice", 100, 60)

    assert one.budgets() == other.budgets() == {"user:alice": 100}
    assert one.level("alice") == other.level("alice") == 60


def test_processes_that_race_to_be_the_first_share_one_table(start, path):
    """However many come at once to a file that is not there, one makes the table and all have it."""
    processes = [start() for _ in range(8)]

    assert len({process.identity() for process in processes}) == 1
    assert path.stat().st_size == region_bytes(BUCKETS)
    processes[0].put("user:alice", 10)
    assert all(process.budgets() == {"user:alice": 10} for process in processes)


def test_one_process_is_the_first(path):
    """However often processes race for a file, one makes the table, or else they would overwrite each other's."""

    def come(number):
        budget = Budget(named(f"team:{number}"), grant(1 + number))
        backend = MemoryBackend(*open_node(BUCKETS, path))
        backend.put(budget)
        take(backend, ALICE, 1)
        return backend.table.identity

    for _ in range(10):
        assert len(set(crew(come, 4))) == 1
        with opened(path) as backend:
            assert len(backend.budgets()) == 4
            assert levels(backend, ALICE) == [6]
        path.unlink()


def test_process_with_another_size_is_refused(start, path):
    """Who asks for more buckets, or fewer, than the node has is told so; those that run are not disturbed."""
    running = start()
    running.put("user:alice", 10)

    for buckets in (1, BUCKETS - 1, BUCKETS + 1, 100 * BUCKETS):
        said = refusal(path, buckets)
        assert said.startswith(f"TOKENGUARD_TABLE: {path} is used by others, and it h")
        assert "give all processes of a node the same settings" in said

    assert running.budgets() == {"user:alice": 10}
    assert running.reserve("alice", 10)
    with opened(path) as backend:
        assert backend.budgets() == [Budget(ALICE.name, grant(10))]


def test_process_goes_on_when_the_first_is_killed(start):
    """The table is everybody's: who made it is not needed any more, and those that come later find it."""
    first, second = start(), start()
    first.put("user:alice", 100)
    first.reserve("alice", 30)
    first.kill()

    assert second.reserve("alice", 30)
    third = start()
    assert third.level("alice") == 40
    assert third.identity() == second.identity()


def test_table_is_gone_on_with_when_all_were_killed(start):
    """What nobody has any more is still there for who comes next."""
    first = start()
    first.put("user:alice", 100)
    first.reserve("alice", 30)
    identity = first.identity()
    first.kill()

    next_ = start()

    assert next_.identity() == identity
    assert (next_.budgets(), next_.level("alice")) == ({"user:alice": 100}, 70)


# --- left behind ----------------------------------------------------------------------------------------------


def test_table_that_others_left_keeps_budgets_and_levels(path, caplog):
    """A file of the same start of the machine, layout and size is gone on with, without a word."""
    identity = leave(path, ALICE, BOB)

    with opened(path) as backend:
        assert backend.table.identity == identity
        assert backend.budgets() == [ALICE, BOB]
        assert levels(backend, ALICE, BOB) == [9, 19]
    assert caplog.messages == []


def test_what_others_knew_of_the_provider_is_forgotten(path):
    """It is of calls that are no more, and who comes next may ask another provider; whoever joins him knows it."""

    def know():
        with opened(path) as one, opened(path) as other:
            return [backend.table.shared(b"a number").add(3, 64) for backend in (one, other)]

    known = []
    for _ in range(2):
        with Worker(know) as worker:
            worker.go()
            known.append(worker.answer())

    assert known == [[64, 128]] * 2


def header(path, **fields):
    """Write other values into a file's header."""
    offsets = {"magic": 0, "layout": 8, "mark": 16}
    with path.open("r+b") as file:
        for name, value in fields.items():
            file.seek(offsets[name])
            file.write(value)


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda path: header(path, mark=b"another start of the machine".ljust(64, b"\0")), "another mark"),
        (lambda path: header(path, layout=b"\x05"), "its layout is another version's"),
        (lambda path: os.truncate(path, region_bytes(BUCKETS) - 1), "it is of another size"),
        (lambda path: os.truncate(path, 8), "it is of another size"),
    ],
)
def test_table_that_cannot_be_trusted_is_made_anew(spoil, why, path, caplog):
    """A file of another start of the machine, of another layout or cut short is no table, and the log says why."""
    identity = leave(path, ALICE)
    spoil(path)

    with opened(path) as backend:
        assert backend.table.identity != identity
        assert backend.budgets() == []
        assert levels(backend, ALICE) == [10]
    (said,) = (record for record in caplog.records if record.name == "tokenguard")
    assert said.levelname == "WARNING"
    assert f"the table in {path} is made anew, for " in said.getMessage()
    assert why in said.getMessage()
    assert path.stat().st_size == region_bytes(BUCKETS)


@pytest.mark.skipif(not BOOT.exists(), reason="this system does not tell its starts apart")
def test_table_is_marked_by_the_start_of_the_machine(path):
    """After the machine has started anew, a file that outlived that is no table."""
    leave(path)

    assert Header(*HEADER.unpack(path.read_bytes()[: HEADER.size])).mark.rstrip(b"\0") == BOOT.read_bytes().strip()


@pytest.mark.parametrize("buckets", [BUCKETS // 2, 2 * BUCKETS])
def test_table_of_another_size_is_made_anew_once_nobody_has_it(buckets, path, caplog):
    """The number of buckets may change between two starts: the table is then a new one, and the log says so."""
    identity = leave(path, ALICE)

    with opened(path, buckets=buckets) as backend:
        assert backend.table.identity != identity
        assert backend.table.stats()["buckets"] == buckets
        assert backend.budgets() == []
    assert "is made anew" in caplog.text
    assert path.stat().st_size == region_bytes(buckets)


@pytest.mark.parametrize("content", [b"capacity: 10\n", b"x", b"TGSTATE\n" + bytes(100), b"\0\0\0", b"TGTABLE"])
def test_foreign_file_is_refused(content, path):
    """What is no table is left as it is."""
    path.write_bytes(content)

    assert f"{path} is no table, and is left as it is: name a file that is not there yet" in refusal(path)

    assert path.read_bytes() == content


def test_symlink_is_refused(path):
    """Nobody can have the table lead to somebody else's file."""
    target = path.with_name("target")
    target.write_bytes(b"")
    path.symlink_to(target)

    assert f"{path} cannot be opened: " in refusal(path)

    assert target.read_bytes() == b""


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
def test_what_is_no_file_is_refused(make, path):
    """A folder or a pipe is no place for a table, and nobody waits for what never comes."""
    make(path)

    assert str(path) in refusal(path)


def test_folder_that_is_not_there_is_named(tmp_path):
    """A file in a folder that is missing is an error that names it."""
    path = tmp_path / "nowhere" / "table"

    assert f"{path} cannot be made: there is no folder {path.parent}" in refusal(path)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_table_of_another_user_is_refused(path):
    """Who could have put anything into a file is not trusted with it."""
    leave(path, ALICE)
    os.chown(path, 65534, -1)

    assert f"{path} belongs to another user" in refusal(path)


def test_table_is_its_owners(path):
    """Nobody else may read or change the node's buckets."""
    leave(path)

    assert path.stat().st_mode & 0o777 == 0o600


# --- killed while it was made ---------------------------------------------------------------------------------


@pytest.mark.parametrize("point", ["before", "after"])
def test_table_is_made_by_the_next_if_the_first_is_killed(point, path):
    """Whoever waits for a table, or comes later, makes it if who was about to make it is no more."""

    def die_making(_left, new):
        if point == "after":
            new(None)
        os.kill(os.getpid(), signal.SIGKILL)

    killed(lambda: open_table(path, BUCKETS, die_making))

    with opened(path) as backend:
        backend.put(ALICE)
        assert backend.budgets() == [ALICE]


def nothing(_path):
    """Leave the file as whoever only opened it."""


def part(path):
    """Leave a part of the zeros that a table is made of."""
    path.write_bytes(bytes(region_bytes(BUCKETS) // 3))


def zeros(path):
    """Leave all of them."""
    path.write_bytes(bytes(region_bytes(BUCKETS)))


def all_but_the_magic(path):
    """Leave a table but for what is written last, with something in every place."""
    path.unlink()
    leave(path, ALICE, BOB)
    header(path, magic=bytes(8))


@pytest.mark.parametrize("left", [nothing, part, zeros, all_but_the_magic])
def test_table_that_was_half_made_is_made(left, path, caplog):
    """Whatever who was killed had written by then, the next begins with zeros, and there is nothing to warn of."""
    path.touch()
    left(path)

    with opened(path) as backend:
        assert backend.budgets() == []
        assert backend.table.stats()["used"] == 0
        assert path.read_bytes()[:8] == b"TGTABLE\n"
    assert caplog.messages == []


def test_many_come_while_the_first_is_killed_making_it(path):
    """Of those that wait for a table which is never finished, one makes it, and all have the same."""
    gate, opener = os.pipe()
    made, say_made = os.pipe()

    def make(_left, new):
        new(None)
        os.write(say_made, b"!")
        os.read(gate, 1)

    def come(_number):
        backend = MemoryBackend(*open_node(BUCKETS, path))
        return backend.table.identity, len(backend.budgets())

    with Worker(lambda: open_table(path, BUCKETS, make)) as first:
        first.go()
        assert os.read(made, 1) == b"!"
        header(path, magic=bytes(8))
        with ExitStack() as stack:
            waiting = [stack.enter_context(Worker(lambda: come(0))) for _ in range(4)]
            for worker in waiting:
                worker.go()
            os.kill(first.pid, signal.SIGKILL)
            first.wait()
            came = Counter(worker.answer() for worker in waiting)
    for end in (gate, opener, made, say_made):
        os.close(end)

    assert [count for _, count in came.items()] == [4]


# --- room -----------------------------------------------------------------------------------------------------


@pytest.fixture(params=[MountedDisk, LimitedDisk])
def disk(request, tmp_path):
    """Does work on a disk of a size, in a process of its own: a real one, and where no file may grow further."""
    if request.param is MountedDisk and not can_mount():
        pytest.skip("this user may not mount: files that may not grow stand for a full disk")
    return lambda kilobytes, work: on_disk(request.param, tmp_path / "disk", kilobytes, work)


def test_table_without_room_names_the_setting(disk):
    """A table for which there is no room is refused at the start, with its size, and takes up none of it."""

    def work(disk):
        path = disk.folder / "table"

        said = refusal(path, DEFAULT_BUCKETS)

        assert said.startswith("TOKENGUARD_TABLE: 500000 buckets take 51 MiB, for which ")
        assert f"{disk.folder} has no room" in said
        assert "lower TOKENGUARD_BUCKETS" in said
        assert path.stat().st_blocks == 0
        with opened(path, buckets=100_000) as backend:
            assert backend.table.stats()["buckets"] == 100_000

    disk(32 * 1024, work)


def test_table_that_was_left_is_not_lost_for_want_of_room(disk):
    """A table of another size for which there is no room leaves nothing that takes up room."""

    def work(disk):
        path = disk.folder / "table"
        killed(lambda: (open_node(100_000, path), os.kill(os.getpid(), signal.SIGKILL)))

        refusal(path, DEFAULT_BUCKETS)

        assert path.stat().st_blocks == 0

    disk(32 * 1024, work)


@pytest.mark.skipif(not can_mount(), reason="this user may not mount")
def test_every_bucket_of_a_table_can_be_filled(tmp_path):
    """Once a table was had, all of it is there: no page is wanting when it is used, though the disk is full."""

    def work(disk):
        node = open_node(DEFAULT_BUCKETS, disk.folder / "table")
        disk.fill()
        table = node.table
        for first in range(0, DEFAULT_BUCKETS, MAX_PLAN):
            keys = range(first, min(first + MAX_PLAN, DEFAULT_BUCKETS))
            handle = table.prepare((b"%d" % key, ALICE.scale) for key in keys)
            assert table.reserve(handle, (1,) * len(handle), NOW_US).allowed
        for _ in range(2):
            table.rewrite(bytes(table.log_room))
            table.rewrite(b"")
        tally = table.tally(b"x")
        for row in range(MAX_ROWS):
            table.hold_row(row, os.getpid(), 0)
            tally.add(1)
        return table.stats()["used"], sum(table.tallies()[b"x"])

    assert on_disk(MountedDisk, tmp_path / "disk", 64 * 1024, work) == (DEFAULT_BUCKETS, MAX_ROWS)


# --- with a state ---------------------------------------------------------------------------------------------


@pytest.fixture
def state(path):
    """Where a state may be kept beside the table."""
    return path.with_name("state")


def test_processes_share_a_state(start, state):
    """Whoever sets a budget, it is in the state, and so is what all of them spent; the lock ends with the last."""
    settings = {"TOKENGUARD_STATE": state}
    one, other = start(**settings), start(**settings)
    one.put("user:alice", 100)
    other.put("user:bob", 50)
    one.reserve("alice", 30)
    one.stop()
    assert state.with_name("state.lock").exists()
    other.reserve("bob", 20)
    other.stop()
    assert not state.with_name("state.lock").exists()

    state.with_name("table").unlink()
    next_ = start(**settings)

    assert next_.budgets() == {"user:alice": 100, "user:bob": 50}
    assert (next_.level("alice"), next_.level("bob")) == (70, 30)


def test_another_node_is_kept_from_the_state(start, path, state):
    """A process with a table of its own, or none, cannot have the state of a node that runs."""
    running = start(TOKENGUARD_STATE=state)
    running.put("user:alice", 100)

    said = start(TOKENGUARD_TABLE=path.with_name("another"), TOKENGUARD_STATE=state).refusal()

    assert "by another server that runs" in said
    with pytest.raises(InvalidSetting, match="by another server that runs"):
        open_node(BUCKETS, None, state)
    running.put("user:bob", 100)
    assert running.budgets() == {"user:alice": 100, "user:bob": 100}


def end_suddenly(path, state):
    """Set two budgets, spend 4 of the first, and end without another save; return the identity, and a backup."""

    def work():
        backend = MemoryBackend(*open_node(BUCKETS, path, state))
        backend.put(ALICE, None, NOW_US)
        backup = state.read_bytes()
        backend.put(BOB, None, NOW_US)
        take(backend, ALICE, 4)
        return backend.table.identity, backup

    with Worker(work) as worker:
        worker.go()
        return worker.answer()


def test_table_that_was_left_is_newer_than_its_state(path, state):
    """What the table has is what holds, where the state is the last that was saved of it."""
    identity, _ = end_suddenly(path, state)

    with opened(path, state) as backend:
        assert backend.table.identity == identity
        assert backend.budgets() == [ALICE, BOB]
        assert levels(backend, ALICE) == [6]


def test_backup_of_the_same_table_is_what_holds(path, state):
    """A state that is older than the last one saved was put there by somebody, who means it."""
    identity, backup = end_suddenly(path, state)
    state.write_bytes(backup)

    with opened(path, state) as backend:
        assert backend.table.identity != identity
        assert backend.budgets() == [ALICE]
        assert levels(backend, ALICE) == [10]


def test_state_of_another_table_is_what_holds(path, state, tmp_path):
    """A backup that was put in the state's place counts, and the table that was left is made anew from it."""
    backup = tmp_path / "backup"
    leave(None, BOB, state=backup)
    identity = leave(path, ALICE, state=state)
    backup.replace(state)

    with opened(path, state) as backend:
        assert backend.table.identity != identity
        assert backend.budgets() == [BOB]
        assert levels(backend, ALICE, BOB) == [10, 20]


def test_table_that_was_left_makes_the_state_that_is_missing(path, state):
    """Where a state is kept for the first time, or was moved away, the table that was left is gone on with."""
    identity = leave(path, ALICE)

    with opened(path, state) as backend:
        assert backend.table.identity == identity
        assert backend.budgets() == [ALICE]
    path.unlink()
    with opened(path, state) as backend:
        assert backend.budgets() == [ALICE]
        assert levels(backend, ALICE) == [9]


def test_state_that_is_refused_leaves_the_table_alone(path, state):
    """A start that fails for its state changes nothing of a table that was left."""
    identity = leave(path, ALICE)
    state.write_bytes(b"something else")

    assert "it is no state of TokenGuard's" in refusal(path, state=state)

    with opened(path) as backend:
        assert backend.table.identity == identity
        assert backend.budgets() == [ALICE]


def test_process_cannot_begin_a_state_that_the_node_does_not_keep(start, path, state):
    """A process that has a state set, of a node that has none, does not write over what is in it."""
    leave(None, BOB, state=state)
    state.with_name("state.lock").unlink()
    kept = state.read_bytes()
    running = start()
    running.put("user:alice", 10)

    assert "TOKENGUARD_STATE" in refusal(path, state=state)

    assert state.read_bytes() == kept
    assert running.budgets() == {"user:alice": 10}


def test_start_writes_the_budgets_that_hold(path, state):
    """Of a table in which budgets were set over and over, the state has each once, and needs no more room."""
    again = Budget(ALICE.name, grant(9))
    leave(path, ALICE, BOB, Budget(ALICE.name, grant(8)), again)

    leave(path, state=state)

    assert list(read_records(_decoded(state.read_bytes()).budgets)) == [again, BOB]
