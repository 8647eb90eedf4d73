"""The call in C: what a driver in C may use of it without asking Python."""

cimport cpython.time as time
cimport cython
from tokenguard._heads cimport Told
from tokenguard.account cimport Account
from tokenguard.exchange cimport End, Exchange, Settlement, Terms
from tokenguard.headroom cimport Pace
from tokenguard.limiter cimport Limiter, Reservation
from tokenguard.metrics cimport Metrics
from tokenguard.model cimport Answer, Head


@cython.final
cdef class Guard:
    cdef readonly Limiter limiter
    cdef readonly Terms terms
    cdef readonly Metrics metrics
    cdef readonly object log
    cdef readonly long long max_body_bytes
    cdef readonly double caller_timeout_s
    cdef readonly object watch
    cdef readonly Pace pace


cdef class Call:
    cdef public Exchange exchange
    cdef readonly Account account
    cdef readonly Guard _guard
    cdef double _began_s
    cdef double _forwarded_s
    cdef bint _over
    cdef bint _heard
    cdef readonly object settling

    cpdef begin(self, headers, body)
    cpdef reserved(self, reserved)
    @cython.locals(head=Head, now_s=double)
    cpdef Head answered(self, int status, headers)
    @cython.locals(exchange=Exchange, reservation=Reservation, told=Told)
    cdef _heed(self, watch, double now_s)
    cdef _lower(self, Reservation reservation, tuple deltas)
    cdef _hear(self)
    cdef _wait_for(self, heeded)
    @cython.locals(passed=bytes)
    cpdef bytes feed(self, bytes chunk)
    @cython.locals(end=End)
    cpdef Answer failed(self, error)
    @cython.locals(rest=bytes)
    cpdef bytes finish(self)
    cpdef leave(self)
    cpdef over(self)
    cdef bytes _end(self, End end)
    cdef _settle(self, Settlement settlement)
    @cython.locals(tries_left=cython.int)
    cdef _settle_at(self, Settlement settlement, tokens)
    cpdef _blame(self, what)
    cpdef _warn(self, what)


cdef class CallSoon(Call):
    cdef _wait_for(self, heeded)
    cdef _lower(self, Reservation reservation, tuple deltas)
    cdef _settle(self, Settlement settlement)
