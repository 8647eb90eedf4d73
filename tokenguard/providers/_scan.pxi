# JSON in one pass over bytes, without a Python object: what _chat reads with.
#
# Whoever reads goes through a document member by member, and takes or skips each value. What is skipped is
# checked all the same, as strictly as jsontext does: white space, numbers, escapes, UTF-8, names given twice.
#
# What is wrong, and what is merely unusual, is odd: the scan then stands at its end and finds nothing more, so
# that it need be asked only once, when all is over. Unusual are names with escapes, half a surrogate pair, and
# more depth, members or digits than anybody sends.
#
# SAFETY: no byte is looked at before it is known to be there; recursion is as deep as DEPTH; a name is compared
# with those of its own object alone, at most MEMBERS.
#
# PERF: the rows "request", "answer" and "stream" of benchmarks/test_bench_reading.py.

cdef extern from *:
    """
    #include <stdint.h>
    #include <string.h>

    /* Bits for TG_STEP bytes: which may not stand for themselves in a string, and which are control characters.
     * The first bit that is set is right; those behind it may not be. */
    #if defined(__SSE2__) && !defined(TG_NO_SSE2)
    #include <emmintrin.h>

    enum { TG_STEP = 16 };

    #define TG_IS(bytes, byte) _mm_cmpeq_epi8(bytes, _mm_set1_epi8(byte))
    #define TG_BELOW(bytes, byte) _mm_cmplt_epi8(bytes, _mm_set1_epi8(byte))
    #define tg_first(bits) __builtin_ctz((uint32_t)(bits))

    static inline uint64_t tg_special(const unsigned char *at) {
        __m128i bytes = _mm_loadu_si128((const __m128i *)at);
        __m128i special = _mm_or_si128(TG_IS(bytes, '"'), TG_IS(bytes, '\\\\'));
        return _mm_movemask_epi8(_mm_or_si128(special, TG_BELOW(bytes, 0x20))); /* 0x80 and more are below 0 */
    }

    static inline uint64_t tg_controls(const unsigned char *at) {
        __m128i bytes = _mm_loadu_si128((const __m128i *)at);
        return _mm_movemask_epi8(TG_IS(_mm_max_epu8(bytes, _mm_set1_epi8(0x1f)), 0x1f));
    }
    #else
    enum { TG_STEP = 8 };

    #define TG_EACH(byte) (0x0101010101010101u * (byte))
    #define TG_ZEROS(word) (((word) - TG_EACH(0x01)) & ~(word))
    #define tg_first(bits) (__builtin_ctzll(bits) >> 3)

    static inline uint64_t tg_eight(const unsigned char *at) {
        uint64_t word;
        memcpy(&word, at, 8);
    #if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
        word = __builtin_bswap64(word);
    #endif
        return word;
    }

    static inline uint64_t tg_controls(const unsigned char *at) {
        uint64_t word = tg_eight(at);
        return (word - TG_EACH(0x20)) & ~word & TG_EACH(0x80);
    }

    static inline uint64_t tg_special(const unsigned char *at) {
        uint64_t word = tg_eight(at);
        uint64_t ours = TG_ZEROS(word ^ TG_EACH('"')) | TG_ZEROS(word ^ TG_EACH('\\\\')) | word;
        return tg_controls(at) | (ours & TG_EACH(0x80));
    }
    #endif
    """
    uint64_t tg_special(const byte *at) noexcept nogil
    uint64_t tg_controls(const byte *at) noexcept nogil
    int tg_first(uint64_t bits) noexcept nogil
    enum:
        TG_STEP

cdef enum:
    DEPTH = 64
    MEMBERS = 64
    NAMES = 512
    DIGITS = 300

cdef struct Name:
    const byte *at
    int64_t size

cdef struct Scan:
    const byte *at
    const byte *end
    int64_t text        # bytes of all strings so far that are not names, decoded
    int64_t dumped      # bytes of what json.dumps(…, ensure_ascii=False) would make of all so far
    bint inexact        # a number came that json.dumps may write in another way
    bint attachment     # the type of an attachment came, or one that may be
    bint odd
    int depth
    int names
    Name seen[NAMES]    # of the objects that are open, from the outermost on

cdef struct Level:      # a list or an object that is open
    int64_t count
    int names


cdef inline void begin(Scan *s, const byte *at, const byte *end) noexcept nogil:
    s.at = at
    s.end = end
    s.text = s.dumped = 0
    s.inexact = s.attachment = s.odd = False
    s.depth = s.names = 0


cdef inline bint odd(Scan *s) noexcept nogil:
    s.odd = True
    s.at = s.end
    return False


cdef inline byte peek(Scan *s) noexcept nogil:
    """Return the next byte, 0 at the end."""
    return s.at[0] if s.at < s.end else 0


cdef inline bint is_space(byte c) noexcept nogil:
    return c <= c" " and (c == c" " or c == c"\n" or c == c"\r" or c == c"\t")


cdef inline void skip_space(Scan *s) noexcept nogil:
    while s.at < s.end and is_space(s.at[0]):
        s.at += 1


cdef inline bint starts(Scan *s, const char *what) noexcept nogil:
    cdef size_t size = strlen(what)
    return <size_t>(s.end - s.at) >= size and memcmp(s.at, what, size) == 0


cdef inline bint over(Scan *s) noexcept nogil:
    """Say whether one value was all there was, and nothing was odd."""
    skip_space(s)
    return s.at == s.end and not s.odd


# --- strings ------------------------------------------------------------------------------------------------


cdef inline const byte *plain_end(const byte *at, const byte *end) noexcept nogil:
    """Return the first byte that is not ASCII standing for itself in a string."""
    cdef uint64_t special
    while end - at >= TG_STEP:
        special = tg_special(at)
        if special:
            return at + tg_first(special)
        at += TG_STEP
    while at < end and c" " <= at[0] < 0x80 and at[0] != c'"' and at[0] != c"\\":
        at += 1
    return at


cdef inline bint follows(const byte *at, int least, int most) noexcept nogil:
    return least <= at[0] <= most


cdef const byte *wide_end(const byte *at, const byte *end) noexcept nogil:
    """Return what is behind characters of several bytes; NULL if they are not UTF-8.

    Source: the Unicode Standard, table 3-7
    """
    cdef int least, most
    while at < end and at[0] >= 0x80:
        least, most = 0x80, 0xBF
        if 0xC2 <= at[0] <= 0xDF and end - at >= 2 and follows(at + 1, least, most):
            at += 2
        elif 0xE0 <= at[0] <= 0xEF and end - at >= 3 and follows(at + 2, least, most):
            if at[0] == 0xE0:
                least = 0xA0
            elif at[0] == 0xED:
                most = 0x9F
            if not follows(at + 1, least, most):
                return NULL
            at += 3
        elif (
            0xF0 <= at[0] <= 0xF4 and end - at >= 4
            and follows(at + 2, least, most) and follows(at + 3, least, most)
        ):
            if at[0] == 0xF0:
                least = 0x90
            elif at[0] == 0xF4:
                most = 0x8F
            if not follows(at + 1, least, most):
                return NULL
            at += 4
        else:
            return NULL
    return at


cdef inline int hex_digit(byte c) noexcept nogil:
    if c"0" <= c <= c"9":
        return c - c"0"
    c |= 0x20
    return c - c"a" + 10 if c"a" <= c <= c"f" else -1


cdef int code_unit(const byte *at, const byte *end) noexcept nogil:
    """Return what an escape such as \\u00e9 at ``at`` stands for, -1 if it is none."""
    cdef int unit = 0, digit, i
    if end - at < 6 or at[0] != c"\\" or at[1] != c"u":
        return -1
    for i in range(2, 6):
        digit = hex_digit(at[i])
        if digit < 0:
            return -1
        unit = unit << 4 | digit
    return unit


cdef inline int dumped_size(int unit) noexcept nogil:
    """Return how many bytes json.dumps takes for a character of at most two bytes."""
    if unit == c'"' or unit == c"\\" or unit == c"\n" or unit == c"\r" or unit == c"\t" or unit == 8 or unit == 12:
        return 2
    return 6 if unit < 0x20 else 1 if unit < 0x80 else 2


cdef const byte *escape_end(Scan *s, const byte *at) noexcept nogil:
    """Return what is behind an escape, NULL if it is none; set right the sizes, which take it for plain text."""
    cdef int unit, low
    if s.end - at < 2:
        return NULL
    if at[1] == c"/":
        s.text -= 1
        s.dumped -= 1
        return at + 2
    if at[1] in b'"\\bfnrt':
        s.text -= 1
        return at + 2
    unit = code_unit(at, s.end)
    if unit < 0 or 0xDC00 <= unit <= 0xDFFF:
        return NULL
    if unit >= 0xD800:
        if unit > 0xDBFF:
            s.text -= 3
            s.dumped -= 3
            return at + 6
        low = code_unit(at + 6, s.end)
        if not 0xDC00 <= low <= 0xDFFF:
            return NULL
        s.text -= 8
        s.dumped -= 8
        return at + 12
    if unit >= 0x800:
        s.text -= 3
        s.dumped -= 3
    else:
        s.text -= 5 if unit < 0x80 else 4
        s.dumped -= 6 - dumped_size(unit)
    return at + 6


cdef void string(Scan *s) noexcept nogil:
    cdef const byte *start = s.at + 1
    cdef const byte *at = plain_end(start, s.end)
    while at < s.end and at[0] != c'"':
        if at[0] == c"\\":
            at = escape_end(s, at)
        elif at[0] >= 0x80:
            at = wide_end(at, s.end)
        else:
            at = NULL
        if at == NULL:
            odd(s)
            return
        at = plain_end(at, s.end)
    if at == s.end:
        odd(s)
        return
    s.text += at - start
    s.dumped += at - start + 2
    s.at = at + 1


# --- numbers and literals -----------------------------------------------------------------------------------


cdef inline bint digits(Scan *s) noexcept nogil:
    """Go behind digits, of which there must be some."""
    cdef const byte *start = s.at
    while s.at < s.end and c"0" <= s.at[0] <= c"9":
        s.at += 1
    return s.at > start or odd(s)


cdef void number(Scan *s) noexcept nogil:
    cdef const byte *start = s.at
    if peek(s) == c"-":
        s.at += 1
    if peek(s) == c"0":
        s.inexact |= s.at > start  # -0 is 0 to json.dumps
        s.at += 1
    else:
        digits(s)
    if peek(s) == c".":
        s.inexact = True
        s.at += 1
        digits(s)
    if peek(s) | 0x20 == c"e":
        s.inexact = True
        s.at += 1
        if peek(s) == c"+" or peek(s) == c"-":
            s.at += 1
        digits(s)
    s.dumped += s.at - start
    if s.at - start > DIGITS:
        odd(s)


cdef inline bint literal(Scan *s, const char *what) noexcept nogil:
    """Go behind true, false or null."""
    if not starts(s, what):
        return odd(s)
    s.at += strlen(what)
    s.dumped += strlen(what)
    return True


cdef int64_t whole_number(Scan *s, int64_t most) noexcept nogil:
    """Return a number that is nothing but digits, of at most 13, and at most ``most``; all others are odd."""
    cdef const byte *start = s.at
    cdef const byte *at = start
    cdef int64_t number = 0
    if not digits(s) or s.at - start > 13 or (start[0] == c"0" and s.at - start > 1):
        return odd(s)
    while at < s.at:
        number = 10 * number + at[0] - c"0"
        at += 1
    if number > most:
        odd(s)
    return number


# --- lists, objects, values ---------------------------------------------------------------------------------


cdef inline bint enter(Scan *s, Level *level) noexcept nogil:
    """Go into the list or the object whose bracket is here."""
    level.count = 0
    level.names = s.names
    s.depth += 1
    if s.depth > DEPTH:
        return odd(s)
    s.at += 1
    s.dumped += 2
    return True


cdef inline bint another(Scan *s, Level *level, byte closing) noexcept nogil:
    """Go to the next element or member; False once the bracket is behind us, or it is odd."""
    skip_space(s)
    if s.at == s.end:
        return odd(s)
    if s.at[0] == closing:
        s.at += 1
        s.depth -= 1
        s.names = level.names
        return False
    if level.count:
        if s.at[0] != c",":
            return odd(s)
        s.at += 1
        s.dumped += 2
        skip_space(s)
    level.count += 1
    return True


cdef inline bint given_twice(Scan *s, Level *level, Name name) noexcept nogil:
    cdef int i
    for i in range(level.names, s.names):
        if s.seen[i].size == name.size and memcmp(s.seen[i].at, name.at, name.size) == 0:
            return True
    return False


cdef bint member(Scan *s, Level *level) noexcept nogil:
    """Go to the value of the next member, whose name is then the last one seen; False as ``another``."""
    cdef Name name
    cdef const byte *end
    if not another(s, level, c"}"):
        return False
    if peek(s) != c'"':
        return odd(s)
    name.at = s.at + 1
    end = plain_end(name.at, s.end)
    while end != NULL and end < s.end and end[0] >= 0x80:
        end = wide_end(end, s.end)
        if end != NULL:
            end = plain_end(end, s.end)
    if end == NULL or end == s.end or end[0] != c'"':
        return odd(s)
    name.size = end - name.at
    if s.names == NAMES or s.names - level.names == MEMBERS or given_twice(s, level, name):
        return odd(s)
    s.seen[s.names] = name
    s.names += 1
    s.dumped += name.size + 4
    s.at = end + 1
    skip_space(s)
    if peek(s) != c":":
        return odd(s)
    s.at += 1
    skip_space(s)
    return True


cdef inline bint named(Scan *s, const char *name) noexcept nogil:
    """Say whether the member that we are at has a name."""
    cdef Name *last = &s.seen[s.names - 1]
    return last.size == <int64_t>strlen(name) and memcmp(last.at, name, strlen(name)) == 0


cdef void note_type(Scan *s) noexcept nogil:
    """Read the value of a member ``type``, and note whether it may be an attachment's."""
    cdef const byte *start = s.at
    cdef int64_t text = s.text
    s.attachment |= starts(s, b'"image_url"') or starts(s, b'"input_audio"') or starts(s, b'"file"')
    value(s)
    s.attachment |= s.text - text != s.at - start - 2  # escapes, which may spell one of these, or no string at all


cdef void members(Scan *s) noexcept nogil:
    """Go behind an object. What its ``role`` and ``type`` say is not counted as text."""
    cdef Level level
    cdef int64_t text
    enter(s, &level)
    while member(s, &level):
        text = s.text
        if named(s, b"type"):
            note_type(s)
            s.text = text
        elif named(s, b"role"):
            value(s)
            s.text = text
        else:
            value(s)


cdef void elements(Scan *s) noexcept nogil:
    """Go behind a list."""
    cdef Level level
    enter(s, &level)
    while another(s, &level, c"]"):
        value(s)


cdef void value(Scan *s) noexcept nogil:
    """Go behind a value."""
    cdef byte c = peek(s)
    if c == c'"':
        string(s)
    elif c == c"{":
        members(s)
    elif c == c"[":
        elements(s)
    elif c == c"t":
        literal(s, b"true")
    elif c == c"f":
        literal(s, b"false")
    elif c == c"n":
        literal(s, b"null")
    else:
        number(s)
