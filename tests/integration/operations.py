"""What is done to a table while processes are killed: every operation that changes one, on what it changes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from fractions import Fraction
from typing import NamedTuple

from tokenguard._bucket import BucketTable
from tokenguard.arithmetic import scale
from tokenguard.errors import StaleHandle, TableFull
from tokenguard.model import Scale

S = 1_000_000
NOW_US = 1_700_000_000 * S
LATER_US = NOW_US + 5 * S
EARLIER_US = NOW_US - 5 * S

GRANT = scale(10, Fraction(0), 20)
SLOW = scale(10, Fraction(1, 1000), 20)
FAST = scale(10, Fraction(2), 20)
"""Five seconds later it is full again."""
SMALL = scale(5, Fraction(1), 0)

BUCKETS = 8
SEED = b"the same each time"

Change = Callable[[BucketTable], object]
Plan = tuple[tuple[bytes, Scale], ...]


class Operation(NamedTuple):
    """A change of a table.

    Attributes:
        change: Does all of it.
        begin: Makes what is there before.
        steps: Its parts, where the parts and not the whole of it happen or do not.
        keys: The buckets that it may touch, beside those that a furnished table has.
        buckets: How many the table can hold.
    """

    change: Change
    begin: Change
    steps: tuple[Change, ...] = ()
    keys: tuple[bytes, ...] = ()
    buckets: int = BUCKETS


# --- calls ----------------------------------------------------------------------------------------------------


def reserve(plan: Plan, costs: tuple[int, ...], now_us: int = NOW_US) -> Change:
    def change(table: BucketTable) -> None:
        with suppress(TableFull):
            try:
                table.reserve(table.prepare(plan), costs, now_us)
            except StaleHandle:  # whoever had the lock before had died, so that the epoch moved
                table.reserve(table.prepare(plan), costs, now_us)

    return change


def settle(plan: Plan, deltas: tuple[int, ...], now_us: int = NOW_US) -> Change:
    return lambda table: table.settle(table.prepare(plan), deltas, now_us)


def configure(key: bytes, terms: Scale, level: int | None = None, record: bytes = b"") -> Change:
    def change(table: BucketTable) -> None:
        with suppress(TableFull):
            table.configure(key, terms, level, NOW_US, record)

    return change


def remove(key: bytes, record: bytes) -> Change:
    return lambda table: table.remove(key, record)


def load(records: bytes) -> Change:
    return lambda table: table.load(records, NOW_US)


def dumped(plan: Plan, costs: tuple[int, ...]) -> bytes:
    """Return what a table dumps once a plan was taken from."""
    table = BucketTable(BUCKETS, seed=SEED)
    reserve(plan, costs)(table)
    return table.dump(0, BUCKETS, NOW_US)


# --- what is there before -------------------------------------------------------------------------------------


def numbered(prefix: bytes, count: int, terms: Scale) -> Plan:
    return tuple((prefix + b"-%d" % number, terms) for number in range(count))


A, B, C = HELD = ((b"a", SLOW), (b"b", GRANT), (b"c", SLOW))
NEW, NEWER = (b"new", GRANT), (b"newer", SLOW)
HERE = (b"a", b"b", b"c", b"gone", b"new", b"newer")
CROWD = numbered(b"full", 3, FAST) + numbered(b"drained", BUCKETS, GRANT)
GUESTS = numbered(b"guest", 4, SLOW)
TWENTY = numbered(b"of-twenty", 20, SLOW)


def furnished(*changes: Change) -> Change:
    """Return what puts in some of everything: three buckets, a free slot among fresh ones, a log, a tally."""

    def begin(table: BucketTable) -> None:
        reserve((*HELD, (b"gone", GRANT)), (5, 4, 3, 2))(table)
        table.rewrite(b"the budgets; ")
        table.remove(b"gone", b"one is gone; ")
        table.tally(b"calls").add(3)
        for change in changes:
            change(table)

    return begin


def crowded(room: int) -> Change:
    """Return what uses up all slots; as many buckets as there is to be room for are full again later."""
    others = (*CROWD[:room], *CROWD[3 : 3 + BUCKETS - len(HELD) - room])
    return furnished(reserve(others, (1,) * len(others)))


# --- all of them ----------------------------------------------------------------------------------------------


def calls() -> dict[str, Operation]:
    """Return those that take tokens, and give them back."""
    keys = tuple(key for key, _ in (*CROWD, *GUESTS))
    twenty = tuple(key for key, _ in TWENTY)
    return {
        "reserve": Operation(reserve(HELD, (1, 2, 3), LATER_US), furnished()),
        "reserve from new buckets": Operation(reserve((A, NEWER, C, NEW), (1, 2, 3, 4), LATER_US), furnished()),
        "reserve that makes room": Operation(
            reserve((A, *GUESTS[:3], B), (1, 2, 3, 4, 5), LATER_US), crowded(3), keys=keys
        ),
        "reserve without room": Operation(
            reserve((A, *GUESTS, B), (1, 2, 3, 4, 5, 6), LATER_US), crowded(3), keys=keys
        ),
        "reserve under other scales, refused": Operation(
            reserve(((b"a", FAST), (b"b", SMALL), NEW), (1, 2, 11)), furnished(settle((B,), (20,)))
        ),
        "reserve at an earlier time, refused": Operation(reserve(HELD, (1, 2, 11), EARLIER_US), furnished()),
        "reserve from twenty buckets": Operation(
            reserve(TWENTY, (*range(1, 11),) * 2, LATER_US),
            furnished(reserve(TWENTY[::2], (1,) * 10)),
            keys=twenty,
            buckets=32,
        ),
        "settle to more": Operation(settle(HELD, (4, 0, 7), LATER_US), furnished()),
        "settle to less": Operation(settle(HELD, (-1, -9, -2), LATER_US), furnished()),
        "settle to more than debt may be": Operation(settle(HELD, (100, 7, 200), LATER_US), furnished()),
        "settle on new buckets": Operation(settle((A, NEW, NEWER), (1, 40, 3)), furnished()),
        "settle that makes room": Operation(settle((NEW, B), (2, 3), LATER_US), crowded(1), keys=keys),
        "settle without room": Operation(settle((A, NEW, B), (1, 2, 3)), crowded(0), keys=keys),
        "settle at an earlier time": Operation(settle(HELD, (1, 2, -1), EARLIER_US), furnished()),
    }


def changes() -> dict[str, Operation]:
    """Return those that change budgets, and the others."""
    loaded = [dumped((bucket,), (9,)) for bucket in ((b"a", GRANT), NEW, NEWER)]
    tally, other = (lambda table: table.tally(b"refusals")), (lambda table: table.tally(b"open"))
    return {
        "configure": Operation(configure(b"a", FAST), furnished()),
        "configure what is not there": Operation(configure(b"new", FAST, None, b"new is fast; "), furnished()),
        "configure a level": Operation(configure(b"a", FAST, -7, b"a is fast; "), furnished()),
        "configure a level of what is not there": Operation(
            configure(b"new", FAST, 7, b"new is fast; "), furnished()
        ),
        "configure less debt": Operation(
            configure(b"a", SMALL, None, b"a is small; "), furnished(settle((A,), (20,)))
        ),
        "configure without room": Operation(configure(b"new", GRANT, 7, b"new is a grant; "), crowded(0)),
        "remove": Operation(remove(b"a", b"a is gone; "), furnished()),
        "remove what is not there": Operation(remove(b"new", b"new is gone; "), furnished()),
        "expire handles": Operation(BucketTable.expire_handles, furnished()),
        "rewrite": Operation(lambda table: table.rewrite(b"all other budgets; "), furnished()),
        "load": Operation(load(b"".join(loaded)), furnished(), steps=tuple(map(load, loaded))),
        "tally": Operation(tally, furnished()),
        "share": Operation(lambda table: table.shared(b"a number"), furnished()),
        "share no more": Operation(
            BucketTable.forget_shared, furnished(lambda table: table.shared(b"a number").set(0, 1))
        ),
        "share in another's place": Operation(
            lambda table: table.shared(b"another."),
            furnished(lambda table: table.shared(b"a number").set(0, 1), BucketTable.forget_shared),
        ),
        "hold a row": Operation(
            lambda table: table.hold_row(3, 4711, 815, (b"calls", b"refusals", b"open")),
            furnished(),
            steps=(tally, other, lambda table: table.hold_row(3, 4711, 815)),
        ),
    }


OPERATIONS = {**calls(), **changes()}
