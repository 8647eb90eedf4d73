"""What the protocol behind the lane is spared, in C."""

cimport cython
from tokenguard._fields cimport lines_of

cdef int UNKNOWN


@cython.final
cdef class FieldsIn:
    cdef Py_ssize_t _max_bytes
    cdef object _refuse
    cdef list _headers
    cdef Py_ssize_t _bytes
    cdef public bint open
    cdef readonly bint expects

    cpdef begin(self, list headers)
    cpdef count(self, Py_ssize_t size)


@cython.final
@cython.freelist(64)
cdef class HeadOut:
    cdef readonly bytes lines
    cdef readonly long long length
    cdef readonly bint close


@cython.final
cdef class Sender:
    cdef object _cycle
    cdef dict _statuses
    cdef object _loop
    cdef object _transport
    cdef bytes _head

    @cython.locals(lines=list)
    cdef _begin(self, int status, HeadOut head)
    cpdef flush(self)
    @cython.locals(head=bytes)
    cpdef write(self, data)
