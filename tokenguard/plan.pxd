"""What a call costs, in C."""

cimport cython


@cython.final
cdef class Plan:
    cdef readonly tuple budgets
    cdef readonly object handle
    cdef readonly tuple groups
    cdef tuple _counts_tokens
    cdef long long _small

    cpdef tuple costs(self, prompt, total)
    @cython.locals(counted=tuple, i=cython.int)
    cpdef tuple deltas(self, tuple costs, tokens)
