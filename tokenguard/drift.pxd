"""The drift in C."""

cimport cython

cdef long long _AMPLE, _NEAR, _TRANSIT
cdef int _REMEMBERED, _FITS, _BELIEVED


@cython.final
@cython.freelist(64)
cdef class Charge:
    cdef readonly long long turn
    cdef readonly long long level
    cdef readonly long long cost
    cdef readonly long long moved
    cdef readonly long long surplus
    cdef readonly long long above


@cython.final
cdef class Drift:
    cdef readonly long long missed
    cdef readonly bint in_windows
    cdef long long _limit
    cdef long long _turns
    cdef long long _full_at
    cdef long long _surplus
    cdef Charge _heard
    cdef list _answered
    cdef int _shown

    cpdef void hold(self, long long limit) noexcept
    cpdef Charge charge(self, long long level, long long cost, long long moved)
    cpdef expect(self, Charge charge, long long least)
    @cython.locals(heard=Charge, full=bint)
    cpdef bint told(self, long long remaining, Charge charge, bint in_windows) except -1
    @cython.locals(before=Charge, surplus="long long", near="long long", fits=bint)
    cdef _compare(self, Charge charge, bint full)
