"""A call of somebody's own, in C down to the limiter: the row "library" of benchmarks/test_bench_bucket.py."""

cimport cython
from tokenguard.limiter cimport Limiter, Reservation


@cython.final
cdef class Desk:
    cdef readonly Limiter limiter
    cdef readonly object line
    cdef readonly bint is_closed
    cdef public long forks
    cdef object _end
    cdef object __weakref__

    cpdef check_open(self)
    cpdef take(self, who, model, prompt, tokens, double wait_s)
    cdef _reserve(self, who, model, prompt, tokens)
    cpdef given_back(self, Reservation reservation)


@cython.final
@cython.freelist(64)
cdef class Call:
    cdef readonly object tokens
    cdef Desk _desk
    cdef object _who
    cdef object _model
    cdef object _prompt
    cdef double _wait_s
    cdef Reservation _reservation
    cdef object _settling
    cdef bint _spent
    cdef bint _soon
    cdef bint _is_asked_for
    cdef bint _is_made
    cdef long _forks

    @cython.locals(taken=Reservation)
    cpdef settle(self, tokens)
    @cython.locals(taken=Reservation)
    cpdef refund(self)
    cpdef keep(self)
    cpdef attempt(self)
    cdef _ask(self)
    cdef _begun(self, taken)
    cdef Reservation _taken(self)
    cdef _settle(self, Reservation taken, tokens)
    @cython.locals(taken=Reservation)
    cdef _end(self, kind)


cpdef check_tokens(field, tokens)
cpdef check_model(model)
cdef double _seconds(wait) except -1
