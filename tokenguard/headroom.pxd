"""The headroom in C."""

cimport cython
from tokenguard._bucket cimport Shared
from tokenguard.drift cimport Charge, Drift

cdef long long _RISE, _OVERDONE, _AMPLE
cdef int _MOVED, _TOP, _HEARD
cdef double PERIOD_S, REST_S


@cython.final
cdef class Headroom:
    cdef readonly long long kept
    cdef readonly bint is_slow
    cdef readonly Drift drift
    cdef Shared _shared

    cpdef hold(self, long long limit, long long kept, bint is_slow=*)
    cpdef Charge charge(self, long long level, long long cost)
    @cython.locals(heard="long long", moved="long long", room="long long", before="long long", fewer="long long")
    cpdef told(self, long long remaining, Charge charge, bint in_windows=*)
    @cython.locals(given="long long")
    cpdef give(self, long long cost, long long kept)
    @cython.locals(moved="long long")
    cpdef gave(self, long long tokens)


@cython.final
cdef class _Answers:
    cdef double began_s
    cdef double last_s
    cdef long now
    cdef long before
    cdef double rests_until_s
    cdef bint unclear


@cython.final
cdef class Pace:
    cdef dict _models

    @cython.locals(answers=_Answers)
    cpdef passed(self, model, double now_s)
    @cython.locals(answers=_Answers)
    cpdef rest(self, model, double now_s, bint unclear)
    @cython.locals(answers=_Answers)
    cpdef bint rests(self, model, double now_s) except -1
    @cython.locals(answers=_Answers)
    cpdef bint rests_unclear(self, model) except -1
    @cython.locals(answers=_Answers)
    cpdef double last_s(self, model) except? -2
    @cython.locals(answers=_Answers, age_s=double)
    cpdef double rate(self, model, double now_s) except? -2
