"""Reserving and settling, in C down to the backend."""

cimport cython
cimport tokenguard._limit_fields as _limit_fields
from tokenguard._bucket cimport Outcome
from tokenguard.drift cimport Charge
from tokenguard.headroom cimport Headroom
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
    cdef Charge _tokens
    cdef Charge _requests

    @cython.locals(room=Headroom, charge=Charge)
    cpdef expect(self, long long least)
    @cython.locals(
        plan=Plan, room=Headroom, charge=Charge, fewer_tokens="long long", fewer_requests="long long", deltas=list
    )
    cpdef tuple lowering(self, long long tokens, long long requests, bint in_windows=*)
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
