# cython: boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
# cython: freethreading_compatible=True, auto_pickle=False, autotestdict=False
"""What every call's bytes are read by. The stub, _chat.pyi, is its manual.

C below, in _scan.pxi, thin classes here. What is plain, as nearly all is, is read in one pass without a Python
object. What is odd in any way is left to careful.py, which says what it means, or words the error: what is read
here is exactly what is read there.
"""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from libc.stdint cimport int64_t, uint64_t
from libc.string cimport memcmp, memset, strlen

from tokenguard.jsontext import read_object
from tokenguard.model import Usage
from tokenguard.providers import careful

ctypedef unsigned char byte

include "_scan.pxi"

MAX_ANSWER_BYTES = 16 * 2**20
MAX_EVENT_BYTES = 2**20

cdef int64_t ANSWER_BYTES = MAX_ANSWER_BYTES
cdef int64_t EVENT_BYTES = MAX_EVENT_BYTES
cdef int64_t CHOICES = careful.MAX_CHOICES
cdef int64_t OUTPUT_TOKENS = careful.MAX_OUTPUT_TOKENS
cdef int64_t MESSAGE_TOKENS = careful.TOKENS_PER_MESSAGE
cdef int64_t PROMPT_TOKENS = careful.TOKENS_PER_PROMPT
cdef int64_t USAGE = careful.MAX_USAGE
cdef enum:
    MODEL_BYTES = 256

cdef object new_tuple = tuple.__new__


# --- the request --------------------------------------------------------------------------------------------

cdef struct Chat:
    const byte *opening     # right behind the opening brace
    const byte *model       # NULL without one
    int64_t model_size
    int64_t messages        # how many; -1 without a list of them
    int64_t text            # bytes of all text of the prompt
    int64_t choices
    int64_t cap             # the largest one; 0 without one
    bint stream
    bint options            # whether stream_options is there, be it null
    bint asks


cdef inline bint boolean(Scan *s) noexcept nogil:
    """Return a switch; null is false."""
    if peek(s) == c"t":
        return literal(s, b"true")
    literal(s, b"false" if peek(s) == c"f" else b"null")
    return False


cdef inline int64_t amount(Scan *s, int64_t most) noexcept nogil:
    """Return a number of at least 1; 0 for null."""
    cdef int64_t number
    if peek(s) == c"n":
        literal(s, b"null")
        return 0
    number = whole_number(s, most)
    return number or odd(s)


cdef void read_model(Scan *s, Chat *c) noexcept nogil:
    """Read a name of visible ASCII; what others name a bucket is for ``checked_name`` to say."""
    cdef const byte *start = s.at + 1
    cdef int64_t i, text = s.text
    if peek(s) != c'"':
        odd(s)
        return
    string(s)
    c.model = start
    c.model_size = s.text - text
    if s.odd or not 1 <= c.model_size <= MODEL_BYTES or c.model_size != s.at - 1 - start:
        odd(s)
        return
    for i in range(c.model_size):
        if not c"!" <= start[i] <= c"~":
            odd(s)
            return


cdef void read_messages(Scan *s, Chat *c) noexcept nogil:
    cdef Level level
    cdef int64_t text = s.text
    if peek(s) != c"[":
        odd(s)
        return
    s.attachment = False
    enter(s, &level)
    while another(s, &level, c"]"):
        value(s)
    c.messages = level.count
    c.text += s.text - text
    if s.attachment:
        odd(s)


cdef void read_options(Scan *s, Chat *c) noexcept nogil:
    cdef Level level
    c.options = True
    if peek(s) != c"{":
        literal(s, b"null")
        return
    enter(s, &level)
    while member(s, &level):
        if named(s, b"include_usage"):
            c.asks = boolean(s)
        else:
            value(s)


cdef void read_shape(Scan *s, Chat *c) noexcept nogil:
    """Read tools or the answer's form, which count as json.dumps writes them, if there are any."""
    cdef byte first = peek(s)
    cdef int64_t size = s.dumped
    s.inexact = False
    value(s)
    size = s.dumped - size
    if first == c"n" or first == c"f" or (first == c"0" and size == 1):
        return
    if size == 2 and (first == c'"' or first == c"[" or first == c"{"):
        return
    c.text += size
    if s.inexact:
        odd(s)


cdef bint lower_ascii(Scan *s) noexcept nogil:
    """Say whether the member's name cannot be that of another member in another case."""
    cdef Name *name = &s.seen[s.names - 1]
    cdef int64_t i
    for i in range(name.size):
        if name.at[i] >= 0x80 or c"A" <= name.at[i] <= c"Z":
            return False
    return True


cdef void read_chat(Scan *s, Chat *c) noexcept nogil:
    cdef Level level
    if peek(s) != c"{":
        odd(s)
        return
    enter(s, &level)
    c.opening = s.at
    while member(s, &level):
        if named(s, b"model"):
            read_model(s, c)
        elif named(s, b"messages"):
            read_messages(s, c)
        elif named(s, b"stream"):
            c.stream = boolean(s)
        elif named(s, b"stream_options"):
            read_options(s, c)
        elif named(s, b"n"):
            c.choices = amount(s, CHOICES) or 1
        elif named(s, b"max_tokens") or named(s, b"max_completion_tokens"):
            c.cap = max(c.cap, amount(s, OUTPUT_TOKENS))
        elif named(s, b"tools") or named(s, b"functions") or named(s, b"response_format"):
            read_shape(s, c)
        elif lower_ascii(s):
            value(s)
        else:
            odd(s)


@cython.final
cdef class ChatRequest:
    cdef readonly str model
    cdef readonly bint stream
    cdef readonly int64_t choices
    cdef readonly object output_cap
    cdef readonly int64_t text_bytes
    cdef readonly int64_t extra_tokens
    cdef readonly bint attachments
    cdef readonly bint asks_for_usage
    cdef object read_body
    cdef bytes raw
    cdef Py_ssize_t opening     # where stream_options may be put in; 0 where it may not

    def __init__(
        self, str model not None, bint stream, int64_t choices, output_cap, int64_t text_bytes, int64_t extra_tokens,
        bint attachments, bint asks_for_usage, body,
    ):
        self.model = model
        self.stream = stream
        self.choices = choices
        self.output_cap = output_cap
        self.text_bytes = text_bytes
        self.extra_tokens = extra_tokens
        self.attachments = attachments
        self.asks_for_usage = asks_for_usage
        self.read_body = body

    @property
    def body(self):
        if self.read_body is None:
            self.read_body = read_object(self.raw)
        return self.read_body

    def body_with_usage(self):
        if self.opening:
            return self.raw[:self.opening] + b'"stream_options":{"include_usage":true},' + self.raw[self.opening:]
        return careful.ask_for_usage(self.body)

    def __repr__(self):
        return (
            f"<ChatRequest of {self.model!r}: stream {self.stream}, {self.choices} choices, output cap "
            f"{self.output_cap}, {self.text_bytes} bytes of text and {self.extra_tokens} tokens>"
        )


def scan_chat(bytes raw not None):
    cdef const byte *start = <const byte *>PyBytes_AS_STRING(raw)
    cdef Scan s
    cdef Chat c
    cdef ChatRequest request
    memset(&c, 0, sizeof(Chat))
    c.messages = -1
    c.choices = 1
    begin(&s, start, start + PyBytes_GET_SIZE(raw))
    read_chat(&s, &c)
    if not over(&s) or c.model == NULL or c.messages < 0:
        return None
    request = ChatRequest.__new__(ChatRequest)
    request.model = (<const char *>c.model)[:c.model_size].decode("ascii")
    request.stream = c.stream
    request.choices = c.choices
    request.output_cap = c.cap or None
    request.text_bytes = c.text
    request.extra_tokens = MESSAGE_TOKENS * c.messages + PROMPT_TOKENS
    request.asks_for_usage = c.asks
    request.raw = raw
    request.opening = 0 if c.options else c.opening - start
    return request


# --- usage --------------------------------------------------------------------------------------------------

cdef struct Told:
    bint usage          # whether usage is there, and not null
    int64_t prompt
    int64_t completion
    int64_t total       # -1 if it is not told


cdef void read_usage(Scan *s, Told *told) noexcept nogil:
    """Read a usage whose members are counts, or null."""
    cdef Level level
    if peek(s) != c"{":
        literal(s, b"null")
        return
    told.usage = True
    told.prompt = told.completion = 0
    told.total = -1
    enter(s, &level)
    while member(s, &level):
        if named(s, b"prompt_tokens"):
            told.prompt = whole_number(s, USAGE)
        elif named(s, b"completion_tokens"):
            told.completion = whole_number(s, USAGE)
        elif named(s, b"total_tokens") and peek(s) != c"n":
            told.total = whole_number(s, USAGE)
        else:
            value(s)


cdef object usage_of(Told *told):
    """Return the usage as ``careful.read_usage`` does."""
    cdef int64_t total
    if not told.usage:
        return None
    total = told.prompt + told.completion if told.total < 0 else told.total
    return new_tuple(Usage, (told.prompt, told.completion, total)) if 0 < total <= USAGE else None


# --- an answer in one piece ---------------------------------------------------------------------------------


cdef void read_answer(Scan *s, Told *told) noexcept nogil:
    cdef Level level
    if peek(s) != c"{":
        odd(s)
        return
    enter(s, &level)
    while member(s, &level):
        if named(s, b"usage"):
            read_usage(s, told)
        else:
            value(s)


@cython.final
cdef class JsonAnswer:
    cdef list kept
    cdef int64_t size

    def __cinit__(self):
        self.kept = []

    @property
    def streamed_tokens(self):
        return 0

    def feed(self, bytes chunk not None):
        self.size += PyBytes_GET_SIZE(chunk)
        if self.size > ANSWER_BYTES:
            self.kept = None
        elif self.kept is not None:
            self.kept.append(chunk)
        return chunk

    def rest(self):
        return b""

    @property
    def usage(self):
        cdef bytes document
        cdef Scan s
        cdef Told told
        if self.kept is None:
            return None
        document = b"".join(self.kept)
        begin(&s, <const byte *>PyBytes_AS_STRING(document), NULL)
        s.end = s.at + PyBytes_GET_SIZE(document)
        told.usage = False
        skip_space(&s)
        read_answer(&s, &told)
        if over(&s):
            return usage_of(&told)
        answer = careful.decode(document)
        return None if answer is None else careful.read_usage(answer.get("usage"))

    def final_usage(self, *, bint ended):
        return self.usage


# --- a stream -----------------------------------------------------------------------------------------------

cdef struct Event:
    int64_t deltas          # how many carry text
    int64_t delta_bytes
    bint finished
    bint no_choices         # whether choices is an empty list
    Told told


cdef void read_choice(Scan *s, Event *e) noexcept nogil:
    cdef Level level
    cdef int64_t text
    enter(s, &level)
    while member(s, &level):
        if named(s, b"delta") and peek(s) == c"{":
            text = s.text
            members(s)
            e.deltas += s.text > text
            e.delta_bytes += s.text - text
        else:
            e.finished |= named(s, b"finish_reason") and peek(s) != c"n"
            value(s)


cdef void read_choices(Scan *s, Event *e) noexcept nogil:
    cdef Level level
    if peek(s) != c"[":
        value(s)
        return
    enter(s, &level)
    while another(s, &level, c"]"):
        if peek(s) == c"{":
            read_choice(s, e)
        else:
            value(s)
    e.no_choices = level.count == 0


cdef void read_event(Scan *s, Event *e) noexcept nogil:
    """Read the data of an event; where an attachment may be in it, it is odd, for that is not counted as text."""
    cdef Level level
    if peek(s) != c"{":
        odd(s)
        return
    enter(s, &level)
    while member(s, &level):
        if named(s, b"choices"):
            read_choices(s, e)
        elif named(s, b"usage"):
            read_usage(s, &e.told)
        else:
            value(s)
    if s.attachment:
        odd(s)


cdef inline bint is_break(const byte *at) noexcept nogil:
    return at[0] == c"\n" or at[0] == c"\r"


cdef const byte *line_end(const byte *at, const byte *end) noexcept nogil:
    """Return where the line ends that ``at`` is in, or ``end``."""
    cdef uint64_t controls
    while end - at >= 8:
        controls = tg_controls(at)
        if not controls:
            at += 8
            continue
        at += tg_first(controls)
        if is_break(at):
            return at
        at += 1
    while at < end and not is_break(at):
        at += 1
    return at


cdef inline const byte *next_line(const byte *at, const byte *end) noexcept nogil:
    """Return what is behind the end of a line at ``at``."""
    return at + 2 if at[0] == c"\r" and end - at >= 2 and at[1] == c"\n" else at + 1


cdef const byte *event_end(const byte *at, const byte *end, const byte **line) noexcept nogil:
    """Return what is behind the blank line that ends an event, NULL before all of it is sure to have come.

    Args:
        at: Where to look from.
        end: Of what has come.
        line: Takes where the only line before the blank one ends, NULL if there are several.
    """
    at = line_end(at, end)
    line[0] = at
    while at < end:
        at = next_line(at, end)
        if at < end and is_break(at):
            at = next_line(at, end)
            return NULL if at == end and at[-1] == c"\r" else at
        line[0] = NULL
        at = line_end(at, end)
    return NULL


@cython.final
cdef class EventStream:
    cdef readonly object usage
    cdef bint swallow_usage
    cdef bint finished
    cdef bytearray pending      # the beginning of an event
    cdef int64_t deltas
    cdef int64_t deltas_at_usage
    cdef int64_t delta_bytes

    def __init__(self, *, bint swallow_usage):
        self.swallow_usage = swallow_usage
        self.pending = bytearray()

    @property
    def streamed_tokens(self):
        return max(self.deltas, self.delta_bytes // 4)

    def feed(self, bytes chunk not None):
        cdef bytes data = chunk
        cdef const byte *start
        cdef const byte *end
        if self.pending:
            if not self.completes(chunk):
                return self.overflow()
            data = bytes(self.pending)
            self.pending.clear()
        start = <const byte *>PyBytes_AS_STRING(data)
        end = start + PyBytes_GET_SIZE(data)
        return self.pass_on(data, start, end)

    cdef bint completes(self, bytes chunk) except -1:
        """Put a piece behind what is pending; return whether that has an event's end now."""
        cdef Py_ssize_t before = max(0, len(self.pending) - 3)  # where a blank line may have begun
        cdef const byte *line
        cdef const byte *start
        self.pending += chunk
        start = <const byte *><char *>self.pending
        return event_end(start + before, start + len(self.pending), &line) != NULL

    cdef bytes overflow(self):
        """Return what is pending if it has become too much to keep."""
        return self.rest() if len(self.pending) > EVENT_BYTES else b""

    cdef bytes pass_on(self, bytes data, const byte *start, const byte *end):
        """Read all events that are complete, and keep the beginning of the next; return what passes."""
        cdef const byte *first = start     # of what passes and has not been put to the pieces
        cdef const byte *line
        cdef const byte *behind
        cdef list pieces = []
        while True:
            behind = event_end(start, end, &line)
            if behind == NULL:
                break
            if self.read(start, line, behind) and self.swallow_usage:
                pieces.append(first[:start - first])
                first = behind
            start = behind
        if start < end:
            self.pending += start[:end - start]
        elif not pieces:
            return data
        pieces.append(first[:start - first])
        pieces.append(self.overflow())
        return b"".join(pieces)

    def rest(self):
        cdef bytes rest = bytes(self.pending)
        self.pending.clear()
        return b"" if rest and self.read_carefully(rest) and self.swallow_usage else rest

    cdef bint read(self, const byte *start, const byte *line, const byte *behind) except -1:
        """Take note of an event, of one line if that ends at ``line``; return whether it tells the usage alone."""
        cdef Scan s
        cdef Event e
        if line == NULL:
            return self.read_carefully(start[:behind - start])
        begin(&s, start, line)
        if not starts(&s, b"data:"):
            return False
        s.at += 5
        skip_space(&s)
        if starts(&s, b"[DONE]") and line - s.at == 6:
            return False
        memset(&e, 0, sizeof(Event))
        read_event(&s, &e)
        if not over(&s):
            return self.read_carefully(start[:behind - start])
        self.take(e.deltas, e.delta_bytes, e.finished, usage_of(&e.told))
        return e.no_choices and e.told.usage

    cdef bint read_carefully(self, bytes data) except -1:
        event = careful.read_event(data)
        if event is None:
            return False
        self.take(event.deltas, event.delta_bytes, event.finished, event.usage)
        return event.only_usage

    cdef int take(self, int64_t deltas, int64_t delta_bytes, bint finished, object usage) except -1:
        self.finished |= finished
        self.deltas += deltas
        self.delta_bytes += delta_bytes
        if usage is not None:
            self.usage = usage
            self.deltas_at_usage = self.deltas
        return 0

    def final_usage(self, *, bint ended):
        return self.usage if (ended or self.finished) and self.deltas == self.deltas_at_usage else None
