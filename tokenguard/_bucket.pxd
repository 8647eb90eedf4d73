"""What other compiled modules use of the table of buckets without asking Python: outcomes, tallies, numbers."""

cimport cython
from libc.stdint cimport int64_t, uint16_t, uint32_t, uint64_t

cdef struct Slot:                 # 64 bytes, one cache line
    uint64_t print_hi
    uint32_t print_lo
    uint16_t seq                  # moves with every write; odd while one is under way
    uint16_t pace                 # number of the tick's length; 0: the slot is free, `level` the next free one
    int64_t level
    int64_t tick
    int64_t capacity
    int64_t debt
    int64_t gain
    int64_t unit

cdef struct Entry:                # one bucket of a handle: a slot as it should be, and where it was last seen
    Slot want
    uint32_t slot

cdef struct Bucket:               # one bucket of an outcome
    int64_t level
    int64_t tick
    int64_t cost
    int64_t wait_us

cdef struct State:                # the same as it is told
    int64_t limit
    int64_t level
    int64_t cost
    int64_t wait_us
    int64_t full_in_us


@cython.final
cdef class Handle:
    cdef Entry *entries
    cdef object owner
    cdef readonly uint64_t epoch
    cdef int count


@cython.final
@cython.freelist(64)
cdef class Outcome:
    cdef Handle plan
    cdef public object handle
    cdef Bucket *seen
    cdef int64_t now_us
    cdef readonly bint allowed
    cdef readonly int binding

    cdef int check(self, int i) except -1
    cpdef int64_t level(self, int i) except? -1
    cpdef int64_t limit(self, int i) except? -1
    cpdef int64_t cost(self, int i) except? -1
    cpdef int64_t wait_us(self, int i) except? -1
    cpdef int64_t full_in_us(self, int i) except? -1
    cdef int tell(self, int i, State *state) except -1


@cython.final
cdef class Shared:
    cdef object table
    cdef int64_t *numbers
    cdef int64_t alone[7]

    cdef int check(self, int i) except -1
    cpdef int64_t add(self, int i, int64_t amount) except? -1
    cpdef int64_t get(self, int i) except? -1
    cpdef int set(self, int i, int64_t number) except -1


@cython.final
cdef class Tally:
    cdef object table
    cdef uint32_t number

    cpdef add(self, int64_t amount=*)
    cpdef set(self, int64_t number)
