"""Header fields where they stand, in C."""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from libc.stdint cimport int64_t, uint8_t
from libc.string cimport memcpy

cdef enum:
    FEW = 32
    MOST = 256
    NAMES = 256

cdef struct Line:
    const char *name
    const char *value
    int name_size
    int value_size
    int known
    bint dropped


cdef class Fields:
    cdef Line few[FEW]
    cdef Line *lines
    cdef int count
    cdef object held
    cdef int64_t length
    cdef bint chunked
    cdef bint close
    cdef bint keep_alive
    cdef bint host
    cdef bint odd

    cdef Line *more(self) except? NULL
    cdef int make_room(self, Py_ssize_t lines) except -1
    cdef bint read(self, bytes held, const char *at, const char *end) except -1
    cdef bint frame(self, Line *line) except -1
    cpdef list as_list(self)


cdef uint8_t LOWER[256]
cdef uint8_t VISIBLE[256]

cdef int known(bytes name)
cdef bytes name_of(Line *line)
cdef Fields fields_of(headers)
cpdef bytes lines_of(list headers)
cpdef list list_of(bytes lines)
cdef bint begins(Line *line, const char *text, int size) noexcept
cdef bint is_text(Line *line, const char *text, int size) noexcept
cdef int64_t number_of(const char *at, Py_ssize_t size) noexcept
cdef char *put_line(char *at, Line *line) noexcept


cdef inline char *put_text(char *at, bytes text) noexcept:
    """Write a text; return where the next goes."""
    memcpy(at, PyBytes_AS_STRING(text), PyBytes_GET_SIZE(text))
    return at + PyBytes_GET_SIZE(text)
