"""One bucket as a table of rows, which every engine is walked through."""

from tests.buckets import GRANT, TEN, at
from tests.engines import found
from tests.oracle import NEVER_US
from tests.strategies import S, prepared

# fmt: off
CASES = {
    "a new bucket is full": (TEN, [
        # at s,  what,      of, level, wait s
        (0.0,    "peek",     0,    10,    0),
        (9.0,    "peek",     0,    10,    0),
    ]),
    "tokens are taken one call after the other": (TEN, [
        (0.0,    "reserve",  1,     9,    0),
        (0.0,    "reserve",  3,     6,    0),
        (0.0,    "reserve",  6,     0,    0),
    ]),
    "what is not there is refused, and comes at the refill rate": (TEN, [
        (0.0,    "reserve", 10,     0,    0),
        (0.0,    "reserve",  1,     0,  0.5),
        (0.25,   "reserve",  1,     0, 0.25),
        (0.5,    "reserve",  1,     0,    0),
        (0.5,    "reserve",  3,     0,  1.5),
        (1.5,    "reserve",  3,     2,  0.5),
    ]),
    "a refusal takes nothing": (TEN, [
        (0.0,    "reserve",  8,     2,    0),
        (0.0,    "reserve",  5,     2,  1.5),
        (0.0,    "reserve",  5,     2,  1.5),
        (0.0,    "reserve",  2,     0,    0),
    ]),
    "a bucket fills up to its capacity and no further": (TEN, [
        (0.0,    "reserve",  4,     6,    0),
        (1.0,    "peek",     0,     8,    0),
        (2.0,    "peek",     0,    10,    0),
        (3600.0, "reserve", 10,     0,    0),
        (3600.0, "reserve",  1,     0,  0.5),
    ]),
    "half a token is kept but does not count": (TEN, [
        (0.0,    "reserve", 10,     0,    0),
        (0.75,   "reserve",  1,     0,    0),
        (0.75,   "reserve",  1,     0, 0.25),
        (1.0,    "reserve",  1,     0,    0),
    ]),
    "more than the capacity is never there": (TEN, [
        (0.0,    "reserve", 11,    10, None),
        (0.0,    "reserve", 10,     0,    0),
        (0.0,    "reserve", 11,     0, None),
        (0.0,    "reserve", 2**63 - 1, 0, None),
    ]),
    "a fixed grant is never refilled": (GRANT, [
        (0.0,    "reserve",  7,     3,    0),
        (1e6,    "reserve",  4,     3, None),
        (1e6,    "reserve",  3,     0,    0),
        (2e6,    "reserve",  1,     0, None),
        (2e6,    "settle",  -2,     2,    0),
        (2e6,    "reserve",  2,     0,    0),
    ]),
    "overage becomes debt, and is paid back before anything passes": (TEN, [
        (0.0,    "reserve", 10,     0,    0),
        (0.0,    "settle",   5,    -5,    0),
        (0.0,    "reserve",  1,    -5,    3),
        (2.0,    "reserve",  1,    -1,    1),
        (2.5,    "peek",     0,     0,    0),
        (3.0,    "reserve",  1,     0,    0),
    ]),
    "a part of a token of debt is shown as a whole one": (TEN, [
        (0.0,    "reserve", 10,     0,    0),
        (0.0,    "settle",   1,    -1,    0),
        (0.25,   "peek",     0,    -1,    0),
        (0.5,    "peek",     0,     0,    0),
    ]),
    "a call that costs nothing passes, even on debt": (TEN, [
        (0.0,    "reserve", 10,     0,    0),
        (0.0,    "settle",   5,    -5,    0),
        (0.0,    "reserve",  0,    -5,    0),
    ]),
    "what was not used is given back": (TEN, [
        (0.0,    "reserve",  8,     2,    0),
        (0.0,    "settle",  -5,     7,    0),
        (0.0,    "reserve",  7,     0,    0),
    ]),
    "a refund never lifts above the capacity": (TEN, [
        (0.0,    "reserve",  8,     2,    0),
        (3.0,    "settle",  -8,    10,    0),
        (3.0,    "reserve", 10,     0,    0),
        (3.0,    "reserve",  1,     0,  0.5),
    ]),
    "debt ends at its floor": (TEN, [
        (0.0,    "reserve", 10,     0,    0),
        (0.0,    "settle", 999,   -20,    0),
        (0.0,    "reserve",  1,   -20, 10.5),
    ]),
    "a clock that steps back by up to a second stands still": (TEN, [
        (9.0,    "reserve", 10,     0,    0),
        (8.0,    "reserve",  1,     0,  1.5),
        (9.0,    "reserve",  1,     0,  0.5),
        (9.5,    "reserve",  1,     0,    0),
    ]),
    "a clock that steps back by a second and a microsecond is believed": (TEN, [
        (9.0,      "reserve", 10,   0,    0),
        (7.999999, "reserve",  1,   0,  0.5),
        (8.499999, "reserve",  1,   0,    0),
    ]),
    "a clock that steps back further is believed": (TEN, [
        (9.0,    "reserve", 10,     0,    0),
        (7.5,    "reserve",  1,     0,  0.5),
        (8.0,    "reserve",  1,     0,    0),
        (9.0,    "reserve",  2,     0,    0),
    ]),
    "a clock that jumps forward at most fills the bucket": (TEN, [
        (0.0,    "reserve", 10,     0,    0),
        (7e9,    "reserve", 10,     0,    0),
        (7e9,    "reserve",  1,     0,  0.5),
    ]),
}
# fmt: on


def walk(table, sentence):
    """Do what the rows under a sentence say; each must come out as it says."""
    terms, rows = CASES[sentence]
    handle = prepared(table, ((b"one", terms),))

    for seconds, act, count, level, wait in rows:
        now_us = at(seconds)
        if act == "settle":
            table.settle(handle, (count,), now_us)
        outcome = table.reserve(handle, (count,), now_us) if act == "reserve" else table.peek(handle, now_us)
        wait_us = NEVER_US if wait is None else int(wait * S)
        assert (found(outcome).levels[0], outcome.retry_after_us) == (level, wait_us), f"at {seconds} s"
        assert outcome.allowed == (wait_us == 0)
