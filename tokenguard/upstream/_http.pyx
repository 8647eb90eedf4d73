# cython: boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
# cython: freethreading_compatible=True, auto_pickle=False, autotestdict=False
"""HTTP/1.1 as bytes: reads heads and answers. The stub, _http.pyi, is its manual.

What is read here is read strictly, as the fields of a head are by _fields.pyx.

Source: RFC 9110, section 6; RFC 9112, sections 2, 6 and 7.

SAFETY: boundscheck is off. Every pointer runs from the beginning of a bytes object to its end, which is an
argument or a local of each function, and is compared to it before it is read from.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.mem cimport PyMem_Free, PyMem_Malloc
from libc.stdint cimport uint8_t
from libc.string cimport memchr, memcmp, memcpy

from tokenguard._fields cimport LOWER, MOST, VISIBLE, Fields

from tokenguard.errors import UpstreamError

cdef extern from "string.h" nogil:
    void *memmem(const void *, size_t, const void *, size_t)

MAX_HEAD_BYTES = 65_536
MAX_FIELDS = MOST
MAX_CHUNK_LINE_BYTES = 4_096
MAX_TRAILER_BYTES = 8_192

cdef Py_ssize_t HEAD_BYTES = MAX_HEAD_BYTES
cdef int CHUNK_LINE_BYTES = MAX_CHUNK_LINE_BYTES
cdef int TRAILER_BYTES = MAX_TRAILER_BYTES

# --- heads ------------------------------------------------------------------------------------------------------


cdef Py_ssize_t find_head_end(const char *data, Py_ssize_t size) noexcept:
    """Return how many bytes a head has, its blank line included; 0 if that has not come yet."""
    cdef const char *blank = <const char *>memmem(data, size, b"\r\n\r\n", 4)
    return 0 if blank == NULL else blank - data + 4


def read_head(bytes head not None):
    cdef Fields fields = Fields()
    cdef const char *at = PyBytes_AS_STRING(head)
    cdef const char *first = <const char *>memmem(at, PyBytes_GET_SIZE(head), b"\r\n", 2)
    if first == NULL or find_head_end(at, PyBytes_GET_SIZE(head)) != PyBytes_GET_SIZE(head):
        return None
    if not fields.read(head, first + 2, at + PyBytes_GET_SIZE(head)):
        return None
    return head[:first - at], fields.as_list(), fields.length if fields.length >= 0 else None, fields.chunked


# --- answers ----------------------------------------------------------------------------------------------------

cdef enum:
    HEAD
    LENGTH
    UNTIL_CLOSE
    SIZE_FIRST
    SIZE
    EXTENSION
    SIZE_LF
    DATA
    DATA_CR
    DATA_LF
    TRAILER_START
    TRAILER_NAME
    TRAILER
    TRAILER_LF
    LAST_LF
    OVER


cdef int broken(str what) except -1:
    raise UpstreamError(f"the provider's answer is no HTTP ({what})", sent=True)


cdef class AnswerReader:
    def __cinit__(self):
        self.begin(False)

    @property
    def headers(self):
        return None if self.fields is None else self.fields.as_list()

    cpdef void begin(self, bint bodiless):
        self.status = 0
        self.fields = None
        self.headed = self.done = self.reusable = False
        self.bodiless = bodiless
        self.pending = b""
        self.state = HEAD
        self.left = self.interim = 0

    cpdef bytes feed(self, bytes data):
        cdef Py_ssize_t at = 0
        if self.state == HEAD:
            if self.pending:
                data = self.pending + data
                self.pending = b""
            at = self.read_head(data)
            if at < 0:
                return b""
        return self.read_body(data, at)

    cpdef bint end(self):
        if self.state == UNTIL_CLOSE:
            self.state = OVER
            self.done = True
        return self.done

    cdef Py_ssize_t read_head(self, bytes data) except -2:
        """Read the head of an answer, and what comes before it; return where its body begins, or -1."""
        cdef const char *start = PyBytes_AS_STRING(data)
        cdef const char *at = start
        cdef const char *stop = start + PyBytes_GET_SIZE(data)
        cdef const char *line
        cdef Py_ssize_t size
        cdef Fields fields
        cdef bint old = False
        while True:
            size = find_head_end(at, stop - at)
            if self.interim + (size or stop - at) > HEAD_BYTES:
                broken(f"its head has over {MAX_HEAD_BYTES} bytes, those of interim answers included")
            if size == 0:
                if memcmp(at, b"HTTP/1.", min(stop - at, 7)):
                    broken("it begins with something else")
                self.pending = data[at - start:]
                return -1
            self.status = status_of(at, size, &old)
            if self.status < 0:
                broken("its first line is none")
            line = <const char *>memchr(at, 10, size) + 1
            self.fields = fields = Fields()
            if not fields.read(data, line, at + size):
                broken("its head can be read in two ways, or in none")
            at += size
            if not 100 <= self.status < 200:
                break
            if self.status == 101:
                broken("it changes to another protocol, which nobody asked for")
            self.interim += size
        if old and fields.chunked:
            broken("it is chunked, and of HTTP/1.0")
        self.headed = True
        self.reusable = not old and not fields.close
        self.left = fields.length
        if self.bodiless or self.status == 204 or self.status == 304 or fields.length == 0:
            self.state, self.done = OVER, True
        elif fields.chunked:
            self.state, self.line, self.trailers = SIZE_FIRST, 0, 0
        elif fields.length > 0:
            self.state = LENGTH
        else:
            self.state, self.reusable = UNTIL_CLOSE, False
        return at - start

    cdef bytes read_body(self, bytes data, Py_ssize_t at):
        """Return what ``data`` from ``at`` on adds to the body."""
        cdef Py_ssize_t size = PyBytes_GET_SIZE(data) - at
        if size == 0:
            return b""
        if self.state == LENGTH:
            if size >= self.left:
                self.state, self.done = OVER, True
                if size > self.left:
                    self.reusable = False  # nobody asked for what follows
                    size = self.left
            self.left -= size
        elif self.state == OVER:
            self.reusable = False
            return b""
        elif self.state != UNTIL_CLOSE:
            return self.read_chunks(data, at)
        if size == PyBytes_GET_SIZE(data):
            return data
        return PyBytes_FromStringAndSize(PyBytes_AS_STRING(data) + at, size)

    cdef bytes read_chunks(self, bytes data, Py_ssize_t start):
        """Return the chunks' data; all of it in one piece, however many chunks there are."""
        cdef const char *at = PyBytes_AS_STRING(data) + start
        cdef const char *stop = PyBytes_AS_STRING(data) + PyBytes_GET_SIZE(data)
        cdef char *body = <char *>PyMem_Malloc(stop - at)
        cdef Py_ssize_t size, written = 0
        if body == NULL:
            raise MemoryError
        try:
            while at < stop and self.state != OVER:
                if self.state != DATA:
                    self.step(<uint8_t>at[0])
                    at += 1
                    continue
                size = min(stop - at, self.left)
                memcpy(body + written, at, size)
                written += size
                at += size
                self.left -= size
                if self.left == 0:
                    self.state = DATA_CR
            if self.state == OVER:
                self.done = True
                self.reusable = self.reusable and at == stop
            return PyBytes_FromStringAndSize(body, written)
        finally:
            PyMem_Free(body)

    cdef int step(self, uint8_t c) except -1:
        """Take in one byte of what surrounds the chunks' data (RFC 9112, 7.1)."""
        cdef int digit
        if self.state == SIZE_FIRST or self.state == SIZE:
            digit = hex_of(c)
            if digit >= 0:
                self.left = digit if self.state == SIZE_FIRST else self.left << 4 | digit
                self.line += 1
                if self.line > 12:
                    broken("a chunk is larger than anything")
                self.state = SIZE
            elif self.state == SIZE_FIRST:
                broken("a chunk has no size")
            elif c == 13:
                self.state = SIZE_LF
            elif c == 59:
                self.state = EXTENSION
            else:
                broken("a chunk's size is no number")
        elif self.state == EXTENSION:
            self.line += 1
            if c == 13:
                self.state = SIZE_LF
            elif not VISIBLE[c] or self.line > CHUNK_LINE_BYTES:
                broken("a chunk's extension is too long, or no text")
        elif self.state == SIZE_LF:
            if c != 10:
                broken("a chunk's size does not end its line")
            self.line = 0
            self.state = DATA if self.left else TRAILER_START
        elif self.state == DATA_CR:
            if c != 13:
                broken("a chunk is longer than its size")
            self.state = DATA_LF
        elif self.state == DATA_LF:
            if c != 10:
                broken("a chunk is longer than its size")
            self.state = SIZE_FIRST
        else:
            self.step_trailer(c)
        return 0

    cdef int step_trailer(self, uint8_t c) except -1:
        """Take in one byte behind the last chunk; what stands there is for nobody."""
        self.trailers += 1
        if self.trailers > TRAILER_BYTES:
            broken(f"its trailer has over {MAX_TRAILER_BYTES} bytes")
        if self.state == TRAILER_START:
            if c == 13:
                self.state = LAST_LF
            elif LOWER[c]:
                self.state = TRAILER_NAME
            else:
                broken("its trailer is none")
        elif self.state == TRAILER_NAME:
            if c == 58:
                self.state = TRAILER
            elif not LOWER[c]:
                broken("its trailer is none")
        elif self.state == TRAILER:
            if c == 13:
                self.state = TRAILER_LF
            elif not VISIBLE[c]:
                broken("its trailer is none")
        elif c != 10:
            broken("a line of its trailer does not end")
        else:
            self.state = OVER if self.state == LAST_LF else TRAILER_START
        return 0


cdef int status_of(const char *line, Py_ssize_t size, bint *old) noexcept:
    """Return the status that a first line tells, and whether it is HTTP/1.0's; -1 if it is none (RFC 9112, 4)."""
    cdef const char *at = line + 12
    cdef const char *stop = line + size
    if size < 16 or memcmp(line, b"HTTP/1.", 7) or line[8] != 32 or not 48 <= line[7] <= 49:
        return -1
    if not (49 <= line[9] <= 57 and 48 <= line[10] <= 57 and 48 <= line[11] <= 57):
        return -1
    old[0] = line[7] == 48
    if at[0] == 32:
        while at < stop and VISIBLE[<uint8_t>at[0]]:
            at += 1
    if at + 1 >= stop or at[0] != 13 or at[1] != 10:
        return -1
    return (line[9] - 48) * 100 + (line[10] - 48) * 10 + line[11] - 48


cdef int hex_of(uint8_t c) noexcept:
    if 48 <= c <= 57:
        return c - 48
    c |= 32
    return c - 87 if 97 <= c <= 102 else -1
