"""Five scopes that many hammer at once, and whether the books balance: exactly, in units.

A bucket begins half full and is never full again, so that it is given what its rate says and loses none of it.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from tokenguard._bucket import BucketTable, region_bytes
from tokenguard.model import Scale

SCOPES = (b"global:*", b"team:red", b"rolegroup:analysts", b"role:reader", b"user:alice")

MEMORY = Path("/dev/shm")
"""Where files are kept in memory."""


class Book(NamedTuple):
    """A bucket as it stood when its book was opened, as it is stored."""

    key: bytes
    level: int
    tick: int
    capacity: int
    gain: int
    unit: int
    tick_us: int

    def granted(self, now_us: int) -> int:
        """Return the units that there were to be had up to a time."""
        return self._granted(now_us // self.tick_us)

    def error(self, table: BucketTable, spent: int) -> int:
        """Return by how many units the bucket's level is not what is left when ``spent`` tokens are gone."""
        level, tick, *_ = table.state(self.key)
        return level - (self._granted(tick) - spent * self.unit)

    def _granted(self, tick: int) -> int:
        return self.level + (tick - self.tick) * self.gain


def open_books(table: BucketTable, plan: Iterable[tuple[bytes, Scale]]) -> list[Book]:
    """Fill each bucket by half and return the books."""
    for key, scale in plan:
        table.configure(key, scale, level=scale.capacity // 2)
    return [Book(key, *table.state(key)) for key, _ in plan]


@contextmanager
def shared_file(buckets: int, folder: str | Path = MEMORY) -> Iterator[int]:
    """Make a file without a name that has room for a table; yield its descriptor."""
    with tempfile.TemporaryFile(dir=folder) as file:
        os.posix_fallocate(file.fileno(), 0, region_bytes(buckets))
        yield file.fileno()
