"""The headroom in C."""

cimport cython

cdef long long _RISE, _OVERDONE, _AMPLE
cdef double PERIOD_S, REST_S


@cython.final
cdef class Headroom:
    cdef readonly bint known
    cdef readonly long long moved
    cdef public long long kept
    cdef long long _room
    cdef long long _turns
    cdef long long _heard

    cpdef long long turn(self) noexcept
    @cython.locals(room="long long", fewer="long long")
    cpdef long long told(self, long long remaining, long long level, long long moved, long long turn) noexcept
    @cython.locals(given="long long")
    cpdef long long give(self, long long cost, long long kept) noexcept
    cpdef void give_all(self, long long cost) noexcept


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
