"""The exchange in C."""

cimport cython
from tokenguard._heads cimport Asked, Told
from tokenguard._refusal cimport refuse
from tokenguard.account cimport Account
from tokenguard.estimate cimport Estimator
from tokenguard.limiter cimport Refusal, Reservation
from tokenguard.plan cimport Plan
from tokenguard.model cimport Answer, Head, UpstreamRequest
from tokenguard.providers._chat cimport ChatRequest, Reader
from tokenguard.providers.openai cimport read_chat

cdef long long _UNKNOWN
cdef int MAX_REFUSAL_BYTES


cdef class Exchange


@cython.final
@cython.freelist(64)
cdef class Settlement:
    cdef readonly Reservation reservation
    cdef readonly Account account
    cdef readonly object tokens
    cdef readonly object usage
    cdef Exchange _exchange

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
    cdef readonly bytes lines

    cpdef estimate(self, ChatRequest request, team, user)


@cython.final
@cython.freelist(64)
cdef class Exchange:
    cdef readonly Account account
    cdef Terms _terms
    cdef bytes _body
    cdef ChatRequest _request
    cdef object _identity
    cdef object _estimate
    cdef Asked _asked
    cdef bint _in_lines
    cdef Reservation _reservation
    cdef Reader _reader
    cdef object _decoder
    cdef bint _refused
    cdef bint _stream
    cdef long long _bytes_left
    cdef public Told told
    cdef readonly tuple lowering
    cdef readonly bytes refusal
    cdef readonly bint refused_upstream
    cdef readonly bint is_outsize

    @cython.locals(asked=Asked, request=ChatRequest)
    cpdef begin(self, headers, body)
    cpdef reserved(self, reserved)
    cdef bint _adds_usage(self) except -1
    @cython.locals(told=Told, events=bint, decoded=bint, passed=list, reservation=Reservation)
    cpdef Head answered(self, int status, headers)
    cdef _weigh(self, Told told, Plan plan, Reservation reservation)
    cpdef bytes feed(self, bytes chunk)
    cpdef End finish(self)
    cpdef End abort(self, error=*)
    @cython.locals(reservation=Reservation)
    cdef Settlement _settlement(self, bint ended, bint refund)
    @cython.locals(request=ChatRequest)
    cpdef learn(self, usage)
