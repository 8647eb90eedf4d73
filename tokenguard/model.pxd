"""What goes between a driver and an exchange, in C."""

cimport cython
from tokenguard._fields cimport list_of


@cython.final
@cython.freelist(64)
cdef class Answer:
    cdef readonly int status
    cdef readonly bytes body
    cdef readonly bytes block
    cdef list _headers


@cython.final
@cython.freelist(64)
cdef class Head:
    cdef readonly int status
    cdef readonly list headers
    cdef readonly bytes block
    cdef readonly bint typed
    cdef readonly bint measured


@cython.final
@cython.freelist(64)
cdef class UpstreamRequest:
    cdef readonly object method
    cdef readonly object path
    cdef readonly list headers
    cdef readonly bytes body
    cdef readonly bint stream
    cdef readonly bytes block
