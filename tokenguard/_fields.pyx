# cython: boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
# cython: freethreading_compatible=True, auto_pickle=False, autotestdict=False
"""Header fields where they stand: read from a head, or found in a list, and copied once, to where they travel.

What is read is read strictly: every line ends in CRLF, a name is a token right before its colon, a value holds no
control character, a length is told once, in one way. What two readers could take for different things is not taken
at all, so that nothing can hide between two messages.

Source: RFC 9110, section 5; RFC 9112, sections 5 and 6.

SAFETY: boundscheck is off. A line points into ``held``, which lives as long as its fields do; lines are counted,
and there is room for as many. What is read from a head is compared to the head's end first.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.mem cimport PyMem_Free, PyMem_Malloc
from cpython.object cimport PyObject
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memchr, memcmp, memcpy

MAX_FIELDS = MOST

cdef enum:
    PLACES = 1024                 # of names, by their hash; at most a quarter is taken
    LONGEST = 256                 # bytes of a name

cdef uint32_t FIRST_HASH = 2166136261
cdef PyObject *NAME[NAMES]
cdef list numbered = []          # the names, so that they live
cdef uint8_t PLACE[PLACES]
cdef int names = 0


cdef inline uint32_t mixed(uint32_t hash, uint8_t c) noexcept nogil:
    return (hash ^ c) * 16777619


cdef inline uint32_t first_place(uint32_t hash) noexcept nogil:
    return (hash ^ hash >> 16) & (PLACES - 1)


cdef int number(const char *name, Py_ssize_t size, uint32_t hash) noexcept:
    """Return the number of a name in lower case, 0 if it has none."""
    cdef uint32_t place = first_place(hash)
    cdef int n = PLACE[place]
    while n:
        found = <object>NAME[n]
        if PyBytes_GET_SIZE(found) == size and not memcmp(PyBytes_AS_STRING(found), name, size):
            return n
        place = (place + 1) & (PLACES - 1)
        n = PLACE[place]
    return 0


cdef int known(bytes name):
    """Give a name a number, by which its lines are known, and return it; it keeps it."""
    global names
    cdef uint32_t hash = FIRST_HASH
    cdef uint32_t place
    cdef uint8_t c
    for c in name:
        hash = mixed(hash, c)
    found = number(PyBytes_AS_STRING(name), len(name), hash)
    if found:
        return found
    if names == NAMES - 1:
        raise ValueError(f"there is no number for {name!r}: all {NAMES - 1} are given")
    place = first_place(hash)
    while PLACE[place]:
        place = (place + 1) & (PLACES - 1)
    names += 1
    numbered.append(name)
    NAME[names] = <PyObject *>name
    PLACE[place] = names
    return names


cdef void begin():
    cdef int c
    for c in range(256):
        LOWER[c] = 0
        VISIBLE[c] = c == 9 or (c >= 32 and c != 127)
    for c in b"!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyz":
        LOWER[c] = c
    for c in range(65, 91):
        LOWER[c] = c + 32


begin()

# The first numbers are those of what says where a message ends, or asks for more than an answer.
cdef int CONTENT_LENGTH = known(b"content-length")
cdef int TRANSFER_ENCODING = known(b"transfer-encoding")
cdef int CONNECTION = known(b"connection")
cdef int HOST = known(b"host")
cdef int EXPECT = known(b"expect")
cdef int UPGRADE = known(b"upgrade")

# Names that are met again and again are objects once.
for _name in (
    b"accept accept-language access-control-expose-headers alt-svc cache-control cf-cache-status cf-ray "
    b"content-type date etag idempotency-key openai-model openai-processing-ms openai-version origin "
    b"pragma referer server traceparent tracestate user-agent vary x-content-type-options "
    b"x-envoy-upstream-service-time x-openai-proxy-wasm x-stainless-arch x-stainless-async "
    b"x-stainless-lang x-stainless-os x-stainless-package-version x-stainless-read-timeout "
    b"x-stainless-retry-count x-stainless-runtime x-stainless-runtime-version".split()
):
    known(_name)


cdef class Fields:
    """The fields of one head.

    Attributes, of what is read from a head:
        length: What content-length tells; -1 if nothing does.
        chunked, close, keep_alive, host: Whether transfer-encoding, connection and host say so.
        odd: Whether something is asked for that belongs to no plain request, or readers may differ on a value.
    """

    def __cinit__(self):
        self.lines = self.few
        self.length = -1

    def __dealloc__(self):
        if self.lines != self.few:
            PyMem_Free(self.lines)

    cdef Line *more(self) except? NULL:
        """Return room for one more line; NULL if there are too many."""
        if self.count == MOST:
            return NULL
        if self.count == FEW:
            self.make_room(MOST)
        self.count += 1
        return &self.lines[self.count - 1]

    cdef int make_room(self, Py_ssize_t lines) except -1:
        """See to it that there is room for so many lines."""
        cdef Line *room
        if lines > FEW and self.lines == self.few:
            room = <Line *>PyMem_Malloc(lines * sizeof(Line))
            if room == NULL:
                raise MemoryError
            memcpy(room, self.few, self.count * sizeof(Line))
            self.lines = room
        return 0

    cdef bint read(self, bytes held, const char *at, const char *end) except -1:
        """Read the lines from ``at`` up to the blank line before ``end``; return False if they are not plain."""
        cdef Line *line
        cdef const char *last
        cdef char lowered[LONGEST]
        cdef uint32_t hash
        cdef int size
        cdef uint8_t c
        self.held = held
        while at + 2 < end:
            line = self.more()
            if line == NULL:
                return False
            line.name = at
            line.dropped = False
            hash = FIRST_HASH
            size = 0
            while at < end and size < LONGEST:
                c = LOWER[<uint8_t>at[0]]
                if c == 0:
                    break
                lowered[size] = c
                hash = mixed(hash, c)
                size += 1
                at += 1
            if size == 0 or at >= end or at[0] != c":":
                return False
            line.name_size = size
            line.known = number(lowered, size, hash)
            at += 1
            while at < end and (at[0] == c" " or at[0] == c"\t"):
                at += 1
            last = <const char *>memchr(at, c"\r", end - at)
            if last == NULL or last + 1 >= end or last[1] != c"\n" or not is_visible(at, last):
                return False
            line.value = at
            at = last + 2
            if last > line.value and ((last - 1)[0] == c" " or (last - 1)[0] == c"\t"):
                self.odd = True
            # NOTE: a tab at the end stays: other readers do not take "chunked<tab>" for chunked.
            while last > line.value and (last - 1)[0] == c" ":
                last -= 1
            line.value_size = last - line.value
            if line.known and line.known <= UPGRADE and not self.frame(line):
                return False
        return True

    cdef bint frame(self, Line *line) except -1:
        """Take note of a line that says where a message ends; return False if it could be read in two ways."""
        cdef bytes option
        if line.known == CONTENT_LENGTH:
            if self.length >= 0 or self.chunked:
                return False
            self.length = number_of(line.value, line.value_size)
            return self.length >= 0
        if line.known == TRANSFER_ENCODING:
            if self.length >= 0 or self.chunked or not is_text(line, b"chunked", 7):
                return False
            self.chunked = True
        elif line.known == CONNECTION:
            for option in line.value[:line.value_size].lower().split(b","):
                option = option.strip(b" \t")
                if option == b"close":
                    self.close = True
                elif option == b"keep-alive":
                    self.keep_alive = True
        elif line.known == HOST:
            if self.host:
                return False
            self.host = True
        else:
            self.odd = True
        return True

    cpdef list as_list(self):
        """Return the fields as (name, value), names in lower case."""
        cdef list fields = []
        cdef Line *line
        cdef int i
        for i in range(self.count):
            line = &self.lines[i]
            fields.append((name_of(line), PyBytes_FromStringAndSize(line.value, line.value_size)))
        return fields


cdef bytes name_of(Line *line):
    """Return a line's name in lower case."""
    return <bytes>NAME[line.known] if line.known else line.name[:line.name_size].lower()


cdef Fields fields_of(headers):
    """Return the fields of a list, whose names are in lower case; or what are fields already."""
    cdef Fields fields
    cdef Line *line
    cdef bytes name, value
    cdef uint32_t hash
    cdef uint8_t c
    if isinstance(headers, Fields):
        return <Fields>headers
    fields = Fields()
    fields.held = held = []
    fields.make_room(len(headers))
    for name, value in headers:
        held.append((name, value))
        line = &fields.lines[fields.count]
        fields.count += 1
        hash = FIRST_HASH
        for c in name:
            hash = mixed(hash, c)
        line.name, line.name_size = PyBytes_AS_STRING(name), len(name)
        line.value, line.value_size = PyBytes_AS_STRING(value), len(value)
        line.known = number(line.name, line.name_size, hash)
        line.dropped = False
    return fields


cpdef bytes lines_of(list headers):
    """Return a list of fields as lines."""
    cdef list parts = []
    for name, value in headers:
        parts += name, b": ", value, b"\r\n"
    return b"".join(parts)


cpdef list list_of(bytes lines):
    return [tuple(line.split(b": ", 1)) for line in lines.splitlines()]


cdef bint is_visible(const char *at, const char *end) noexcept:
    """Return whether text holds no control character but the tab."""
    # PERF: eight at a time; a byte below 32 borrows from its highest bit, and 127 is looked for as a zero
    cdef uint64_t eight, below, rubout
    while end - at >= 8:
        memcpy(&eight, at, 8)
        below = (eight - <uint64_t>0x2020202020202020) & ~eight
        rubout = eight ^ <uint64_t>0x7F7F7F7F7F7F7F7F
        rubout = (rubout - <uint64_t>0x0101010101010101) & ~rubout
        if (below | rubout) & <uint64_t>0x8080808080808080:
            break
        at += 8
    while at < end:
        if not VISIBLE[<uint8_t>at[0]]:
            return False
        at += 1
    return True


cdef bint begins(Line *line, const char *text, int size) noexcept:
    """Return whether a line's name begins so."""
    cdef int i
    if line.name_size < size:
        return False
    for i in range(size):
        if LOWER[<uint8_t>line.name[i]] != <uint8_t>text[i]:
            return False
    return True


cdef bint is_text(Line *line, const char *text, int size) noexcept:
    """Return whether a line's value is so, in whatever case."""
    cdef int i
    if line.value_size != size:
        return False
    for i in range(size):
        if line.value[i] != text[i] and LOWER[<uint8_t>line.value[i]] != <uint8_t>text[i]:
            return False
    return True


cdef int64_t number_of(const char *at, Py_ssize_t size) noexcept:
    """Return the number that 1 to 15 digits say, or -1."""
    cdef int64_t number = 0
    cdef Py_ssize_t i
    if not 1 <= size <= 15:
        return -1
    for i in range(size):
        if not c"0" <= at[i] <= c"9":
            return -1
        number = number * 10 + at[i] - c"0"
    return number


cdef char *put_line(char *at, Line *line) noexcept:
    """Write a line; return where the next begins."""
    cdef int i
    if line.known:
        memcpy(at, PyBytes_AS_STRING(<object>NAME[line.known]), line.name_size)
    else:
        for i in range(line.name_size):
            at[i] = LOWER[<uint8_t>line.name[i]]
    at += line.name_size
    at[0], at[1] = c":", c" "
    memcpy(at + 2, line.value, line.value_size)
    at += 2 + line.value_size
    at[0], at[1] = c"\r", c"\n"
    return at + 2
