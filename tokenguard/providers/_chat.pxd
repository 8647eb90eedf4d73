"""What the exchange uses of the readers without asking Python."""

cimport cython
from libc.stdint cimport int64_t


@cython.final
cdef class ChatRequest:
    cdef readonly str model
    cdef readonly bint stream
    cdef readonly int64_t choices
    cdef readonly object output_cap
    cdef readonly int64_t text_bytes
    cdef readonly int64_t text_256ths
    cdef readonly int64_t extra_tokens
    cdef readonly bint attachments
    cdef readonly bint asks_for_usage
    cdef object read_body
    cdef bytes raw
    cdef Py_ssize_t opening     # where stream_options may be put in; 0 where it may not

    cpdef bytes body_with_usage(self)


cpdef ChatRequest scan_chat(bytes raw)


cdef class Reader:
    cpdef bytes feed(self, bytes chunk)
    cpdef bytes rest(self)
    cpdef object final_usage(self, bint ended)


@cython.final
cdef class JsonAnswer(Reader):
    cdef list kept
    cdef int64_t size


@cython.final
cdef class EventStream(Reader):
    cdef readonly object usage
    cdef bint swallow_usage
    cdef bint finished
    cdef bytearray pending      # the beginning of an event
    cdef int64_t deltas
    cdef int64_t deltas_at_usage
    cdef int64_t delta_bytes

    cdef bint completes(self, bytes chunk) except -1
    cdef bytes overflow(self)
    cdef bytes pass_on(self, bytes data, const unsigned char *start, const unsigned char *end)
    cdef bint read(
        self, const unsigned char *start, const unsigned char *line, const unsigned char *behind
    ) except -1
    cdef bint read_carefully(self, bytes data) except -1
    cdef int take(self, int64_t deltas, int64_t delta_bytes, bint finished, object usage) except -1
