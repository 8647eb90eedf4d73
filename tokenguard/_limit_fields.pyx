# cython: boundscheck=False, wraparound=False, cdivision=True, autotestdict=False
"""The ``x-ratelimit-*`` header fields. The stub, _limit_fields.pyi, is its manual."""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.stdint cimport int64_t
from libc.string cimport memcpy

from tokenguard._bucket cimport Outcome

from tokenguard.model import NEVER_US as _NEVER_US, Meter

cdef enum:
    ROOM = 48                     # bytes; a duration of 2^63 µs takes 21
    LONGEST = 128                 # bytes of a line; "x-ratelimit-remaining-requests" has 30
    LINES = 32 * 3 * LONGEST      # a plan has at most 32 buckets, and no more meters

cdef int64_t NEVER = _NEVER_US
cdef object GATE = Meter.GATE
cdef tuple WHAT = ("limit", "remaining", "reset")


def by_meter(meters):
    groups = {}
    for i, meter in enumerate(meters):
        if meter is GATE:
            continue              # nothing that a caller could count
        groups.setdefault(meter, []).append(i)
    return tuple([(names_of(meter), tuple(numbers)) for meter, numbers in groups.items()])


cdef tuple names_of(meter):
    return tuple([f"x-ratelimit-{what}-{meter.value}".encode() for what in WHAT])


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
    cdef list headers = []
    cdef tuple names, numbers
    cdef int i
    for names, numbers in groups:
        i = tightest(numbers, outcome)
        add(headers, names, outcome.limit(i), outcome.level(i), outcome.full_in_us(i))
    return headers


cpdef bytes limit_lines(tuple groups, Outcome outcome):
    cdef char lines[LINES]
    cdef char *at = lines
    cdef tuple names, numbers
    cdef int64_t full_in_us
    cdef char room[ROOM]
    cdef int i
    for names, numbers in groups:
        if at - lines > LINES - 3 * LONGEST:
            raise ValueError("a plan has more meters than there is room for their fields")
        i = tightest(numbers, outcome)
        full_in_us = outcome.full_in_us(i)
        at = put_line(at, names[0], put(room + ROOM, outcome.limit(i)), room)
        at = put_line(at, names[1], put(room + ROOM, max(0, outcome.level(i))), room)
        if full_in_us < NEVER:
            at = put_line(at, names[2], put_time(room + ROOM, full_in_us), room)
    return PyBytes_FromStringAndSize(lines, at - lines)


cdef char *put_line(char *at, bytes name, char *value, char *room):
    """Write a field; return where the next begins."""
    cdef Py_ssize_t size = room + ROOM - value
    memcpy(at, PyBytes_AS_STRING(name), PyBytes_GET_SIZE(name))
    at += PyBytes_GET_SIZE(name)
    at[0], at[1] = c":", c" "
    memcpy(at + 2, value, size)
    at += 2 + size
    at[0], at[1] = c"\r", c"\n"
    return at + 2


def add_fields(list headers not None, meter, int64_t limit, int64_t level, int64_t full_in_us):
    add(headers, names_of(meter), limit, level, full_in_us)


cdef add(list headers, tuple names, int64_t limit, int64_t level, int64_t full_in_us):
    cdef char room[ROOM]
    headers.append((names[0], text_from(put(room + ROOM, limit), room)))
    headers.append((names[1], text_from(put(room + ROOM, max(0, level)), room)))
    if full_in_us < NEVER:
        headers.append((names[2], text_from(put_time(room + ROOM, full_in_us), room)))


def duration(int64_t us):
    cdef char room[ROOM]
    return text_from(put_time(room + ROOM, us), room).decode()


cdef inline bytes text_from(char *start, char *room):
    return PyBytes_FromStringAndSize(start, room + ROOM - start)


# SAFETY: what follows writes backwards from the end of ROOM bytes; no 64-bit number has more than 19 digits.

cdef char *put(char *end, int64_t amount) noexcept nogil:
    """Write a number, which is at least 0, so that it ends there; return where it begins."""
    while True:
        end -= 1
        end[0] = c"0" + amount % 10
        amount //= 10
        if amount == 0:
            return end


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
