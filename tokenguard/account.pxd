"""The account in C."""

cimport cython


@cython.final
@cython.freelist(64)
cdef class Account:
    cdef public object request_id
    cdef public object identity
    cdef public object model
    cdef public bint stream
    cdef public long long estimate
    cdef public long long prompt_estimate
    cdef public bint admitted
    cdef public object refused_by
    cdef public object outcome
    cdef public long long charged
    cdef public bint usage_told
    cdef public long long prompt
    cdef public long long forgiven
    cdef public int status
    cdef public object upstream_status
    cdef public object upstream_s
    cdef public object failure
    cdef public double seconds
