"""A table that processes which do not know each other share: a file that they all map.

The file is memory rather than storage: it lasts as long as the machine runs. Whoever comes first, while nobody
else has it, makes the table, and those that come meanwhile wait for that. A table that others left behind is gone
on with if it can be trusted: made since the machine started, by the same layout, of the same size.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import stat
import time
from collections.abc import Callable
from pathlib import Path

from tokenguard._bucket import MAX_BUCKETS, BucketTable, region_bytes
from tokenguard.errors import InvalidSetting

_PAUSE_S = 0.01
_TRIES = 3000
_MAGIC = b"TGTABLE\n"
_BOOT = Path("/proc/sys/kernel/random/boot_id")

_log = logging.getLogger("tokenguard")


def open_table(
    path: Path,
    buckets: int,
    alone: Callable[[BucketTable | None, Callable[[bytes | None], BucketTable]], BucketTable],
) -> tuple[BucketTable, bool]:
    """Return the table in a file, and whether this process is the first to have it.

    Args:
        path: Where.
        buckets: How many it must hold.
        alone: Is called while nobody else has the file, with the table that is in it (None if there is none that
            can be gone on with) and what makes a new one, with a seed; returns one of the two.

    Raises:
        InvalidSetting: It cannot be had.
    """
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except FileNotFoundError as error:
        raise _error(f"{path} cannot be made: there is no folder {path.parent}") from error
    except OSError as error:
        why = "it is a symbolic link" if error.errno == errno.ELOOP else error.strerror
        raise _error(f"{path} cannot be opened: {why}") from error
    try:
        _check(path, file)
        if not _is_alone(file):
            return _attached(path, file, buckets), False
        table = alone(_left(path, file, buckets), lambda seed: _new(path, file, buckets, seed))
        fcntl.flock(file, fcntl.LOCK_SH)
        return table, True
    finally:
        os.close(file)  # the mapping has a descriptor of its own, which keeps the lock


def _check(path: Path, file: int) -> None:
    """Refuse a file that somebody else made for something else."""
    status = os.fstat(file)
    begins = os.pread(file, len(_MAGIC), 0) if stat.S_ISREG(status.st_mode) else None
    half_made = begins == bytes(8) and status.st_size <= region_bytes(MAX_BUCKETS)
    if begins not in (b"", _MAGIC) and not half_made:
        raise _error(f"{path} is no table, and is left as it is: name a file that is not there yet")
    if status.st_uid != os.geteuid():
        raise _error(f"{path} belongs to another user")


def _is_alone(file: int) -> bool:
    """Lock the file: for this process alone, or if others have it, with them."""
    for _ in range(_TRIES):
        for how in (fcntl.LOCK_EX, fcntl.LOCK_SH):
            try:
                fcntl.flock(file, how | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            return how == fcntl.LOCK_EX
        time.sleep(_PAUSE_S)  # somebody is making it
    raise _error(f"the table is not ready after {_TRIES * _PAUSE_S:g} s")


def _attached(path: Path, file: int, buckets: int) -> BucketTable:
    """Return the table that others use."""
    try:
        if os.fstat(file).st_size < region_bytes(buckets):
            raise ValueError(f"it has {os.fstat(file).st_size} bytes, not {region_bytes(buckets)}")
        return BucketTable(buckets, fd=file, mark=_mark())
    except ValueError as error:
        raise _error(
            f"{path} is used by others, and {error}: give all processes of a node the same settings"
        ) from None


def _left(path: Path, file: int, buckets: int) -> BucketTable | None:
    """Return the table that others left behind, if it can be trusted."""
    if os.pread(file, len(_MAGIC), 0) != _MAGIC:
        return None
    try:
        if os.fstat(file).st_size < region_bytes(buckets):
            raise ValueError("it is of another size")
        return BucketTable(buckets, fd=file, mark=_mark())
    except ValueError as error:
        _log.warning("the table in %s is made anew, for %s", path, error)
        return None


def _new(path: Path, file: int, buckets: int, seed: bytes | None) -> BucketTable:
    """Make a table; its memory is had now or never."""
    size = region_bytes(buckets)
    try:
        os.ftruncate(file, 0)
        _allocate(file, size)
    except OSError as error:
        os.ftruncate(file, 0)
        if error.errno not in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.ENOMEM):
            raise _error(f"{path} cannot be written: {error.strerror}") from error
        raise _error(
            f"{buckets} buckets take {size / 2**20:.0f} MiB, for which {path.parent} has no room "
            f"({error.strerror}): lower TOKENGUARD_BUCKETS, or name another folder"
        ) from error
    return BucketTable(buckets, fd=file, mark=_mark(), seed=seed)


def _allocate(file: int, size: int) -> None:
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, size)
        return
    for at in range(0, size, 2**20):
        os.pwrite(file, bytes(min(2**20, size - at)), at)


def _mark() -> bytes:
    """Return what tells this start of the machine from others: with it went whoever held a lock."""
    try:
        return _BOOT.read_bytes().strip()
    except OSError:
        return b""


def _error(what: str) -> InvalidSetting:
    return InvalidSetting("TOKENGUARD_TABLE", f"TOKENGUARD_TABLE: {what}")
