cimport cython

from tokenguard._fields cimport Fields
from tokenguard.model cimport UpstreamRequest
from tokenguard.upstream._http cimport AnswerReader


cdef double clock_s() noexcept nogil


cdef class Receiver:
    cdef Connection connection
    cdef bytes message
    cdef bint repeatable
    cdef bint bodiless
    cdef bint left
    cdef object patience
    cdef int answered(self, int status, Fields fields, bytes piece, bint done) except -1
    cdef int came(self, bytes piece, bint done) except -1
    cdef int failed(self, object error) except -1
    cdef void pause(self)
    cdef void resume(self)


@cython.final
cdef class Connection:
    cdef Pool pool
    cdef AnswerReader reader
    cdef Receiver receiver
    cdef object transport
    cdef int fd
    cdef bint reused
    cdef bint heard
    cdef bint told
    cdef bint paused
    cdef bint long
    cdef double deadline
    cdef double end
    cdef double idle_since
    cdef Py_ssize_t unsent
    cdef int carry(self, Receiver receiver, bint reused) except -1
    cdef Py_ssize_t outstanding(self) except -1
    cdef bint written(self)
    cdef bint healthy(self)
    cdef int finish(self, bint told, bytes piece) except -1
    cdef int fail(self, object error) except -1
    cdef void drop(self)


@cython.final
cdef class Pool:
    cdef readonly object hop
    cdef object loop
    cdef object tls
    cdef object sweeper
    cdef double tick_s
    cdef double read_timeout_s
    cdef double total_timeout_s
    cdef dict firsts
    cdef list idle
    cdef set connections
    cdef dict connecting
    cdef set dead
    cdef object waiting
    cdef bint closed
    cdef int most
    cdef bint by_loop
    cdef double now(self) except? -1
    cdef bytes write(self, UpstreamRequest request)
    cdef int send(self, Receiver receiver) except -1
    cdef int connect(self, Receiver receiver) except -1
    cdef Receiver next_waiting(self)
    cdef int free(self, Connection connection) except -1
    cdef void forget(self, Connection connection)
    cdef void leave(self, Receiver receiver)


@cython.final
cdef class PooledUpstream:
    cdef readonly Pool pool
