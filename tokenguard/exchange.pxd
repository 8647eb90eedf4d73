"""The exchange in C."""

cimport cython
from tokenguard.account cimport Account
from tokenguard.estimate cimport Estimator
from tokenguard.limiter cimport Reservation
from tokenguard.model cimport Answer, Head, UpstreamRequest

cdef tuple _SHOWN
cdef tuple _PLAIN
cdef dict _known
cdef int _UNKNOWN
cdef int _MOST_DIGITS
cdef int _PASSED, _DROPPED, _ENCODING, _CONNECTION
cdef dict _MEANINGS
cdef dict _RETURNED


cdef class Exchange


@cython.final
@cython.freelist(64)
cdef class Settlement:
    cdef readonly Reservation reservation
    cdef readonly Account account
    cdef readonly object tokens
    cdef Exchange _exchange
    cdef object _usage

    @cython.locals(account=Account)
    cpdef settled(self, forgiven)
    cpdef keep(self)


@cython.final
@cython.freelist(64)
cdef class End:
    cdef readonly Settlement settlement
    cdef readonly bytes rest
    cdef readonly Answer answer


@cython.final
cdef class Terms:
    cdef readonly list credentials
    cdef readonly Estimator estimator
    cdef readonly bint ask_for_usage
    cdef readonly object jitter


@cython.final
@cython.freelist(64)
cdef class Exchange:
    cdef readonly Account account
    cdef Terms _terms
    cdef bytes _body
    cdef object _request
    cdef object _identity
    cdef object _estimate
    cdef list _forwarded
    cdef Reservation _reservation
    cdef object _reader
    cdef object _decoder
    cdef bint _refused
    cdef bint _stream
    cdef long long _bytes_left

    @cython.locals(fields=_Fields)
    cpdef begin(self, headers, body)
    cpdef reserved(self, reserved)
    cdef bint _adds_usage(self) except -1
    @cython.locals(encoding=bytes, length=bytes, content_type=bytes, name=bytes, value=bytes,
                   readable=bint, events=bint, changed=bint, passed=list)
    cpdef Head answered(self, int status, headers)
    cpdef bytes feed(self, bytes chunk)
    cpdef End finish(self)
    cpdef End abort(self, error=*)
    @cython.locals(reservation=Reservation)
    cdef Settlement _settlement(self, bint ended, bint refund)
    cpdef learn(self, usage)


@cython.final
@cython.freelist(64)
cdef class _Fields:
    cdef list kept
    cdef bint encoded
    cdef list _given
    cdef str _twice

    @cython.locals(name=bytes, value=bytes, listed=bytes, meaning=cython.int)
    cdef _sort_out(self, headers)
    @cython.locals(given=tuple)
    cdef identity(self)
    cdef list forwarded(self, list credentials, str request_id)


cpdef read_identity(headers)
cpdef list forwarded_headers(headers, list credentials, str request_id)
@cython.locals(kept=list, listed=bytes, name=bytes, value=bytes, shown=bytes)
cpdef list returned_headers(headers, bint drop_length, bint drop_encoding)
cdef bint _is_ours(bytes name) except -1
cdef list _without_listed(list headers, bytes listed)
