# What is looked for in a request, in an answer and in a stream, by scanning it: _scan.pxi.

cdef int64_t CHOICES = careful.MAX_CHOICES
cdef int64_t OUTPUT_TOKENS = careful.MAX_OUTPUT_TOKENS
cdef int64_t USAGE = careful.MAX_USAGE
cdef enum:
    MODEL_BYTES = 256


# --- the request --------------------------------------------------------------------------------------------

cdef struct Chat:
    const byte *opening     # right behind the opening brace
    const byte *model       # NULL without one
    int64_t model_size
    int64_t messages        # how many; -1 without a list of them
    Size text               # of the prompt
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
    cdef int64_t i, text = s.text.bytes
    if peek(s) != c'"':
        odd(s)
        return
    string(s)
    c.model = start
    c.model_size = s.text.bytes - text
    if s.odd or not 1 <= c.model_size <= MODEL_BYTES or c.model_size != s.at - 1 - start:
        odd(s)
        return
    for i in range(c.model_size):
        if not c"!" <= start[i] <= c"~":
            odd(s)
            return


cdef void read_messages(Scan *s, Chat *c) noexcept nogil:
    cdef Level level
    cdef Size text = s.text
    if peek(s) != c"[":
        odd(s)
        return
    s.attachment = False
    enter(s, &level)
    while another(s, &level, c"]"):
        value(s)
    c.messages = level.count
    add_since(&c.text, &s.text, &text)
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
    cdef Size before = s.dumped
    cdef int64_t size
    s.inexact = False
    value(s)
    size = s.dumped.bytes - before.bytes
    if first == c"n" or first == c"f" or (first == c"0" and size == 1):
        return
    if size == 2 and (first == c'"' or first == c"[" or first == c"{"):
        return
    add_since(&c.text, &s.dumped, &before)
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


# --- the answer ---------------------------------------------------------------------------------------------

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
            text = s.text.bytes
            members(s)
            e.deltas += s.text.bytes > text
            e.delta_bytes += s.text.bytes - text
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
    while end - at >= TG_STEP:
        controls = tg_controls(at)
        if not controls:
            at += TG_STEP
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
            if at == end and (at - 1)[0] == c"\r":
                return NULL     # half of a line's end, perhaps
            return at
        line[0] = NULL
        at = line_end(at, end)
    return NULL
