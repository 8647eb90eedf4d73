"""A table's region, read beside the code that writes it: what is wrong with it, while nobody is in it."""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterable, Iterator
from typing import NamedTuple

HEADER = struct.Struct("<8sQ64s16s64s19Q8x128xQ")
LAYOUT = 2 << 32 | 41_472
"""The layout's number, and how long the header is: what is read here must be what is written there."""
SLOT = struct.Struct("<QIHH6q")
LINE, NAMES_BYTES, ROWS_BYTES, SHARED_BYTES = 64, 1024 * 96, 128 * (64 + 8 * 1024), 512 * 64


class Header(NamedTuple):
    """The header, but for its locks and what is in its journal."""

    magic: bytes
    layout: int
    mark: bytes
    identity: bytes
    seed: bytes
    seed_size: int
    slots: int
    index_mask: int
    log_bytes: int
    hand: int
    turn: int
    shape: int
    epoch: int
    fresh: int
    free: int
    log: int
    names: int
    shared: int
    used: int
    reclaimed: int
    refused_full: int
    clock_steps: int
    forgiven: int
    repaired: int
    noted: int


class Slot(NamedTuple):
    """A slot."""

    print_hi: int
    print_lo: int
    seq: int
    pace: int
    level: int
    tick: int
    capacity: int
    debt: int
    gain: int
    unit: int


def header_of(region: mmap.mmap) -> Header:
    """Return the header."""
    header = Header(*HEADER.unpack_from(region))
    assert header.layout == LAYOUT, "the layout has moved: read it here as it is written"
    return header


class Region:
    """What a region held when it was read."""

    def __init__(self, region: mmap.mmap) -> None:
        self.header = header = header_of(region)
        shared_at = _lines(_lines(_lines(LAYOUT & 0xFFFFFFFF) + NAMES_BYTES) + ROWS_BYTES)
        heads_at = _lines(shared_at + SHARED_BYTES)
        next_at = _lines(heads_at + 4 * (header.index_mask + 1))
        slots_at = _lines(next_at + 4 * header.slots)
        self.heads = struct.unpack_from(f"<{header.index_mask + 1}I", region, heads_at)
        self.next = struct.unpack_from(f"<{header.slots}I", region, next_at)
        slots = SLOT.iter_unpack(region[slots_at : slots_at + SLOT.size * header.slots])
        self.slots = [Slot(*slot) for slot in slots]

    def faults(self) -> list[str]:
        """Return what is wrong with it; nobody may be in the table."""
        return [*self._unfinished(), *self._misplaced()]

    def _unfinished(self) -> Iterator[str]:
        if self.header.noted:
            yield f"{self.header.noted} entries of the journal count"
        if self.header.shape % 2:
            yield "the index is said to be changing"
        for number, slot in enumerate(self.slots):
            if slot.seq % 2:
                yield f"slot {number} is said to be changing"

    def _misplaced(self) -> Iterator[str]:
        """Yield where a slot is not in one place: in the chain of its key, in the list of free ones, or fresh."""
        found: dict[int, str] = {}
        for head, link in enumerate(self.heads):
            for number in self._chain(link, self.next):
                slot = self.slots[number]
                if number in found or not slot.pace or slot.print_hi & self.header.index_mask != head:
                    yield f"slot {number} should not be in chain {head}"
                found[number] = "used"
        for number in self._chain(self.header.free, [slot.level for slot in self.slots]):
            if number in found or self.slots[number].pace:
                yield f"slot {number} should not be in the list of free ones"
            found[number] = "free"
        for number in range(self.header.slots):
            if (number in found) == (number >= self.header.fresh):
                yield f"slot {number} is {found.get(number, 'lost')}, fresh are those from {self.header.fresh} on"
        if list(found.values()).count("used") != self.header.used:
            yield f"{self.header.used} slots should be used, {found} are"

    def _chain(self, link: int, following: Iterable[int]) -> Iterator[int]:
        """Yield the numbers in a chain; after one that cannot be, or that comes round, it ends."""
        following = list(following)
        for _ in range(self.header.slots + 1):
            if not 0 < link <= self.header.slots:
                break
            yield link - 1
            link = following[link - 1]


def _lines(size: int) -> int:
    return -(-size // LINE) * LINE
