"""What counts a call, in C."""

cimport cython
from tokenguard._bucket cimport Tally
from tokenguard.account cimport Account

cdef double _MILLION


@cython.final
cdef class _Labelled:
    cdef object _table
    cdef object _name
    cdef dict _tallies

    @cython.locals(tally=Tally)
    cdef Tally of(self, tuple labels)


@cython.final
cdef class _Histogram:
    cdef tuple _bounds
    cdef list _tallies
    cdef Tally _sum

    @cython.locals(within=cython.int, bound=double, tally=Tally)
    cdef observe(self, double value)


@cython.final
cdef class _ModelErrors:
    cdef object _table
    cdef object _model
    cdef list _tallies

    @cython.locals(error=double, bound=double, within=cython.int, number=cython.int, tally=Tally)
    cdef count(self, int of, long long estimated, long long used)
    cpdef Tally tally(self, int of, int within)


@cython.final
cdef class _Errors:
    cdef object _table
    cdef dict _models
    cdef _ModelErrors _other
    cdef bint _full

    @cython.locals(errors=_ModelErrors)
    cdef _ModelErrors of(self, model)
    cpdef _meet(self, model)


cdef class Metrics:
    cdef object _registry
    cdef Tally _in_flight, _open, _reserved, _settled, _refunded, _overrun, _lost, _failures
    cdef _Histogram _seconds, _ratio
    cdef _Errors _errors
    cdef _Labelled _requests, _refusals, _answers, _limits

    cpdef answered(self, route, int status)
    cpdef began(self)
    cpdef admitted(self, Account account)
    @cython.locals(unused="long long", errors=_ModelErrors)
    cpdef settled(self, Account account)
    cpdef settlement_lost(self)
    cpdef upstream_answered(self, Account account)
    cpdef upstream_failed(self)
    cpdef provider_told(self, what)
    @cython.locals(bucket=object)
    cpdef ended(self, Account account)
