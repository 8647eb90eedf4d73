"""The fields, in C."""

cimport cython

cdef list _NAMES
cdef long long _NEVER_US

@cython.locals(group=tuple, found=list)
cpdef list tightest(tuple groups, list levels)
@cython.locals(names=tuple)
cpdef add_fields(list headers, meter, long long limit, long long level, long long full_in_us)
@cython.locals(ms="long long", minutes="long long", hours="long long", text=str)
cpdef str duration(long long us)
