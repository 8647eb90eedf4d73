"""The table of buckets: every bucket of the node in one mapped region, decided upon under one lock.

Amounts are whole tokens (or requests), times are µs of wall-clock time. Where ``now_us`` is None, the clock is
read once, under the lock. All methods may be called from any thread, and from any process that maps the region.

What changes the table happens whole or not at all, even if the process is killed in the middle of it.

Source: docs/decisions/001-exact-integers.md, 002-one-table.md and 007-shared-table.md
"""

from collections.abc import Iterable
from typing import Any, Final, final

MAX_PLAN: Final[int]
"""The most buckets that one plan may have: 32."""
MAX_BUCKETS: Final[int]
"""The most buckets that one table may hold: 10^7."""
MAX_ROWS: Final[int]
"""How many processes can count in rows of their own: 128."""
MAX_SHARED: Final[int]
"""Of how many keys the numbers can be shared: 512."""

_Scale = tuple[int, int, int, int, int]
"""capacity, debt, gain, unit, tick_us: a ``model.Scale``."""

@final
class Handle:
    """A plan made ready for one table: its buckets' fingerprints, scales and places. Opaque and immutable."""

    @property
    def epoch(self) -> int:
        """The table's epoch that it was prepared under; under another one, ``reserve`` refuses it."""

    def __len__(self) -> int: ...

@final
class Outcome:
    """What one ``reserve`` or ``peek`` found, and after an allowed reserve, what it left.

    Buckets are numbered as in the plan. The methods raise IndexError for a bucket that the plan does not have.
    """

    @property
    def allowed(self) -> bool:
        """Whether every bucket passed. If not, no bucket was charged."""

    @property
    def binding(self) -> int:
        """The bucket with the longest wait, the first of equals; -1 if allowed."""

    @property
    def retry_after_us(self) -> int:
        """How long until the same call would pass; 0 if allowed, 10^15 is never.

        Exactly then it passes, and not 1 µs earlier, if nobody else is admitted meanwhile.
        """

    handle: Any
    """What a reservation is settled with: the handle it was made with, unless a backend puts one of its own."""

    def level(self, i: int) -> int:
        """Return what is in the bucket, in whole tokens, rounded down; negative is debt."""

    def limit(self, i: int) -> int:
        """Return the bucket's capacity, by which was decided."""

    def cost(self, i: int) -> int:
        """Return what the call asked of the bucket."""

    def wait_us(self, i: int) -> int:
        """Return how long until this bucket alone would pass: 0 is now, 10^15 is never."""

    def full_in_us(self, i: int) -> int:
        """Return how long until the bucket is full: 0 if it is, 10^15 if it never will be."""

    def asked(self, costs: tuple[int, ...]) -> Outcome:
        """Return what a reserve of these costs would have found, of what a ``peek`` did.

        Raises:
            ValueError: There are not as many costs as buckets.
        """

    def __len__(self) -> int: ...

def outcome_of(
    handle: Handle, costs: tuple[int, ...] | None, allowed: bool, told: list[int], at: int, now_us: int
) -> Outcome:
    """Return what another engine's ``reserve`` or ``peek`` comes to, of what that engine tells.

    Args:
        handle: The plan, of any table.
        costs: One for each bucket; None for a peek.
        allowed: What the engine decided.
        told: Integers, among which are, for each bucket, its level in units and its tick.
        at: Where these begin.
        now_us: When it was.

    Raises:
        ValueError: There are too few integers, or not as many costs as buckets.
    """

def region_bytes(buckets: int) -> int:
    """Return how long the region of a table is.

    Raises:
        ValueError: ``buckets`` is out of bounds.
    """

@final
class Shared:
    """Seven numbers that all who share a table see and change, 0 at first; without a table, nobody shares them.

    What each is, is up to whoever has the key. ``i`` is 0 to 6; the methods raise IndexError for another one.
    """

    def add(self, i: int, amount: int) -> int:
        """Add to a number; return what it is then."""

    def get(self, i: int) -> int:
        """Return a number."""

    def set(self, i: int, number: int) -> None:
        """Set a number."""

@final
class Tally:
    """Something that is counted, by every process in a row of its own."""

    def add(self, amount: int = 1) -> None:
        """Count; ``amount`` may be negative."""

    def set(self, number: int) -> None:
        """Have this process's row tell a number, whatever was counted there before."""

@final
class BucketTable:
    """A table of token buckets.

    A bucket comes into being, full, when it is first charged. When room is needed, a bucket that is full again
    may be dropped, for it cannot be told from a new one; a bucket that is not full never is.

    Processes share it if they map one file, or if they were forked off after it was made.

    Args:
        buckets: How many it can hold, 1 to 10^7. Each takes 64 bytes, 8 to 12 in the index, and 32 for budgets;
            the memory is reserved at once and used as buckets come.
        seed: Keys the fingerprints, up to 64 bytes; random by default. A table that is there has its own.
        fd: A file of ``region_bytes(buckets)`` bytes to map: zeros to begin a table, or a table to share. Whoever
            may begin one must be alone until it is made. None maps memory of this process and those forked off it.
        mark: What whoever shares the table must know it by, up to 64 bytes.

    Raises:
        ValueError: ``buckets`` is out of bounds, or the file holds another table than was asked for.
        OSError: The memory could not be had.
    """

    def __new__(
        cls, buckets: int = 500_000, *, seed: bytes | None = None, fd: int | None = None, mark: bytes = b""
    ) -> BucketTable: ...
    @property
    def seed(self) -> bytes:
        """What keys the fingerprints."""

    @property
    def identity(self) -> bytes:
        """16 random bytes that all who share the table see, and no other table has."""

    @property
    def epoch(self) -> int:
        """A number that moves with every change of a budget."""

    @property
    def turn(self) -> int:
        """A number that moves with everything that changes the table."""

    saved_turn: int
    """The turn of the last state of it that was saved, as whoever saves it says; 0 for none."""

    def prepare(self, buckets: Iterable[tuple[bytes, _Scale]], epoch: int | None = None) -> Handle:
        """Make a plan ready: each bucket's key and scale, in the order of the hierarchy.

        Args:
            buckets: At most 32, each key once. None at all is a plan that always passes.
            epoch: The table's epoch from before the budgets were read; now's by default.

        Raises:
            ValueError: Too many buckets, one named twice, or a scale out of bounds.
        """

    def reserve(self, handle: Handle, costs: tuple[int, ...], now_us: int | None = None) -> Outcome:
        """Take each bucket's cost from all buckets, or from none.

        A bucket passes if its cost is 0 or its level is at least its cost. A refusal writes nothing, but that
        a changed budget or a clock that stepped back by over 1 s has been noticed.

        Args:
            handle: The plan.
            costs: One for each bucket, at least 0.
            now_us: The time, 0 to 2^53 - 1.

        Raises:
            StaleHandle: A budget changed since the handle was prepared; prepare again.
            TableFull: There is no room for a bucket that the call needs; nothing was charged.
            TableBusy: The lock was held by somebody else for over a second; nothing was charged.
            ValueError: A cost is negative, there are not as many as buckets, or the handle is another table's.
        """

    def settle(self, handle: Handle, deltas: tuple[int, ...], now_us: int | None = None) -> int:
        """Correct what was taken: actual less reserved, of either sign. Never fails for want of tokens.

        The level stays between -debt and capacity. A stale handle is welcome: what was reserved must be
        settled, whatever became of the budget.

        Returns:
            What fell below the floor of a bucket's debt and is forgiven, summed over the buckets.

        Raises:
            TableBusy: The lock was held by somebody else for over a second; nothing was changed.
            ValueError: There are not as many deltas as buckets, or the handle is another table's.
        """

    def peek(self, handle: Handle, now_us: int | None = None) -> Outcome:
        """Return the buckets as a reserve would find them, and change nothing. Costs and waits are 0.

        Takes no lock and holds nobody up: each bucket is as it was at some moment, not all at the same.

        Raises:
            TableBusy: A bucket was written all the time, and then the lock was held for over a second.
            ValueError: The handle is another table's.
        """

    def configure(
        self,
        key: bytes,
        scale: _Scale,
        level: int | None = None,
        now_us: int | None = None,
        record: bytes = b"",
    ) -> None:
        """Give a bucket another scale at once; what was used stays used. Moves the epoch.

        Args:
            key: The bucket's.
            scale: The new one.
            level: Sets the level as well, -debt to capacity.
            now_us: The time.
            record: What to put into the log of changes, in the same moment; no longer than ``log_room``.

        Raises:
            TableFull: A level was given for a bucket that is not in the table, and there is no room.
            TableBusy: The lock was held by somebody else for over a second; nothing was changed.
            ValueError: The scale or the level is out of bounds, or the record is too long.
        """

    def remove(self, key: bytes, record: bytes = b"") -> None:
        """Forget a bucket, if it is there. Moves the epoch.

        Raises:
            TableBusy: The lock was held by somebody else for over a second; nothing was changed.
            ValueError: The record is too long.
        """

    @property
    def log_room(self) -> int:
        """How many bytes the log of changes has room for."""

    def changes(self, since: int) -> tuple[int, bool, bytes]:
        """Return what is new in the log of changes.

        Args:
            since: What this returned before; 0 for everything.

        Returns:
            What to ask with the next time; whether the records are the whole log, rather than what was added; the
            records.

        Raises:
            TableBusy: The lock was held by somebody else for over a second.
        """

    def rewrite(self, records: bytes) -> None:
        """Put other records in the place of the log. Whoever does must hold the lock of changes.

        Raises:
            TableFull: They are longer than the log can be; nothing was changed.
            TableBusy: The lock was held by somebody else for over a second; nothing was changed.
        """

    def lock_changes(self) -> None:
        """Wait until nobody else changes budgets, and keep others from it. It is this thread's.

        A process that dies sets it free.

        Raises:
            TableBusy: Somebody else had it for over ten seconds.
        """

    def unlock_changes(self) -> None:
        """Let others change budgets."""

    def expire_handles(self) -> None:
        """Move the epoch: every plan must be prepared anew.

        Raises:
            TableBusy: The lock was held by somebody else for over a second; nothing was changed.
        """

    def state(self, key: bytes) -> tuple[int, int, int, int, int, int] | None:
        """Return a bucket as it is stored, not brought up to now; None if it is not in the table: it is full.

        Returns:
            level in units, tick, capacity, gain, unit, tick_us.
        """

    def dump(self, start: int, slots: int, now_us: int | None = None) -> bytes:
        """Return the buckets in some slots that are not full, as ``load`` takes them. Takes no lock.

        Args:
            start: The number of the first slot.
            slots: How many slots to look at.
            now_us: The time.

        Raises:
            TableBusy: A bucket was written all the time, and then the lock was held for over a second.
        """

    def load(self, records: bytes, now_us: int | None = None) -> None:
        """Put buckets into the table, in the place of those that have the same fingerprints.

        Args:
            records: What ``dump`` returned, of a table with the same seed.
            now_us: The time.

        Raises:
            TableFull: There is no room for all of them.
            TableBusy: The lock was held by somebody else for over a second.
            ValueError: They are no buckets, or one is out of bounds.
        """

    def stats(self) -> dict[str, int]:
        """Return counters. Takes no lock.

        Returns:
            ``buckets`` that fit and ``used`` ones, ``reclaimed``, ``refused_full``, ``clock_steps`` back by over
            1 s, tokens ``forgiven``, times that the table was ``repaired`` after a process had died in the middle
            of an operation, and the ``region_bytes`` of memory.
        """

    def tally(self, name: bytes) -> Tally:
        """Return what counts under a name, for all who share the table.

        Args:
            name: 1 to 94 bytes. There is room for 1,023; what is counted under others is not told of.

        Raises:
            TableBusy: The lock was held by somebody else for over a second.
            ValueError: The name is too long.
        """

    def tallies(self) -> dict[bytes, list[int]]:
        """Return what was counted, by name and row. Takes no lock."""

    def shared(self, key: bytes) -> Shared:
        """Return the numbers of a key.

        Args:
            key: 8 bytes, such as a hash. There is room for 512; the numbers of others are not shared.

        Raises:
            TableBusy: The lock was held by somebody else for over a second.
            ValueError: The key has another length.
        """

    def forget_shared(self) -> None:
        """Begin anew with the numbers of all keys, which nobody must have any more.

        Raises:
            TableBusy: The lock was held by somebody else for over a second; nothing was changed.
        """

    def rows(self) -> list[tuple[int, int]]:
        """Return whose the rows are: process id and when it began, 0 and 0 for nobody's."""

    @property
    def held_row(self) -> int:
        """The row that this process counts in."""

    def hold_row(self, row: int, pid: int, began: int, names: Iterable[bytes] = ()) -> None:
        """Count in a row, and go on from what it holds. Whoever does must hold the lock of changes.

        Until then a process counts in row 0. Of a table that is mapped twice, each mapping counts in its own.

        Args:
            row: 0 to 127.
            pid: The process; 0 gives the row up.
            began: When it began, in whatever unit.
            names: What begins at 0.

        Raises:
            ValueError: There is no such row.
        """
