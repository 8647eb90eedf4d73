"""The table of buckets: every bucket of the node in one mapped region, decided upon under one lock.

Amounts are whole tokens (or requests), times are µs of wall-clock time. Where ``now_us`` is None, the clock is
read once, under the lock. All methods may be called from any thread.

Source: docs/decisions/001-exact-integers.md and 002-one-table.md
"""

from collections.abc import Iterable
from typing import Any, Final, final

MAX_PLAN: Final[int]
"""The most buckets that one plan may have: 32."""
MAX_BUCKETS: Final[int]
"""The most buckets that one table may hold: 10^7."""

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

@final
class BucketTable:
    """A table of token buckets.

    A bucket comes into being, full, when it is first charged. When room is needed, a bucket that is full again
    may be dropped, for it cannot be told from a new one; a bucket that is not full never is.

    Args:
        buckets: How many it can hold, 1 to 10^7. Each takes 64 bytes, and its part of the index 6 to 12 bytes;
            the memory is reserved at once and used as buckets come.
        seed: Keys the fingerprints, up to 64 bytes; random by default.

    Raises:
        ValueError: ``buckets`` is out of bounds.
        OSError: The memory could not be had.
    """

    def __new__(cls, buckets: int = 500_000, *, seed: bytes | None = None) -> BucketTable: ...
    @property
    def seed(self) -> bytes:
        """What keys the fingerprints."""

    @property
    def epoch(self) -> int:
        """A number that moves with every change of a budget."""

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

        Raises:
            TableBusy: The lock was held by somebody else for over a second.
            ValueError: The handle is another table's.
        """

    def configure(self, key: bytes, scale: _Scale, level: int | None = None, now_us: int | None = None) -> None:
        """Give a bucket another scale at once; what was used stays used. Moves the epoch.

        Args:
            key: The bucket's.
            scale: The new one.
            level: Sets the level as well, -debt to capacity.
            now_us: The time.

        Raises:
            TableFull: A level was given for a bucket that is not in the table, and there is no room.
            TableBusy: The lock was held by somebody else for over a second; nothing was changed.
            ValueError: The scale or the level is out of bounds.
        """

    def remove(self, key: bytes) -> None:
        """Forget a bucket, if it is there. Moves the epoch.

        Raises:
            TableBusy: The lock was held by somebody else for over a second; nothing was changed.
        """

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

    def stats(self) -> dict[str, int]:
        """Return counters.

        Returns:
            ``buckets`` that fit and ``used`` ones, ``reclaimed``, ``refused_full``, ``clock_steps`` back by over
            1 s, tokens ``forgiven``, and the ``region_bytes`` of memory.
        """
