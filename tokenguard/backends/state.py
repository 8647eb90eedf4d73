r"""The state on disk: budgets and levels in one file, for a start after this one.

The file is written whole: under another name first, then to the disk, then in the place of the one before.
Whatever happens meanwhile, one of the two is there. It is::

    TGSTATE\n   version (4 bytes)   length of the body (8 bytes)   body   BLAKE2b of all of that (32 bytes)

with numbers in network order, and the body a MessagePack map of the fields of ``State``. Beside it, a lock keeps
another server from the same file; it names the table whose workers may share it.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import msgspec

from tokenguard._bucket import BucketTable
from tokenguard.errors import InvalidSetting, StateUnwritable

VERSION = 2
_MAGIC = b"TGSTATE\n"
_HEAD = struct.Struct(">8sIQ")
_DIGEST_BYTES = 32
_PAUSE_S = 0.01
_JOIN_TRIES = 1000
_SLOTS = 65_536
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW


class State(msgspec.Struct, forbid_unknown_fields=True):
    """What is kept.

    Attributes:
        table: The identity of the table that it was taken from.
        turn: The table's turn then.
        seed: What keys the table's fingerprints.
        budgets: The explicit budgets, as ``mirror.read_records`` takes them.
        buckets: The buckets that were not full, as ``BucketTable.load`` takes them.
    """

    table: bytes
    turn: int
    seed: bytes
    budgets: bytes
    buckets: bytes


def taken(table: BucketTable, budgets: bytes) -> State:
    """Return a table's state as it is now, bucket by bucket, with some budgets."""
    turn = table.turn  # before the buckets: of what changes meanwhile, some may be missing
    slots = range(0, table.stats()["buckets"], _SLOTS)
    buckets = b"".join(table.dump(start, _SLOTS) for start in slots)
    return State(table.identity, turn, table.seed, budgets, buckets)


class _State1(msgspec.Struct, forbid_unknown_fields=True):
    """The first version, which did not say how old it was."""

    table: bytes
    seed: bytes
    budgets: bytes
    buckets: bytes


def _read_1(body: bytes) -> State:
    state = msgspec.msgpack.decode(body, type=_State1)
    return State(state.table, 0, state.seed, state.budgets, state.buckets)


def _read_2(body: bytes) -> State:
    return msgspec.msgpack.decode(body, type=State)


_READERS: dict[int, Callable[[bytes], State]] = {1: _read_1, 2: _read_2}
"""For each version that there ever was, what reads its body."""


class StateFile:
    """A state's file, and the right to write it.

    Args:
        path: Where.

    Raises:
        InvalidSetting: Another server has it, or its folder cannot be written to.
    """

    def __init__(self, path: Path) -> None:
        self.path = path = Path(os.path.realpath(path))  # a link stays one, and its file has one lock
        self._lock_path = path.with_name(path.name + ".lock")
        self._new_path = path.with_name(path.name + ".new")
        self._lock = self._open_lock()
        self._opened_by = os.getpid()

    # --- whose it is ------------------------------------------------------------------------------------------

    def own(self) -> None:
        """Take it for a table that is about to be made.

        Raises:
            InvalidSetting: Another server has it.
        """
        if not self._locked(fcntl.LOCK_EX):
            raise self._taken()

    def share(self, table: bytes) -> None:
        """Let all who share a table have it."""
        os.pwrite(self._lock, table, 0)
        fcntl.flock(self._lock, fcntl.LOCK_SH)

    def join(self, table: bytes) -> None:
        """Have it with the others who share a table.

        Raises:
            InvalidSetting: The server that has it is another, or those who share the table keep it elsewhere.
        """
        for _ in range(_JOIN_TRIES):  # the first of them may be about to share it, or the last about to give it up
            if self._locked(fcntl.LOCK_SH):
                shared_with = os.pread(self._lock, len(table), 0)
                if shared_with == table:
                    return
                if self._locked(fcntl.LOCK_EX):  # nobody has it; it may still be what the last of them left
                    self._check_origin(table)
                    self.share(table)
                    return
                if shared_with:
                    break
            time.sleep(_PAUSE_S)
        raise self._taken()

    def _check_origin(self, table: bytes) -> None:
        """Refuse to write over what is not the state of a table."""
        kept = self.read()
        if kept is None or kept.table != table:
            raise self._error(
                f"in {self.path} is not that of the table which this process shares: give all processes that "
                "share a TOKENGUARD_TABLE the same TOKENGUARD_STATE"
            )

    def close(self) -> None:
        """Give it up; who is the last takes the lock away."""
        if self._lock >= 0:
            # NOTE: a lock is inherited by a fork, and what one does to it is done to the other's.
            if self._opened_by == os.getpid() and self._locked(fcntl.LOCK_EX):
                with suppress(OSError):
                    self._lock_path.unlink()
            os.close(self._lock)
            self._lock = -1

    def _open_lock(self) -> int:
        try:
            return os.open(self._lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except FileNotFoundError as error:
            raise self._error(f"cannot be kept at {self.path}: there is no folder {self.path.parent}") from error
        except OSError as error:
            raise self._error(f"cannot be kept at {self.path}: {error.strerror}") from error

    def _locked(self, how: int) -> bool:
        """Lock, unless somebody else has; the file that is locked must be the one that is there."""
        while True:
            try:
                fcntl.flock(self._lock, how | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            with suppress(FileNotFoundError):
                if os.fstat(self._lock).st_ino == self._lock_path.stat().st_ino:
                    return True
            os.close(self._lock)
            self._lock = self._open_lock()

    def _taken(self) -> InvalidSetting:
        return self._error(
            f"is kept at {self.path} by another server that runs: give each server a file of its own, and the "
            "workers of one server a TOKENGUARD_TABLE in common"
        )

    def _error(self, what: str) -> InvalidSetting:
        return InvalidSetting("TOKENGUARD_STATE", f"TOKENGUARD_STATE: the state {what}")

    # --- what it holds ----------------------------------------------------------------------------------------

    def read(self) -> State | None:
        """Return what it holds; None if there is no file.

        Raises:
            InvalidSetting: It cannot be read, or is not what was written; it is left as it is.
        """
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._error(f"in {self.path} cannot be read: {error.strerror}") from error
        try:
            return _decoded(data)
        except ValueError as error:
            raise self._error(
                f"in {self.path} cannot be used: {error}. The file is left as it is: put a backup in its place, "
                "or move it away to begin with full buckets and without the budgets set over HTTP"
            ) from None

    def write(self, state: State) -> None:
        """Put a state in the place of the one before; when this returns, it is on the disk.

        Raises:
            StateUnwritable: It is not; the one before is still there.
        """
        try:
            with os.fdopen(os.open(self._new_path, _CREATE, 0o600), "wb") as file:
                file.write(_encoded(state))
                file.flush()
                os.fsync(file.fileno())
            self._new_path.replace(self.path)
            _sync_folder(self.path.parent)
        except OSError as error:
            with suppress(OSError):  # it may be what fills the disk
                self._new_path.unlink()
            raise StateUnwritable(f"the state cannot be written to {self.path}: {error.strerror}") from error

    def written_s(self) -> float:
        """Return when it was written, in seconds of wall-clock time; 0 if it is not there."""
        try:
            return self.path.stat().st_mtime
        except OSError:
            return 0.0


def _encoded(state: State) -> bytes:
    body = msgspec.msgpack.encode(state)
    data = _HEAD.pack(_MAGIC, VERSION, len(body)) + body
    return data + _digest(data)


def _decoded(data: bytes) -> State:
    if data[: len(_MAGIC)] != _MAGIC[: len(data)] or not data:
        raise ValueError("it is no state of TokenGuard's")
    if len(data) < _HEAD.size:
        raise ValueError(f"it ends after {len(data)} bytes")
    _, version, length = _HEAD.unpack_from(data)
    whole = _HEAD.size + length + _DIGEST_BYTES
    if len(data) < whole:
        raise ValueError(f"it ends after {len(data)} of {whole} bytes")
    if len(data) > whole or data[-_DIGEST_BYTES:] != _digest(data[:-_DIGEST_BYTES]):
        raise ValueError("its checksum is wrong: something in it was changed")
    if version not in _READERS:
        raise ValueError(f"it is of version {version}, and this TokenGuard reads 1 to {VERSION}")
    return _READERS[version](data[_HEAD.size : -_DIGEST_BYTES])


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=_DIGEST_BYTES).digest()


def _sync_folder(folder: Path) -> None:
    """Put a folder's names on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
