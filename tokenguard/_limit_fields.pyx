# cython: boundscheck=False, wraparound=False, cdivision=True, autotestdict=False
"""The ``x-ratelimit-*`` header fields. The stub, _limit_fields.pyi, is its manual."""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stdint cimport int64_t, uint64_t
from libc.string cimport memcpy

from tokenguard._bucket cimport Outcome
from tokenguard._fields cimport list_of, put_text

from tokenguard.model import NEVER_US as _NEVER_US, Meter

cdef enum:
    ROOM = 48                     # bytes; a duration of 2^63 µs takes 21
    LINES = 32 * FIELDS           # a plan has at most 32 buckets, and no more meters

cdef int64_t NEVER = _NEVER_US
cdef object GATE = Meter.GATE
cdef bytes CRLF = b"\r\n"
cdef bytes PAIRS = b"".join([b"%02d" % number for number in range(100)])
cdef const char *pairs = PyBytes_AS_STRING(PAIRS)
cdef tuple WHAT = ("limit", "remaining", "reset")


def by_meter(meters):
    groups = {}
    for i, meter in enumerate(meters):
        if meter is GATE:
            continue              # nothing that a caller could count
        groups.setdefault(meter, []).append(i)
    return tuple([(names_of(meter), tuple(numbers)) for meter, numbers in groups.items()])


cdef tuple names_of(meter):
    """Return what the fields that tell of a meter's bucket begin with."""
    return tuple([f"x-ratelimit-{what}-{meter.value}: ".encode() for what in WHAT])


cdef int tightest(tuple numbers, Outcome outcome) except -1:
    """Return which of some buckets has the least in it, the first of equals."""
    cdef int lowest = numbers[0]
    cdef int64_t least = outcome.level(lowest)
    cdef int64_t level
    cdef int i
    for i in numbers:
        level = outcome.level(i)
        if level < least:
            least = level
            lowest = i
    return lowest


cpdef list limit_headers(tuple groups, Outcome outcome):
    return list_of(limit_lines(groups, outcome))


cpdef bytes limit_lines(tuple groups, Outcome outcome):
    cdef char lines[LINES]
    cdef char *at = lines
    cdef tuple names, numbers
    cdef int i
    for names, numbers in groups:
        if at - lines > LINES - FIELDS:
            raise ValueError("a plan has more meters than there is room for their fields")
        i = tightest(numbers, outcome)
        at = put_fields(at, names, outcome.limit(i), outcome.level(i), outcome.full_in_us(i))
    return PyBytes_FromStringAndSize(lines, at - lines)


cdef char *put_fields(char *at, tuple names, int64_t limit, int64_t level, int64_t full_in_us):
    at = put_text(put_number(put_text(at, names[0]), limit), CRLF)
    at = put_text(put_number(put_text(at, names[1]), max(0, level)), CRLF)
    if full_in_us < NEVER:
        at = put_text(put_duration(put_text(at, names[2]), full_in_us), CRLF)
    return at


def duration(int64_t us):
    cdef char text[ROOM]
    return PyBytes_FromStringAndSize(text, put_duration(text, us) - text).decode()


cdef char *put_number(char *at, int64_t amount) noexcept nogil:
    cdef char room[ROOM]
    if amount < 0:
        at[0] = c"-"
        return put_end(at + 1, put(room + ROOM, -<uint64_t>amount), room)
    return put_end(at, put(room + ROOM, amount), room)


cdef char *put_duration(char *at, int64_t us) noexcept nogil:
    cdef char room[ROOM]
    return put_end(at, put_time(room + ROOM, us), room)


cdef inline char *put_end(char *at, char *start, char *room) noexcept nogil:
    """Write what stands at the end of ROOM bytes; return where the next goes."""
    memcpy(at, start, room + ROOM - start)
    return at + (room + ROOM - start)


# SAFETY: what follows writes backwards from the end of ROOM bytes; no 64-bit number has more than 20 digits.

cdef char *put(char *end, uint64_t amount) noexcept nogil:
    """Write a number so that it ends there; return where it begins."""
    while amount >= 100:
        end -= 2
        memcpy(end, pairs + 2 * (amount % 100), 2)
        amount //= 100
    end -= 2
    memcpy(end, pairs + 2 * amount, 2)
    return end + (amount < 10)


cdef char *put_time(char *end, int64_t us) noexcept nogil:
    """Write a time likewise, as ``duration`` says."""
    cdef int64_t ms = us // 1000 + (us % 1000 != 0)
    cdef int64_t minutes = ms // 60_000
    cdef int part = ms % 1000
    cdef int places = 3
    end -= 1
    end[0] = c"s"
    if ms < 1000:
        end -= 1
        end[0] = c"m"
        return put(end, ms)
    while places and part % 10 == 0:
        part //= 10
        places -= 1
    if places:
        while places:
            end -= 1
            end[0] = c"0" + part % 10
            part //= 10
            places -= 1
        end -= 1
        end[0] = c"."
    end = put(end, ms // 1000 % 60)
    if minutes:
        end -= 1
        end[0] = c"m"
        end = put(end, minutes % 60)
    if minutes >= 60:
        end -= 1
        end[0] = c"h"
        end = put(end, minutes // 60)
    return end
