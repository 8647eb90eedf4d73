# cython: boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
# cython: freethreading_compatible=True, auto_pickle=False, autotestdict=False
"""HTTP/1.1 as bytes: reads heads and answers, writes heads. The stub, _http.pyi, is its manual.

What is read here is read strictly: every line ends in CRLF, a name is a token right before its colon, a value
holds no control character, a length is told once, in one way. What two readers could take for different things is
not taken at all, so that nothing can hide between two messages.

Source: RFC 9110, sections 5 and 6; RFC 9112, sections 2, 5, 6 and 7.

SAFETY: boundscheck is off. Every pointer runs from the beginning of a bytes object to its end, which is an
argument or a local of each function, and is compared to it before it is read from.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.mem cimport PyMem_Free, PyMem_Malloc
from cpython.object cimport PyObject
from libc.stdint cimport int64_t, uint8_t, uint32_t
from libc.string cimport memchr, memcmp, memcpy

from tokenguard.errors import UpstreamError

cdef extern from "string.h" nogil:
    void *memmem(const void *, size_t, const void *, size_t)

MAX_HEAD_BYTES = 65_536
MAX_FIELDS = 256
MAX_CHUNK_LINE_BYTES = 4_096
MAX_TRAILER_BYTES = 8_192

cdef Py_ssize_t HEAD_BYTES = MAX_HEAD_BYTES
cdef Py_ssize_t FIELDS = MAX_FIELDS
cdef int CHUNK_LINE_BYTES = MAX_CHUNK_LINE_BYTES
cdef int TRAILER_BYTES = MAX_TRAILER_BYTES

# --- tables -----------------------------------------------------------------------------------------------------

# What a character of a token is in lower case; 0 for what is none (RFC 9110, 5.6.2).
cdef uint8_t LOWER[256]
# Whether a character may stand in a value: no control character but the tab (RFC 9110, 5.5).
cdef uint8_t VISIBLE[256]

cdef enum:
    KNOWN_BITS = 9
    LONGEST_NAME = 256

# The names that are met again and again, by their hash: they are made once, and so is their hash for dicts.
cdef PyObject *KNOWN[1 << KNOWN_BITS]

cdef tuple _kept = tuple(
    b"accept accept-encoding accept-language access-control-allow-origin access-control-expose-headers age "
    b"alt-svc api-key authorization cache-control cf-cache-status cf-ray connection content-encoding "
    b"content-length content-type cookie date etag expect expires forwarded host idempotency-key "
    b"keep-alive location openai-beta openai-model openai-organization openai-processing-ms openai-project "
    b"openai-version origin pragma referer server set-cookie strict-transport-security te traceparent "
    b"tracestate trailer transfer-encoding upgrade user-agent vary via x-api-key x-content-type-options "
    b"x-envoy-upstream-service-time x-forwarded-for x-forwarded-host x-forwarded-proto x-llm-rolegroup "
    b"x-openai-proxy-wasm x-ratelimit-limit-requests x-ratelimit-limit-tokens "
    b"x-ratelimit-remaining-requests x-ratelimit-remaining-tokens x-ratelimit-reset-requests "
    b"x-ratelimit-reset-tokens x-real-ip x-request-id x-role x-stainless-arch x-stainless-async "
    b"x-stainless-lang x-stainless-os x-stainless-package-version x-stainless-read-timeout "
    b"x-stainless-retry-count x-stainless-runtime x-stainless-runtime-version x-team-id x-user-id".split()
)
cdef bytes CONTENT_LENGTH, TRANSFER_ENCODING, CONNECTION, HOST, EXPECT, UPGRADE


cdef uint32_t mixed(uint32_t seed, uint8_t c) noexcept nogil:
    return (seed ^ c) * 16777619


cdef void build_tables():
    global CONTENT_LENGTH, TRANSFER_ENCODING, CONNECTION, HOST, EXPECT, UPGRADE
    cdef int c
    cdef uint32_t place
    cdef bytes name
    for c in range(256):
        LOWER[c] = 0
        VISIBLE[c] = c == 9 or (c >= 32 and c != 127)
    for c in b"!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyz":
        LOWER[c] = c
    for c in range(65, 91):
        LOWER[c] = c + 32
    for name in _kept:
        place = place_of(PyBytes_AS_STRING(name), len(name))
        while KNOWN[place] != NULL:
            place = (place + 1) & ((1 << KNOWN_BITS) - 1)
        KNOWN[place] = <PyObject *>name
    CONTENT_LENGTH, TRANSFER_ENCODING = interned(b"content-length"), interned(b"transfer-encoding")
    CONNECTION, HOST = interned(b"connection"), interned(b"host")
    EXPECT, UPGRADE = interned(b"expect"), interned(b"upgrade")


cdef uint32_t place_of(const char *name, Py_ssize_t size) noexcept nogil:
    cdef uint32_t seed = 2166136261
    cdef Py_ssize_t i
    for i in range(size):
        seed = mixed(seed, <uint8_t>name[i])
    return (seed ^ seed >> 16) & ((1 << KNOWN_BITS) - 1)


cdef bytes interned(bytes name):
    return named(PyBytes_AS_STRING(name), len(name))


cdef bytes named(const char *name, Py_ssize_t size):
    """Return a name in lower case as an object: the one that is kept, if it is known."""
    cdef uint32_t place = place_of(name, size)
    cdef bytes known
    while KNOWN[place] != NULL:
        known = <bytes>KNOWN[place]
        if PyBytes_GET_SIZE(known) == size and not memcmp(PyBytes_AS_STRING(known), name, size):
            return known
        place = (place + 1) & ((1 << KNOWN_BITS) - 1)
    return PyBytes_FromStringAndSize(name, size)


build_tables()

# --- heads ------------------------------------------------------------------------------------------------------


cdef Py_ssize_t find_head_end(const char *data, Py_ssize_t size) noexcept:
    """Return how many bytes a head has, its blank line included; 0 if that has not come yet."""
    cdef const char *blank = <const char *>memmem(data, size, b"\r\n\r\n", 4)
    return 0 if blank == NULL else blank - data + 4


cdef list read_fields(const char *at, const char *end, Framing *framing):
    """Return the fields from ``at`` up to the blank line before ``end``, or None if they are not plain."""
    cdef list fields = []
    cdef bytes name, value
    cdef char lowered[LONGEST_NAME]
    cdef const char *start
    cdef const char *last
    cdef Py_ssize_t size
    cdef uint8_t c
    framing[0] = Framing(-1, False, False, False, False)
    while at + 2 < end:
        size = 0
        while at < end and size < LONGEST_NAME:
            c = LOWER[<uint8_t>at[0]]
            if c == 0:
                break
            lowered[size] = c
            size += 1
            at += 1
        if size == 0 or at >= end or at[0] != 58 or len(fields) >= FIELDS:
            return None
        at += 1
        while at < end and (at[0] == 32 or at[0] == 9):
            at += 1
        start = at
        while at < end and VISIBLE[<uint8_t>at[0]]:
            at += 1
        if at + 1 >= end or at[0] != 13 or at[1] != 10:
            return None
        last = at
        while last > start and (last - 1)[0] == 32:
            last -= 1
        # NOTE: a tab at the end stays: other readers do not take "chunked\t" for chunked.
        if last < at or (last > start and (last - 1)[0] == 9):
            framing.odd = True
        name = named(lowered, size)
        value = PyBytes_FromStringAndSize(start, last - start)
        at += 2
        if not frame(name, value, framing):
            return None
        fields.append((name, value))
    return fields


cdef bint frame(bytes name, bytes value, Framing *framing):
    """Take note of a field that says where a message ends; return False if it could be read in two ways."""
    if name is CONTENT_LENGTH:
        if framing.length >= 0 or framing.chunked:
            return False
        framing.length = number_of(value)
        return framing.length >= 0
    if name is TRANSFER_ENCODING:
        if framing.length >= 0 or framing.chunked or value.lower() != b"chunked":
            return False
        framing.chunked = True
    elif name is CONNECTION:
        for option in value.lower().split(b","):
            if option.strip(b" \t") == b"close":
                framing.close = True
    elif name is HOST:
        if framing.host:
            return False
        framing.host = True
    elif name is EXPECT or name is UPGRADE:
        framing.odd = True
    return True


cdef int64_t number_of(bytes digits) noexcept:
    """Return the number that 1 to 15 digits say, or -1."""
    cdef const char *at = PyBytes_AS_STRING(digits)
    cdef Py_ssize_t size = PyBytes_GET_SIZE(digits)
    cdef int64_t number = 0
    cdef Py_ssize_t i
    if not 1 <= size <= 15:
        return -1
    for i in range(size):
        if not 48 <= at[i] <= 57:
            return -1
        number = number * 10 + at[i] - 48
    return number


cdef bytes write_message(bytes first, list fields, bytes body, bint told):
    """Return a message: its first line, with CRLF, its fields, its length if that is to be told, and its body."""
    cdef Py_ssize_t size = PyBytes_GET_SIZE(first) + PyBytes_GET_SIZE(body) + 2
    cdef bytes name, value, message
    cdef bytes length = b"content-length: %d\r\n" % len(body) if told else b""
    cdef char *at
    for name, value in fields:
        size += PyBytes_GET_SIZE(name) + PyBytes_GET_SIZE(value) + 4
    message = PyBytes_FromStringAndSize(NULL, size + PyBytes_GET_SIZE(length))
    at = copied(PyBytes_AS_STRING(message), first)
    for name, value in fields:
        at = copied(at, name)
        at[0], at[1] = 58, 32
        at = copied(at + 2, value)
        at[0], at[1] = 13, 10
        at += 2
    at = copied(at, length)
    at[0], at[1] = 13, 10
    copied(at + 2, body)
    return message


cdef inline char *copied(char *at, bytes text) noexcept:
    memcpy(at, PyBytes_AS_STRING(text), PyBytes_GET_SIZE(text))
    return at + PyBytes_GET_SIZE(text)


def read_head(bytes head not None):
    cdef Framing framing
    cdef const char *at = PyBytes_AS_STRING(head)
    cdef const char *first = <const char *>memmem(at, PyBytes_GET_SIZE(head), b"\r\n", 2)
    if first == NULL or find_head_end(at, PyBytes_GET_SIZE(head)) != PyBytes_GET_SIZE(head):
        return None
    fields = read_fields(first + 2, at + PyBytes_GET_SIZE(head), &framing)
    if fields is None:
        return None
    return head[:first - at], fields, framing.length if framing.length >= 0 else None, framing.chunked


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

    cpdef void begin(self, bint bodiless):
        self.status = 0
        self.headers = None
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
        cdef Framing framing
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
            self.headers = read_fields(line, at + size, &framing)
            if self.headers is None:
                broken("its head can be read in two ways, or in none")
            at += size
            if not 100 <= self.status < 200:
                break
            if self.status == 101:
                broken("it changes to another protocol, which nobody asked for")
            self.interim += size
        if old and framing.chunked:
            broken("it is chunked, and of HTTP/1.0")
        self.headed = True
        self.reusable = not old and not framing.close
        self.left = framing.length
        if self.bodiless or self.status == 204 or self.status == 304 or framing.length == 0:
            self.state, self.done = OVER, True
        elif framing.chunked:
            self.state, self.line, self.trailers = SIZE_FIRST, 0, 0
        elif framing.length > 0:
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
