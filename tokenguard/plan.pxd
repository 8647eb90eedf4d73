"""What a call costs, in C."""

cimport cython
from libc.stdint cimport int64_t
from tokenguard.headroom cimport Headroom

cdef long long _KEPT, _ANY


@cython.final
cdef class Plan:
    cdef readonly tuple budgets
    cdef readonly object handle
    cdef readonly tuple groups
    cdef public tuple told
    cdef readonly int tokens_at
    cdef readonly int requests_at
    cdef readonly Headroom tokens_room
    cdef readonly Headroom requests_room
    cdef list _capacities
    cdef list _limits
    cdef readonly bint mirrors
    cdef readonly long long largest
    cdef tuple _ours
    cdef tuple _theirs
    cdef tuple _fixed
    cdef bint _plain
    cdef long long _small

    cpdef int64_t limit_at(self, int place) except -1
    @cython.locals(
        ours=tuple, theirs=tuple, costs=list, i=cython.int, capacity="long long", counted="long long",
    )
    cpdef tuple costs(self, long long prompt, long long total, most=*)
    @cython.locals(ours=tuple, theirs=tuple, deltas=list, i=cython.int, given="long long", room=Headroom)
    cpdef tuple deltas(self, tuple costs, tokens, bint unsent=*, bint heard=*)


cdef long long _half(long long capacity) noexcept
cdef long long _token_cost(long long capacity, long long prompt, long long total) noexcept
@cython.locals(least="long long")
cdef long long _counted(long long capacity, long long prompt, long long most) noexcept
