"""What other compiled modules use of the fields without asking Python."""

from libc.stdint cimport int64_t

from tokenguard._bucket cimport Outcome

cdef enum:
    FIELDS = 3 * 128              # bytes of the fields that tell of a bucket, at most; a name has 30

cpdef list limit_headers(tuple groups, Outcome outcome)
cpdef bytes limit_lines(tuple groups, Outcome outcome)

cdef tuple names_of(meter)

# What is put writes from a place on, and returns where the next goes. A number has at most 20 bytes, a time 21.
cdef char *put_fields(char *at, tuple names, int64_t limit, int64_t level, int64_t full_in_us)
cdef char *put_number(char *at, int64_t amount) noexcept nogil
cdef char *put_duration(char *at, int64_t us) noexcept nogil
