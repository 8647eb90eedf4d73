"""The drift in C."""

cimport cython
from tokenguard._bucket cimport Shared

cdef long long _AMPLE, _CLOSE, _NEAR, _TRANSIT
cdef int _REMEMBERED, _FITS, _BELIEVED
cdef int _TURNS, _FULL_AT, _SURPLUS, _SHOWN


@cython.final
@cython.freelist(64)
cdef class Charge:
    cdef readonly long long turn
    cdef readonly long long number
    cdef readonly long long level
    cdef readonly long long cost
    cdef readonly long long moved
    cdef readonly long long surplus
    cdef readonly long long full_at
    cdef readonly long long above


@cython.final
cdef class Drift:
    cdef readonly long long missed
    cdef readonly Charge heard
    cdef readonly bint in_windows
    cdef Shared _shared
    cdef long long _limit
    cdef long long _number
    cdef list _answered

    cpdef hold(self, long long limit)
    @cython.locals(turn="long long", full_at="long long")
    cpdef Charge charge(self, long long level, long long cost, long long moved)
    cpdef expect(self, Charge charge, long long least)
    @cython.locals(heard=Charge, full=bint, shown="long long")
    cpdef told(self, long long remaining, Charge charge, bint in_windows)
    @cython.locals(before=Charge, surplus="long long", near="long long", fits=bint)
    cdef _compare(self, Charge charge, bint full, long long shown)
