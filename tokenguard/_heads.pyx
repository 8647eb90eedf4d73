# cython: boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
# cython: freethreading_compatible=True, auto_pickle=False, autotestdict=False
"""What of a head travels on, and what it says of a call. The stub, _heads.pyi, is its manual.

A head comes as a list of fields, or as the bytes of a connection; what becomes of each field is decided once, for
both, and is handed on as a list or as bytes.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.stdint cimport uint8_t
from libc.string cimport memcpy, memset

from tokenguard._fields cimport (
    NAMES, Fields, Line, begins, fields_of, is_text, known, lines_of, name_of, number_of, put_line,
)

from tokenguard.errors import InvalidRequest
from tokenguard.model import Identity, checked_name

IDENTITY_HEADERS = {
    b"x-user-id": "user",
    b"x-team-id": "team",
    b"x-role": "role",
    b"x-llm-rolegroup": "rolegroup",
}
REQUEST_ID = b"x-request-id"
MAX_KNOWN = 4096
LIMITS = ("requests", "tokens", "project-tokens")

cdef tuple SHOWN = tuple([name.decode() for name in IDENTITY_HEADERS])

HOP_BY_HOP = (
    b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"proxy-connection", b"te",
    b"trailer", b"transfer-encoding", b"upgrade",
)
NOT_TO_UPSTREAM = (
    *HOP_BY_HOP,
    # what the hop to the provider sets itself
    b"host", b"content-length", b"content-type", b"accept-encoding", b"expect",
    # the caller's credentials, and the choice of the account that pays
    b"authorization", b"cookie", b"api-key", b"x-api-key", b"openai-organization", b"openai-project",
    b"x-goog-api-key", b"ocp-apim-subscription-key",
    # what could turn the request into another one
    b"x-http-method-override", b"x-http-method", b"x-method-override",
    # who calls, and from where: nobody else's business
    *IDENTITY_HEADERS, REQUEST_ID, b"forwarded", b"via", b"x-real-ip",
)
NOT_TO_CALLER = (
    *HOP_BY_HOP,
    # what speaks of the provider's host, where the caller sees ours
    b"date", b"server", b"location", b"set-cookie", b"alt-svc", b"strict-transport-security",
)

cdef enum:
    MOST_BYTES = 256              # of a value that is remembered: as many as an id may have

cdef enum:
    PASSED
    DROPPED
    RENAMED
    CONNECTION
    ENCODING
    LENGTH
    TYPE
    PART                          # of an identity; the next three numbers are the others
    RATE = PART + 4               # of the provider's limits: limit, remaining and reset of each of LIMITS

cdef uint8_t ASKED[NAMES]         # what a field of a request means, by its name's number
cdef uint8_t TOLD[NAMES]          # likewise, of an answer

for _name in NOT_TO_UPSTREAM:
    ASKED[known(_name)] = DROPPED
for _name in NOT_TO_CALLER:
    TOLD[known(_name)] = DROPPED
for _part, _name in enumerate(IDENTITY_HEADERS):
    ASKED[known(_name)] = PART + _part
for _number, _of in enumerate(LIMITS):
    for _place, _what in enumerate(("limit", "remaining", "reset")):
        TOLD[known(f"x-ratelimit-{_what}-{_of}".encode())] = RATE + 3 * _number + _place
ASKED[known(b"content-encoding")] = TOLD[known(b"content-encoding")] = ENCODING
ASKED[known(b"connection")] = TOLD[known(b"connection")] = CONNECTION
TOLD[known(b"content-length")] = LENGTH
TOLD[known(b"content-type")] = TYPE
TOLD[known(REQUEST_ID)] = RENAMED

cdef dict identities = {}
cdef bytes ID = b"x-request-id: "


cdef bint names_others(Line *line) noexcept:
    """Return whether a field named ``connection`` names fields that are for one hop alone."""
    return not (is_text(line, b"keep-alive", 10) or is_text(line, b"close", 5))


cdef int drop_listed(Fields fields) except -1:
    """Drop what fields named ``connection`` name."""
    cdef set listed = set()
    cdef Line *line
    cdef int connection = known(b"connection")
    cdef int i
    for i in range(fields.count):
        line = &fields.lines[i]
        if line.known == connection:
            for name in line.value[:line.value_size].lower().split(b","):
                listed.add(name.strip())
    for i in range(fields.count):
        line = &fields.lines[i]
        if name_of(line) in listed:
            line.dropped = True
    return 0


cdef class Asked:
    def __cinit__(self, headers not None):
        cdef Line *line
        cdef bint lists = False
        cdef int meaning, part, i
        self.fields = fields_of(headers)
        self.given[0] = self.given[1] = self.given[2] = self.given[3] = -1
        self.twice = -1
        for i in range(self.fields.count):
            line = &self.fields.lines[i]
            meaning = ASKED[line.known]
            if meaning >= PART:
                part = meaning - PART
                if self.given[part] >= 0 and self.twice < 0:
                    self.twice = part
                self.given[part] = i
                line.dropped = True
            elif meaning == CONNECTION:
                lists = lists or names_others(line)
                line.dropped = True
            elif meaning == ENCODING:
                self.encoded = True
            else:
                line.dropped = meaning == DROPPED or (
                    not line.known and (begins(line, b"x-forwarded-", 12) or begins(line, b"x-tokenguard-", 13))
                )
        if lists:
            drop_listed(self.fields)

    cdef object values(self):
        """Return the values of the identity's fields, None for those that are not there."""
        cdef Line *line
        cdef list values = []
        cdef int part
        for part in range(4):
            if self.given[part] < 0:
                values.append(None)
            else:
                line = &self.fields.lines[self.given[part]]
                values.append(line.value[:line.value_size])
        return values

    cpdef identity(self):
        # PERF: what has been checked before is found by its bytes, each part behind its length
        cdef char key[4 * (MOST_BYTES + 2)]
        cdef char *at = key
        cdef Line *line
        cdef int part
        if self.twice >= 0:
            shown = SHOWN[self.twice]
            raise InvalidRequest(shown, f"header {shown} is given more than once")
        for part in range(4):
            if self.given[part] < 0:
                at[0], at[1] = -1, -1
                at += 2
                continue
            line = &self.fields.lines[self.given[part]]
            if line.value_size > MOST_BYTES:
                return identity_of(self.values())
            at[0], at[1] = line.value_size >> 8, line.value_size & 255
            memcpy(at + 2, line.value, line.value_size)
            at += 2 + line.value_size
        given = PyBytes_FromStringAndSize(key, at - key)
        identity = identities.get(given)
        if identity is None:
            identity = identity_of(self.values())
            while len(identities) >= MAX_KNOWN:
                identities.pop(next(iter(identities)), None)
            identities[given] = identity
        return identity

    cpdef list forwarded(self, list credentials, str request_id):
        cdef list kept = kept_of(self.fields)
        kept.append((REQUEST_ID, request_id.encode()))
        kept.append((b"accept-encoding", b"identity"))
        kept.extend(credentials)
        return kept

    cpdef bytes forwarded_block(self, bytes ours, str request_id):
        """Return what travels to the provider, as lines; ``ours`` are those that follow the request's id."""
        return block_of(self.fields, ID + request_id.encode() + b"\r\n" + ours)


cdef object identity_of(list given):
    """Return who has been given, each part as its field says."""
    cdef list parts = []
    for shown, value in zip(SHOWN, given):
        try:
            parts.append(None if value is None else checked_name(shown, value.strip(b" \t").decode()))
        except UnicodeDecodeError:
            raise InvalidRequest(shown, f"header {shown} must be UTF-8, got {value[:80]!r}") from None
    if parts[0] is None:
        raise InvalidRequest("x-user-id", "header x-user-id is required: it names the user who calls")
    return Identity(*parts)


cdef list kept_of(Fields fields):
    """Return the fields that are not dropped, as a list."""
    cdef list kept = []
    cdef Line *line
    cdef int i
    for i in range(fields.count):
        line = &fields.lines[i]
        if not line.dropped:
            kept.append((name_of(line), PyBytes_FromStringAndSize(line.value, line.value_size)))
    return kept


cdef bytes block_of(Fields fields, bytes last):
    """Return the fields that are not dropped, as lines, and behind them some that are lines already."""
    cdef Py_ssize_t size = PyBytes_GET_SIZE(last)
    cdef bytes block
    cdef char *at
    cdef Line *line
    cdef int i
    for i in range(fields.count):
        line = &fields.lines[i]
        if not line.dropped:
            size += line.name_size + line.value_size + 4
    block = PyBytes_FromStringAndSize(NULL, size)
    at = PyBytes_AS_STRING(block)
    for i in range(fields.count):
        line = &fields.lines[i]
        if not line.dropped:
            at = put_line(at, line)
    memcpy(at, PyBytes_AS_STRING(last), PyBytes_GET_SIZE(last))
    return block


def read_identity(headers):
    return Asked(headers).identity()


def forwarded_headers(headers, list credentials, str request_id):
    return Asked(headers).forwarded(credentials, request_id)


# --- answers ----------------------------------------------------------------------------------------------------


cdef class Told:
    def __cinit__(self, headers not None):
        cdef Line *line
        cdef bint rated = False
        cdef int meaning, i
        self.fields = fields_of(headers)
        self.length = -1
        self.requests_limit = self.requests_left = -1
        self.tokens_limit = self.tokens_left = self.tokens_left_of_limit = -1
        for i in range(RATES):
            self.rates[i] = -1
        for i in range(self.fields.count):
            line = &self.fields.lines[i]
            meaning = TOLD[line.known]
            if meaning == LENGTH:
                self.measured = True
                self.length = number_of(line.value, line.value_size)
            elif meaning == TYPE:
                self.typed = True
                self.events = is_event_stream(line)
            elif meaning == ENCODING:
                self.encoding = line.value[:line.value_size].strip().lower()
            elif meaning == CONNECTION:
                self.lists = self.lists or names_others(line)
            elif meaning >= RATE:
                rated = True
                self.twice = self.twice or self.rates[meaning - RATE] >= 0
                self.rates[meaning - RATE] = i
        if rated:
            self.weigh()

    cdef int64_t rate(self, int number) noexcept:
        """Return the number that one of the fields of limits tells; -1 if it tells none."""
        cdef Line *line
        if self.rates[number] < 0:
            return -1
        line = &self.fields.lines[self.rates[number]]
        return number_of(line.value, line.value_size)

    cdef bint tells_whole_seconds(self, int number) noexcept:
        """Return whether a time is told without its unit: so does who counts in windows (Azure)."""
        cdef Line *line
        if self.rates[number] < 0:
            return False
        line = &self.fields.lines[self.rates[number]]
        return line.value_size > 0 and c"0" <= line.value[line.value_size - 1] <= c"9"

    cdef void weigh(self) noexcept:
        """Read the limits; of two on tokens, the tighter one."""
        cdef int64_t limit, left
        cdef int i
        self.limits = UNUSABLE if self.twice else NONE
        if self.twice:
            return
        for i in range(0, RATES, 3):
            if self.rates[i] < 0 and self.rates[i + 1] < 0:
                continue
            limit, left = self.rate(i), self.rate(i + 1)
            self.in_windows = self.in_windows or self.tells_whole_seconds(i + 2)
            if limit < 1 or left < 0 or left > limit:
                self.limits = UNUSABLE
            elif i == 0:
                self.requests_limit, self.requests_left = limit, left
            else:
                self.tokens_left = left if self.tokens_left < 0 else min(left, self.tokens_left)
                if self.tokens_limit < 0 or limit < self.tokens_limit:
                    self.tokens_limit, self.tokens_left_of_limit, self.tokens_at = limit, left, i
        if self.limits == NONE and (self.requests_limit > 0 or self.tokens_limit > 0):
            self.limits, self.usable = USABLE, True

    def reset(self, bint of_tokens):
        cdef int number = (self.tokens_at if of_tokens else 0) + 2
        cdef Line *line
        if self.rates[number] < 0:
            return b""
        line = &self.fields.lines[self.rates[number]]
        return line.value[:line.value_size]

    def values(self, *names):
        return [value for name, value in self.fields.as_list() if name in names]

    cdef int sort_out(self, bint drop_length, bint drop_encoding) except -1:
        """Decide of each field whether it travels on."""
        cdef Line *line
        cdef int meaning, i
        self.measured = self.measured and not drop_length
        for i in range(self.fields.count):
            line = &self.fields.lines[i]
            meaning = TOLD[line.known]
            line.dropped = (
                meaning == DROPPED
                or meaning == CONNECTION
                or (meaning == LENGTH and drop_length)
                or (meaning == ENCODING and drop_encoding)
            )
        if self.lists:
            drop_listed(self.fields)
        return 0

    cpdef list returned(self, bint drop_length, bint drop_encoding):
        cdef list kept = []
        cdef Line *line
        cdef bytes name
        cdef int i
        self.sort_out(drop_length, drop_encoding)
        for i in range(self.fields.count):
            line = &self.fields.lines[i]
            if not line.dropped:
                name = name_of(line)
                name = b"x-upstream" + name[1:] if is_renamed(line) else name
                kept.append((name, PyBytes_FromStringAndSize(line.value, line.value_size)))
        return kept

    cpdef bytes returned_block(self, bint drop_length, bint drop_encoding, bytes last):
        """Return what travels back as lines, and behind it some that are lines already."""
        cdef Py_ssize_t size = PyBytes_GET_SIZE(last)
        cdef Line *line
        cdef Line cut
        cdef bytes block
        cdef char *at
        cdef int i
        self.sort_out(drop_length, drop_encoding)
        if not self.once():
            return lines_of(joined(self.returned(drop_length, drop_encoding))) + last
        for i in range(self.fields.count):
            line = &self.fields.lines[i]
            if not line.dropped:
                size += line.name_size + line.value_size + (13 if is_renamed(line) else 4)
        block = PyBytes_FromStringAndSize(NULL, size)
        at = PyBytes_AS_STRING(block)
        for i in range(self.fields.count):
            line = &self.fields.lines[i]
            if line.dropped:
                continue
            if is_renamed(line):
                cut = line[0]
                cut.name, cut.name_size, cut.known = line.name + 1, line.name_size - 1, 0
                memcpy(at, <const char *>b"x-upstream", 10)
                at = put_line(at + 10, &cut)
            else:
                at = put_line(at, line)
        memcpy(at, PyBytes_AS_STRING(last), PyBytes_GET_SIZE(last))
        return block

    cdef bint once(self) except -1:
        """Return whether every field that travels on is there once, as far as can be told at a glance."""
        cdef uint8_t seen[NAMES]
        cdef Line *line
        cdef int others = 0
        cdef int i, j
        memset(seen, 0, NAMES)
        for i in range(self.fields.count):
            line = &self.fields.lines[i]
            if line.dropped:
                continue
            if line.known:
                if seen[line.known]:
                    return False
                seen[line.known] = 1
                continue
            others += 1
            if others > 16 or begins(line, b"x-upstream", 10):
                return False
            for j in range(i):
                if not self.fields.lines[j].known and name_of(line) == name_of(&self.fields.lines[j]):
                    return False
        return True


cdef bint is_renamed(Line *line) noexcept:
    return TOLD[line.known] == RENAMED or TOLD[line.known] >= RATE or (
        not line.known and begins(line, b"x-ratelimit-", 12)
    )


cdef bint is_event_stream(Line *line) noexcept:
    cdef Line media = line[0]
    media.value_size = 17
    return line.value_size >= 17 and is_text(&media, b"text/event-stream", 17)


cdef list joined(list fields):
    """Return the fields with the values of one that is given more than once in a list, as Falcon has them."""
    cdef dict once = {}
    for name, value in fields:
        once[name] = once[name] + b", " + value if name in once else value
    return list(once.items())


def returned_headers(headers, bint drop_length, bint drop_encoding):
    return Told(headers).returned(drop_length, drop_encoding)
