"""What of a head travels on, in C."""

from libc.stdint cimport int64_t

from tokenguard._fields cimport Fields


cdef class Asked:
    cdef Fields fields
    cdef readonly bint encoded
    cdef int given[4]
    cdef int twice
    cdef object values(self)
    cpdef identity(self)
    cpdef list forwarded(self, list credentials, str request_id)
    cpdef bytes forwarded_block(self, bytes ours, str request_id)


cdef class Told:
    cdef Fields fields
    cdef readonly int64_t length
    cdef readonly bytes encoding
    cdef readonly bint events
    cdef readonly bint typed
    cdef readonly bint measured
    cdef bint lists
    cdef bint once(self) except -1
    cdef int sort_out(self, bint drop_length, bint drop_encoding) except -1
    cpdef list returned(self, bint drop_length, bint drop_encoding)
    cpdef bytes returned_block(self, bint drop_length, bint drop_encoding, bytes last)
