"""A call over ASGI, in C."""

cimport cython
from tokenguard._heads cimport Asked
from tokenguard.api.call cimport CallSoon, Guard
from tokenguard.model cimport Answer, Head

cdef long long NONE, ODD


cdef class Patience:
    cdef double timeout_s


@cython.final
@cython.freelist(64)
cdef class InTime:
    cdef object _awaited
    cdef Patience _patience
    cdef object _task
    cdef bint _late


@cython.final
cdef class Incoming(Patience):
    cdef object _receive
    cdef bint _complete


@cython.final
cdef class Outgoing(Patience):
    cdef object _send


@cython.final
cdef class AsgiCall(CallSoon):
    cdef object _upstream
    cdef object _response
    cdef object _chunks
    cdef object _task
    cdef object _watcher
    cdef bint _waits
    cdef bint _caller_gone
    cdef bint _done
    cdef readonly Head head
    cdef readonly bint ended

    cdef count(self, int status)


@cython.final
cdef class Chat:
    cdef readonly Guard guard
    cdef readonly object upstream


@cython.locals(fields=dict)
cdef dict _start(int status, list headers, request_id)
@cython.locals(length="long long")
cdef long long _length_of(headers) except -3
