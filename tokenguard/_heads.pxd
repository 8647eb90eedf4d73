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


cdef enum:
    RATES = 9                     # fields that tell limits

cdef enum Limits:
    NONE
    USABLE
    UNUSABLE


cdef class Told:
    cdef Fields fields
    cdef readonly int limits
    cdef readonly bint usable
    cdef readonly int64_t requests_limit
    cdef readonly int64_t requests_left
    cdef readonly int64_t tokens_limit
    cdef readonly int64_t tokens_left
    cdef readonly int64_t tokens_left_of_limit
    cdef readonly bint in_windows
    cdef int rates[RATES]
    cdef int tokens_at
    cdef bint twice
    cdef int64_t rate(self, int number) noexcept
    cdef bint tells_whole_seconds(self, int number) noexcept
    cdef void weigh(self) noexcept
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
