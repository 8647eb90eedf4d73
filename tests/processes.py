"""Processes as the kernel shows them."""

from __future__ import annotations

import os
import signal
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.nodes import until

_PROC = Path("/proc")


def is_there(pid):
    """Return whether a process has not ended."""
    return _stat(pid)[0] not in "ZX"


def children_of(pid):
    """Return the processes that a process has started, and that have not ended."""
    return _those(lambda stat: int(stat[1]) == pid)


def group_of(leader):
    """Return the processes of a group that have not ended."""
    return _those(lambda stat: int(stat[2]) == leader)


def has_loaded(pid, part):
    """Return whether a process has a file open to run, by a part of its path."""
    with suppress(OSError):
        return part in (_PROC / str(pid) / "maps").read_text()
    return False


def until_gone(pids):
    """Wait until none of some processes is there."""
    until(lambda: not any(map(is_there, pids)), f"not all of {pids} end")


@contextmanager
def stopped(pids):
    """Have processes stand still."""
    try:
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        until(lambda: all(_stat(pid)[0] == "T" for pid in pids), f"not all of {pids} stop")
        yield
    finally:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def _those(wanted):
    pids = [int(folder.name) for folder in _PROC.iterdir() if folder.name.isdigit()]
    return sorted(pid for pid in pids if is_there(pid) and wanted(_stat(pid)))


def _stat(pid):
    """Return a process's state, its parent, its group and so on; what tells that it has ended if it is gone."""
    with suppress(OSError):
        return (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    return ["X", "0", "0"]
