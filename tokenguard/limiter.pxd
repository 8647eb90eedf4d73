"""Reserving and settling, in C down to the backend."""

cimport cython
cimport tokenguard._limit_fields as _limit_fields
from tokenguard._bucket cimport Outcome
from tokenguard.plan cimport Plan

cdef int _TRIES


@cython.final
@cython.freelist(64)
cdef class Reservation:
    cdef readonly Plan plan
    cdef readonly tuple costs
    cdef public bint unsent
    cdef readonly bint is_open
    cdef Outcome _outcome
    cdef bint _heard
    cdef long long _tokens_moved
    cdef long long _requests_moved
    cdef long long _tokens_turn
    cdef long long _requests_turn

    @cython.locals(plan=Plan, fewer_tokens="long long", fewer_requests="long long", level="long long", deltas=list)
    cpdef tuple lowering(self, long long tokens, long long requests)
    cpdef list limit_headers(self)
    cpdef bytes limit_lines(self)
    cpdef close(self)
    cpdef tuple close_at(self, tokens)
    cpdef reopen(self)


@cython.final
@cython.freelist(64)
cdef class Refusal:
    cdef readonly Plan plan
    cdef Outcome outcome


cdef class Limiter:
    cdef readonly bint waits
    cdef object _backend
    cdef object _plans

    @cython.locals(tries_left=cython.int, plan=Plan, costs=tuple, outcome=Outcome)
    cpdef reserve(self, identity, model, prompt, total, most=*, now_us=*)
    cpdef lower(self, Reservation reservation, tuple deltas, now_us=*)
    @cython.locals(handle=object, deltas=object)
    cpdef settle(self, Reservation reservation, tokens, now_us=*)


cdef _state(Plan plan, Outcome outcome, int i)
cdef _decision(Plan plan, Outcome outcome)
