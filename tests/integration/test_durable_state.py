"""What is on the disk when processes are killed at any moment, and what becomes of it when the disk refuses."""

import os
import random
import select
import signal
import time
from contextlib import ExitStack
from functools import partial
from operator import methodcaller

import pytest

from tests.crew import Worker
from tests.disks import LimitedDisk, MountedDisk, can_mount, killed, on_disk
from tests.house import NOW_US, S, grant, named
from tests.nodes import until
from tokenguard._bucket import BucketTable
from tokenguard.backends import state as states
from tokenguard.backends.memory import MemoryBackend
from tokenguard.backends.node import open_node
from tokenguard.errors import InvalidSetting, StateUnwritable
from tokenguard.model import Budget

BUCKETS = 64
ALICE = Budget(named("user:alice"), grant(1000))
BOB = Budget(named("user:bob"), grant(20))


def opened(state, table=None):
    return MemoryBackend(*open_node(BUCKETS, table, state))


def on_the_disk(path):
    """Return what a file holds: a table with its buckets, and the records of its budgets."""
    saved = states._decoded(path.read_bytes())
    table = BucketTable(BUCKETS, seed=saved.seed)
    table.load(saved.buckets)
    table.rewrite(saved.budgets)
    return MemoryBackend(table)


def level(backend, budget, now_us=NOW_US):
    return backend.peek(backend.prepare([budget]), now_us).level(0)


def take(backend, budget, tokens, now_us=NOW_US):
    return backend.reserve(backend.prepare([budget]), (tokens,), now_us).allowed


# --- killed while budgets are set -----------------------------------------------------------------------------


def changes(seed, team, begun):
    """Yield changes of a team's budgets, always the same for a seed: a name, and its scale or None.

    Args:
        seed: Of the changes.
        team: A part of all names.
        begun: The budgets that there are to begin with.
    """
    rng, there = random.Random(seed), set(begun)
    for number in range(1, 1_000_000):
        name = named(f"team:{team}-{rng.randrange(5)}")
        gone = name in there and rng.random() < 0.25
        (there.discard if gone else there.add)(name)
        yield name, None if gone else grant(1000 * seed + number)


def after(seed, team, begun, count):
    """Return what budgets there are after some changes."""
    budgets = dict(begun)
    for (name, scale), _ in zip(changes(seed, team, begun), range(count), strict=False):
        budgets.pop(name, None)
        budgets.update({name: scale} if scale else {})
    return budgets


def change_on(open_backend, seed, team, begun, told):
    """Make changes one after the other, and say of each that it is made."""
    backend = open_backend()
    backend.open()
    for name, scale in changes(seed, team, begun):
        if scale is None:
            backend.drop(name, None)
        else:
            backend.put(Budget(name, scale))
        os.write(told, b"!")


class Changer:
    """A process that makes changes until it is killed.

    Attributes:
        made: Of how many it said that they are made; known once it is dead.
    """

    def __init__(self, open_backend, seed, team, begun):
        self._seed, self._team, self._begun = seed, team, begun
        self._told, telling = os.pipe()
        self._worker = Worker(partial(change_on, open_backend, seed, team, begun, telling))
        os.close(telling)
        self.made = 0

    def __enter__(self):
        self._worker.__enter__()
        return self

    def __exit__(self, *error):
        self._worker.__exit__(*error)
        os.close(self._told)

    def go(self):
        self._worker.go()

    def listen_for(self, seconds):
        """Hear of the first change, and then of more for a while."""
        until_s = None
        while until_s is None or time.monotonic() < until_s:
            left_s = 20 if until_s is None else max(0, until_s - time.monotonic())
            if select.select([self._told], [], [], left_s)[0]:
                self.made += len(os.read(self._told, 1))
                until_s = until_s or time.monotonic() + seconds
            else:
                assert until_s, "nothing was changed"

    def kill(self):
        os.kill(self._worker.pid, signal.SIGKILL)

    def bury(self):
        """Wait for its end, and hear what it said until then."""
        assert self._worker.wait() == -signal.SIGKILL
        while more := os.read(self._told, 4096):
            self.made += len(more)

    def may_be(self):
        """Return what its budgets may be: of what it was about to change, nobody can know."""
        return [after(self._seed, self._team, self._begun, self.made + more) for more in (0, 1)]


def of(budgets, team):
    """Return a team's budgets."""
    return {name: scale for name, scale in budgets.items() if name.scope.id.startswith(f"{team}-")}


def found(open_backend):
    """Return the budgets that there are after a start, by name."""

    def work():
        return dict(open_backend().budgets())

    with Worker(work) as worker:
        worker.go()
        return worker.answer()


def test_budget_that_was_acknowledged_outlives_kill_9(tmp_path):
    """Killed at any moment, a process leaves every change that it told of, exactly, and at most one more."""
    rng, there, made = random.Random(9), {}, 0
    open_backend = partial(opened, tmp_path / "state")
    for seed in range(20):
        with Changer(open_backend, seed, "red", there) as changer:
            changer.go()
            changer.listen_for(rng.random() * 0.03)
            changer.kill()
            changer.bury()

        there = found(open_backend)
        assert there in changer.may_be(), f"round {seed}, after {changer.made} changes"
        made += changer.made
    assert made > 20


def test_budgets_outlive_kill_9_of_all_who_share_a_table(tmp_path):
    """Killed all at once, processes leave what each told of: in the table, and without it, on the disk alone."""
    rng, there = random.Random(10), {}
    table = tmp_path / "table"
    open_backend = partial(opened, tmp_path / "state", table)
    teams = ("red", "green", "blue")
    for seed in range(8):
        with ExitStack() as stack:
            changers = [stack.enter_context(Changer(open_backend, seed, team, of(there, team))) for team in teams]
            for changer in changers:
                changer.go()
            for changer in changers:
                changer.listen_for(rng.random() * 0.03)
            for changer in changers:
                changer.kill()
            for changer in changers:
                changer.bury()

        if seed % 2:
            table.unlink()  # the machine starts anew
        there = found(open_backend)
        for team, changer in zip(teams, changers, strict=True):
            assert of(there, team) in changer.may_be(), f"round {seed}, {team}, after {changer.made} changes"


def test_budgets_outlive_kill_9_of_one_of_those_who_share_a_table(tmp_path):
    """Killed in the middle of a change, a process keeps nobody from changing budgets, and undoes nobody's."""
    rng, there = random.Random(11), {}
    open_backend = partial(opened, tmp_path / "state", tmp_path / "table")
    for seed in range(5):
        with (
            Changer(open_backend, seed, "red", of(there, "red")) as goes,
            Changer(open_backend, seed, "green", of(there, "green")) as stays,
        ):
            for changer in (goes, stays):
                changer.go()
                changer.listen_for(rng.random() * 0.02)
            goes.kill()
            goes.bury()
            stays.listen_for(0.01)
            stays.kill()
            stays.bury()

        there = found(open_backend)
        assert of(there, "red") in goes.may_be(), f"round {seed}"
        assert of(there, "green") in stays.may_be(), f"round {seed}"


# --- levels ---------------------------------------------------------------------------------------------------


def test_levels_follow_by_themselves(tmp_path):
    """What was spent is on the disk soon, without any budget being set, and a start goes on from just there."""
    path = tmp_path / "state"
    now_us = time.time_ns() // 1000
    slow = Budget(named("user:slow"), grant(10**6, 10))

    def spend_and_die():
        backend = opened(path)
        backend.open()
        for spent in (300, 200):
            assert take(backend, ALICE, spent)
            assert take(backend, slow, spent, now_us)
            left = level(backend, ALICE)
            until(lambda left=left: level(on_the_disk(path), ALICE) == left, "what was spent is not saved")
        stored = [backend.table.state(budget.name.key) for budget in (ALICE, slow)]
        assert [on_the_disk(path).table.state(budget.name.key) for budget in (ALICE, slow)] == stored
        os.kill(os.getpid(), signal.SIGKILL)

    killed(spend_and_die)

    backend = opened(path)
    assert level(backend, ALICE) == 500
    assert level(backend, slow, now_us + 7 * S) == 10**6 - 500 + 70
    backend.close()


def test_idle_server_does_not_write(tmp_path):
    """Once all is saved, and nothing is spent, the disk is left alone."""
    path = tmp_path / "state"
    backend = opened(path)
    backend.open()
    assert take(backend, ALICE, 1)
    until(lambda: level(on_the_disk(path), ALICE) == 999, "what was spent is not saved")
    until(lambda: backend._keeper._saved_turn == backend.table.turn, "the keeper does not come to rest")
    written = path.stat().st_ino, path.stat().st_mtime_ns

    backend.peek(backend.prepare([ALICE]))
    backend._keeper._look_after_state(at_once=True)
    backend.close()

    assert (path.stat().st_ino, path.stat().st_mtime_ns) == written


# --- a disk that refuses --------------------------------------------------------------------------------------


@pytest.fixture(params=[MountedDisk, LimitedDisk])
def disk(request, tmp_path):
    """Does work on a small disk, in a process of its own: a real one, and where no file may grow any more."""
    if request.param is MountedDisk and not can_mount():
        pytest.skip("this user may not mount: files that may not grow stand for a full disk")
    return lambda work: on_disk(request.param, tmp_path / "disk", 256, work)


@pytest.fixture(params=[("fill", "clear"), ("freeze", "thaw")], ids=["full", "read-only"])
def refusing(request):
    """Has a disk refuse to be written, and no longer: it is full, or read-only."""
    return [methodcaller(name) for name in request.param]


def picture(backend):
    """Return all that a change of a budget could change."""
    return backend.budgets(), level(backend, ALICE), backend.epoch, backend.table.changes(0)[2]


def test_server_goes_on_while_the_disk_refuses(disk, refusing):
    """A disk that refuses lets no budget be changed, but calls go on; it is told, and made good for afterwards."""
    refuse, allow = refusing

    def work(disk):
        path = disk.folder / "state"
        backend = opened(path)
        backend.open()
        backend.put(ALICE, 900, NOW_US)
        until(lambda: backend._keeper._saved_turn == backend.table.turn, "the keeper does not come to rest")
        before, kept = picture(backend), path.read_bytes()
        refuse(disk)

        for change in (
            lambda: backend.put(BOB, None, NOW_US),
            lambda: backend.put(Budget(ALICE.name, grant(5)), 1, NOW_US),
            lambda: backend.drop(ALICE.name, None, NOW_US),
        ):
            with pytest.raises(StateUnwritable, match=f"the state cannot be written to {path}: "):
                change()
            assert picture(backend) == before
        assert path.read_bytes() == kept
        assert not path.with_name("state.new").exists()
        assert f"the state cannot be written to {path}: " in backend.trouble()
        assert take(backend, ALICE, 100)

        allow(disk)
        until(lambda: backend.trouble() is None, "the disk is back, and nobody notices")
        until(lambda: level(on_the_disk(path), ALICE) == 800, "what was spent is not saved")
        backend.put(BOB, None, NOW_US)
        assert on_the_disk(path).budgets() == [ALICE, BOB]
        backend.close()

    disk(work)


def test_start_goes_on_from_what_was_there_before_the_disk_refused(disk, refusing):
    """A server that is killed while the disk refuses leaves the last state that could be written, whole."""
    refuse, allow = refusing

    def work(disk):
        path = disk.folder / "state"

        def serve_and_die():
            backend = opened(path)
            backend.put(ALICE, 900, NOW_US)
            refuse(disk)
            assert take(backend, ALICE, 100)
            with pytest.raises(StateUnwritable):
                backend.put(BOB)
            os.kill(os.getpid(), signal.SIGKILL)

        killed(serve_and_die)
        allow(disk)

        backend = opened(path)
        assert backend.budgets() == [ALICE]
        assert level(backend, ALICE) == 900
        backend.put(BOB)
        backend.close()

    disk(work)


def test_start_on_a_disk_that_refuses_is_refused(disk, refusing):
    """A state that cannot be written is an error at the start, whether there is one or not; it stays as it is."""
    refuse, allow = refusing

    def work(disk):
        path = disk.folder / "state"
        refuse(disk)
        with pytest.raises(InvalidSetting, match=f"TOKENGUARD_STATE: the state cannot be .* {path}: "):
            opened(path)
        allow(disk)
        backend = opened(path)
        backend.put(ALICE, 900, NOW_US)
        backend.close()
        kept = path.read_bytes()
        refuse(disk)

        with pytest.raises(InvalidSetting, match=f"TOKENGUARD_STATE: the state cannot be .* {path}: "):
            opened(path)

        assert path.read_bytes() == kept
        allow(disk)
        backend = opened(path)
        assert backend.budgets() == [ALICE]
        backend.close()

    disk(work)
