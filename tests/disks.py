"""Small disks that can be filled and frozen, each in a process of its own.

``MountedDisk`` is a real file system, in a mount namespace that ends with its process: of root's, or where the
kernel lets anybody have one, of a user's who is root in there. ``LimitedDisk`` needs no rights: no file of its
process may be longer than is said. What it cannot do is to run out of room for a page of a mapped file.
"""

from __future__ import annotations

import ctypes
import errno
import faulthandler
import os
import resource
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from tests.crew import Worker
from tests.nodes import until

_THREADS = Path("/proc/self/task")
_NEW_MOUNTS, _NEW_USER = 0x00020000, 0x10000000
_READ_ONLY, _REMOUNT, _BIND, _RECURSIVE, _PRIVATE = 1, 32, 4096, 16384, 1 << 18


class Disk(Protocol):
    """A disk, mounted on a folder."""

    folder: Path

    def fill(self) -> None:
        """Leave no room for anything."""

    def clear(self) -> None:
        """Make room again."""

    def freeze(self) -> None:
        """Let nothing be written any more."""

    def thaw(self) -> None:
        """Let it be written again."""


class MountedDisk:
    """A file system in memory, as large as is said, in KiB."""

    def __init__(self, folder: Path, kilobytes: int) -> None:
        self.folder = folder
        self._ballast = folder / "ballast"
        faulthandler.cancel_dump_traceback_later()  # a process with threads cannot become root in there
        until(lambda: len(list(_THREADS.iterdir())) == 1, "the watchdog's thread does not end")
        _own_mounts()
        _mount("none", "/", None, _RECURSIVE | _PRIVATE)
        _mount("tmpfs", folder, "tmpfs", 0, f"size={kilobytes}k")

    def fill(self) -> None:
        with self._ballast.open("ab", buffering=0) as file, _until_full():
            while True:
                file.write(bytes(4096))

    def clear(self) -> None:
        self._ballast.unlink()

    def freeze(self) -> None:
        _mount(self.folder, self.folder, None, _BIND)  # it is read-only by this path, whoever has files open
        _mount("none", self.folder, None, _REMOUNT | _BIND | _READ_ONLY)

    def thaw(self) -> None:
        _checked(_libc().umount(os.fsencode(self.folder)))


class LimitedDisk:
    """A folder in which no file may be longer than is said, in KiB."""

    def __init__(self, folder: Path, kilobytes: int) -> None:
        self.folder = folder
        self._most = kilobytes * 1024
        self.clear()

    def fill(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    def clear(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (self._most, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    freeze, thaw = fill, clear


def on_disk(
    kind: type[MountedDisk | LimitedDisk], folder: Path, kilobytes: int, work: Callable[[Disk], Any]
) -> Any:
    """Do some work in a process that has a disk to itself, and return what it returned."""
    folder.mkdir(exist_ok=True)
    with Worker(lambda: work(kind(folder, kilobytes))) as worker:
        worker.go()
        return worker.answer()


def killed(work: Callable[[], Any]) -> None:
    """Do some work in a process that is killed when it is done."""
    pid = os.fork()
    if not pid:
        try:
            work()
        except BaseException:  # nothing may unwind into the stack that was forked
            traceback.print_exc()
        os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status == -signal.SIGKILL, f"it ended with status {status} before it was killed"


@cache
def can_mount() -> bool:
    """Return whether this user may mount file systems that nobody else sees."""
    pid = os.fork()
    if not pid:
        try:
            _own_mounts()
            _mount("none", "/", None, _RECURSIVE | _PRIVATE)
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitpid(pid, 0)[1] == 0


@contextmanager
def _until_full() -> Iterator[None]:
    """End quietly when the disk is full."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise


def _own_mounts() -> None:
    """Give this process mounts of its own; who is not root becomes so in there."""
    user, group = os.geteuid(), os.getegid()
    _checked(_libc().unshare(_NEW_MOUNTS if user == 0 else _NEW_MOUNTS | _NEW_USER))
    if user:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")


def _mount(source: str | Path, target: str | Path, kind: str | None, flags: int, options: str = "") -> None:
    kind_bytes = None if kind is None else kind.encode()
    _checked(
        _libc().mount(
            os.fsencode(source), os.fsencode(target), kind_bytes, ctypes.c_ulong(flags), options.encode()
        )
    )


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _checked(failed: int) -> None:
    if failed:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
