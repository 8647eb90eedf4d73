cimport cython
from libc.stdint cimport int64_t, uint8_t

from tokenguard._fields cimport Fields


cdef Py_ssize_t find_head_end(const char *data, Py_ssize_t size) noexcept


@cython.final
cdef class AnswerReader:
    cdef readonly int status
    cdef Fields fields
    cdef readonly bint headed
    cdef readonly bint done
    cdef readonly bint reusable
    cdef bint bodiless
    cdef bytes pending
    cdef int state
    cdef int64_t left
    cdef Py_ssize_t interim
    cdef int line
    cdef int trailers

    cpdef void begin(self, bint bodiless)
    cpdef bytes feed(self, bytes data)
    cpdef bint end(self)
    cdef Py_ssize_t read_head(self, bytes data) except -2
    cdef bytes read_body(self, bytes data, Py_ssize_t at)
    cdef bytes read_chunks(self, bytes data, Py_ssize_t at)
    cdef int step(self, uint8_t c) except -1
    cdef int step_trailer(self, uint8_t c) except -1
