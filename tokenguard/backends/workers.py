"""The processes that share a table: each counts in a row of its own, and some that should share it may not.

A row is its process's for as long as that lives. What a dead one counted stays: the next to take its row goes on
from there, but begins what is a state rather than a count, such as calls in flight, at 0.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tokenguard._bucket import BucketTable

STATES = (
    b"calls_in_flight",
    b"reservations_open",
    b"redis_lanes_down",
    b"redis_owed_buckets",
)
"""The tallies that tell how things are with a process now, and end with it."""

ALIKE = b"provider_others_tokens_per_minute", b"provider_others_requests_per_minute"
"""Those in which all processes tell the same thing, as far as they know of it: the most counts."""

TELLS = b"provider_others_told\x1f"
"""How those begin that have what each process tells of a limit; they are states too."""

_PROC = Path("/proc")
_LISTENING = {"tcp": ("0A", 9), "tcp6": ("0A", 9), "unix": ("00010000", 6)}
"""For each kind of socket, how the kernel says that it listens, and which field of its line is the inode."""

_joined: weakref.WeakSet[BucketTable] = weakref.WeakSet()


@contextmanager
def changing(table: BucketTable) -> Iterator[None]:
    """Be the only one, of all threads and processes, who changes budgets or the state on disk.

    Raises:
        TableBusy: Somebody else was for over ten seconds.
    """
    table.lock_changes()
    try:
        yield
    finally:
        table.unlock_changes()


def join(table: BucketTable) -> None:
    """Count in a row of this process's own from now on, and have processes forked off it do likewise.

    If all are taken, it counts in the first, whose process may then be shown to be busier than it is.
    """
    with changing(table):
        rows = table.rows()
        if any(_lives(pid, began) and pid == os.getpid() for pid, began in rows):
            return
        free = (row for row, (pid, began) in enumerate(rows) if not _lives(pid, began))
        if (row := next(free, None)) is not None:
            told = [name for name in table.tallies() if name.startswith(TELLS)]
            table.hold_row(row, os.getpid(), _began(os.getpid()) or 0, (*STATES, *ALIKE, *told))
    _joined.add(table)


def leave(table: BucketTable) -> None:
    """Give this process's row up."""
    with changing(table):
        for row, (pid, _) in enumerate(table.rows()):
            if pid == os.getpid():
                table.hold_row(row, 0, 0)


def living(table: BucketTable) -> dict[int, int]:
    """Return the rows whose processes live, and their process ids."""
    return {row: pid for row, (pid, began) in enumerate(table.rows()) if _lives(pid, began)}


def counted(table: BucketTable) -> dict[bytes, int]:
    """Return what all processes counted, and how things are with those that live."""
    alive = set(living(table))
    if table.rows()[0] == (0, 0):
        alive.add(0)  # whoever did not join counts there
    told = {}
    for name, rows in table.tallies().items():
        now = [rows[row] for row in alive]
        told[name] = max(now, default=0) if name in ALIKE else sum(now if name in STATES else rows)
    return told


def unshared(table: BucketTable) -> list[int]:
    """Return the processes that serve the same socket as this one, but do not share its table.

    They are found among the children of the same parent, by the sockets that both listen to; where there is no
    ``/proc``, nobody is found.
    """
    with suppress(OSError):
        mine = _sockets(os.getpid()) & set(_listeners())
        sharing = {os.getpid(), *(pid for pid, _ in table.rows())}
        siblings = (pid for pid in _children_of(os.getppid()) if pid not in sharing)
        return [pid for pid in siblings if mine and _guards(pid) and mine & _sockets(pid)]
    return []


def _guards(pid: int) -> bool:
    """Return whether a process has loaded TokenGuard."""
    with suppress(OSError):
        return "tokenguard/_bucket." in (_PROC / str(pid) / "maps").read_text()
    return False


def _lives(pid: int, began: int) -> bool:
    return pid != 0 and _began(pid) == began


def _began(pid: int) -> int | None:
    """Return when a process began, in the kernel's ticks; 0 where that cannot be told; None if it is no more."""
    try:
        fields = _stat(pid)
    except OSError:
        return None if (_PROC / "self").exists() or not _answers(pid) else 0
    return None if fields[0] in "ZX" else int(fields[19])


def _answers(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _stat(pid: int) -> list[str]:
    """Return what the kernel tells of a process: its state, its parent, and so on."""
    return (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()


def _children_of(parent: int) -> Iterator[int]:
    for folder in _PROC.iterdir():
        if folder.name.isdigit():
            with suppress(OSError):  # it may have ended meanwhile
                if int(_stat(int(folder.name))[1]) == parent:
                    yield int(folder.name)


def _sockets(pid: int) -> set[str]:
    """Return the sockets that a process has open, by inode."""
    found = set()
    for link in (_PROC / str(pid) / "fd").iterdir():
        with suppress(OSError):
            target = str(link.readlink())
            if target.startswith("socket:["):
                found.add(target[8:-1])
    return found


def _listeners() -> Iterator[str]:
    """Yield the sockets that connections come in by, likewise."""
    for kind, (listens, inode) in _LISTENING.items():
        with suppress(OSError):
            for line in (_PROC / "net" / kind).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == listens:
                    yield fields[inode]


def _after_fork() -> None:
    for table in list(_joined):
        join(table)


os.register_at_fork(after_in_child=_after_fork)
