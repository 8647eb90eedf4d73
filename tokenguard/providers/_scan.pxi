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

    /* What plain bytes weigh more than spaces, and digits and capitals more than those; which bytes count. */
    static struct {
        _Alignas(16) unsigned char plain[16];
        unsigned char digit[16], capital[16], counted[32];
    } tg_more;

    static void tg_weigh(const unsigned char *weights) {
        memset(tg_more.plain, weights['a'] - weights[' '], 16);
        memset(tg_more.digit, weights['0'] - weights['a'], 16);
        memset(tg_more.capital, weights['A'] - weights['a'], 16);
        memset(tg_more.counted, 0xff, 16);
    }

    /* Bits for TG_STEP bytes: which may not stand for themselves in a string, and which are control characters.
     * The first bit that is set is right; those behind it may not be.
     *
     * And where the first byte is that may not stand for itself, or from where on fewer than TG_STEP are left,
     * with what those before it weigh beyond as many plain ones. */
    #if defined(__SSE2__) && !defined(TG_NO_SSE2)
    #include <emmintrin.h>

    enum { TG_STEP = 16 };

    #define TG_IS(bytes, byte) _mm_cmpeq_epi8(bytes, _mm_set1_epi8(byte))
    #define TG_BELOW(bytes, byte) _mm_cmplt_epi8(bytes, _mm_set1_epi8(byte))
    #define tg_first(bits) __builtin_ctz((uint32_t)(bits))
    #define TG_WITHIN(bytes, first, count) \\
        TG_BELOW(_mm_add_epi8(bytes, _mm_set1_epi8((char)(0x80 - (first)))), (char)(0x80 + (count)))
    #define TG_OF(name) _mm_load_si128((const __m128i *)tg_more.name)

    static inline uint64_t tg_special(const unsigned char *at) {
        __m128i bytes = _mm_loadu_si128((const __m128i *)at);
        __m128i special = _mm_or_si128(TG_IS(bytes, '"'), TG_IS(bytes, '\\\\'));
        return _mm_movemask_epi8(_mm_or_si128(special, TG_BELOW(bytes, 0x20))); /* 0x80 and more are below 0 */
    }

    static inline uint64_t tg_controls(const unsigned char *at) {
        __m128i bytes = _mm_loadu_si128((const __m128i *)at);
        return _mm_movemask_epi8(TG_IS(_mm_max_epu8(bytes, _mm_set1_epi8(0x1f)), 0x1f));
    }

    static inline __m128i tg_weights(const unsigned char *at) {
        __m128i bytes = _mm_loadu_si128((const __m128i *)at);
        __m128i more = _mm_andnot_si128(TG_IS(bytes, ' '), TG_OF(plain));
        more = _mm_add_epi8(more, _mm_and_si128(TG_WITHIN(bytes, '0', 10), TG_OF(digit)));
        return _mm_add_epi8(more, _mm_and_si128(TG_WITHIN(bytes, 'A', 26), TG_OF(capital)));
    }

    static inline const unsigned char *
    tg_weighed_end(const unsigned char *at, const unsigned char *end, int64_t *excess) {
        const unsigned char *start = at;
        __m128i sum = _mm_setzero_si128(), none = _mm_setzero_si128(), counted;
        uint64_t special = 0;
        int64_t weighed;
        for (; end - at >= TG_STEP && !(special = tg_special(at)); at += TG_STEP)
            sum = _mm_add_epi64(sum, _mm_sad_epu8(tg_weights(at), none));
        if (special && tg_first(special)) {
            counted = _mm_loadu_si128((const __m128i *)(tg_more.counted + 16 - tg_first(special)));
            sum = _mm_add_epi64(sum, _mm_sad_epu8(_mm_and_si128(tg_weights(at), counted), none));
            at += tg_first(special);
        }
        sum = _mm_add_epi64(sum, _mm_srli_si128(sum, 8));
        _mm_storel_epi64((__m128i *)&weighed, sum);
        *excess += weighed - (at - start) * tg_more.plain[0];
        return at;
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

    /* How many bytes, all of them ASCII, are one of so many from the first on. */
    static inline int64_t tg_within(uint64_t word, int first, int count) {
        uint64_t least = word + TG_EACH(0x80 - first), above = word + TG_EACH(0x80 - first - count);
        return (((least & ~above & TG_EACH(0x80)) >> 7) * TG_EACH(1)) >> 56;
    }

    static inline const unsigned char *
    tg_weighed_end(const unsigned char *at, const unsigned char *end, int64_t *excess) {
        uint64_t special = 0, word;
        while (end - at >= TG_STEP && !special) {
            special = tg_special(at);
            word = tg_eight(at) & (special ? ((uint64_t)1 << 8 * tg_first(special)) - 1 : ~(uint64_t)0);
            *excess += tg_within(word, '0', 10) * tg_more.digit[0] + tg_within(word, 'A', 26) * tg_more.capital[0]
                - tg_within(word, ' ', 1) * tg_more.plain[0];
            at += special ? tg_first(special) : TG_STEP;
        }
        return at;
    }
    #endif
    """
    uint64_t tg_special(const byte *at) noexcept nogil
    uint64_t tg_controls(const byte *at) noexcept nogil
    int tg_first(uint64_t bits) noexcept nogil
    const byte *tg_weighed_end(const byte *at, const byte *end, int64_t *excess) noexcept nogil
    void tg_weigh(const byte *weights) noexcept nogil
    enum:
        TG_STEP

cdef enum:
    DEPTH = 64
    MEMBERS = 64
    NAMES = 512
    DIGITS = 300

cdef int64_t PLAIN_256THS = sizing.PLAIN
cdef int64_t EXCESS[256]    # what a character weighs beyond as many plain bytes, by its first byte; see weigh_all

cdef struct Size:
    int64_t bytes
    int64_t excess      # 256ths of a token, beyond what as many plain bytes weigh

cdef struct Name:
    const byte *at
    int64_t size

cdef struct Scan:
    const byte *at
    const byte *end
    Size text           # of all strings so far that are not names, decoded
    Size dumped         # of what json.dumps(…, ensure_ascii=False) would make of all so far
    bint weighs         # whether the excess of both is wanted
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
    memset(&s.text, 0, sizeof(Size))
    memset(&s.dumped, 0, sizeof(Size))
    s.weighs = False
    s.inexact = s.attachment = s.odd = False
    s.depth = s.names = 0


cdef inline void add_since(Size *sum, const Size *now, const Size *before) noexcept nogil:
    """Add what has come since."""
    sum.bytes += now.bytes - before.bytes
    sum.excess += now.excess - before.excess


cdef int weigh_all(bytes weights) except -1:
    """Take over what each byte weighs: a character is its first byte and those that follow one."""
    cdef int first, follow
    tg_weigh(<const byte *>PyBytes_AS_STRING(weights))
    for first in range(256):
        follow = 0 if first < 0xC0 else 1 if first < 0xE0 else 2 if first < 0xF0 else 3
        EXCESS[first] = <byte>weights[first] + follow * <byte>weights[0x80] - (1 + follow) * PLAIN_256THS
    return 0


weigh_all(sizing.WEIGHTS)


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


cdef inline const byte *plain_end(const byte *at, const byte *end, int64_t *excess) noexcept nogil:
    """Return the first byte that is not ASCII standing for itself in a string; ``excess``, if any, grows."""
    cdef uint64_t special
    if excess != NULL:
        at = tg_weighed_end(at, end, excess)
    else:
        while end - at >= TG_STEP:
            special = tg_special(at)
            if special:
                return at + tg_first(special)
            at += TG_STEP
    while at < end and c" " <= at[0] < 0x80 and at[0] != c'"' and at[0] != c"\\":
        if excess != NULL:
            excess[0] += EXCESS[at[0]]
        at += 1
    return at


cdef inline bint follows(const byte *at, int least, int most) noexcept nogil:
    return least <= at[0] <= most


cdef const byte *wide_end(const byte *at, const byte *end, int64_t *excess) noexcept nogil:
    """Return what is behind characters of several bytes; NULL if they are not UTF-8. ``excess``, if any, grows.

    Source: the Unicode Standard, table 3-7
    """
    cdef int least, most
    while at < end and at[0] >= 0x80:
        least, most = 0x80, 0xBF
        if excess != NULL:
            excess[0] += EXCESS[at[0]]
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
    """Return how many bytes json.dumps takes for a character of ASCII."""
    if unit == c'"' or unit == c"\\" or unit == c"\n" or unit == c"\r" or unit == c"\t" or unit == 8 or unit == 12:
        return 2
    return 6 if unit < 0x20 else 1


cdef inline void shrink(Scan *s, int less, int first) noexcept nogil:
    """Count an escape as the character that it stands for, so many bytes shorter, by that one's first byte."""
    s.text.bytes -= less
    s.text.excess += EXCESS[first]
    s.dumped.bytes -= less
    s.dumped.excess += EXCESS[first]


cdef const byte *escape_end(Scan *s, const byte *at) noexcept nogil:
    """Return what is behind an escape, NULL if it is none; set right the sizes, which take it for plain text."""
    cdef int unit, low
    if s.end - at < 2:
        return NULL
    if at[1] == c"/":
        s.text.bytes -= 1
        s.dumped.bytes -= 1
        return at + 2
    if at[1] in b'"\\bfnrt':
        s.text.bytes -= 1
        if at[1] != c'"' and at[1] != c"\\":
            s.text.excess += EXCESS[c"\n"]
        return at + 2
    unit = code_unit(at, s.end)
    if unit < 0 or 0xDC00 <= unit <= 0xDFFF:
        return NULL
    if unit >= 0xD800:
        if unit > 0xDBFF:
            shrink(s, 3, 0xE0 | unit >> 12)
            return at + 6
        low = code_unit(at + 6, s.end)
        if not 0xDC00 <= low <= 0xDFFF:
            return NULL
        shrink(s, 8, 0xF0)
        return at + 12
    if unit >= 0x800:
        shrink(s, 3, 0xE0 | unit >> 12)
    elif unit >= 0x80:
        shrink(s, 4, 0xC0 | unit >> 6)
    else:
        s.text.bytes -= 5
        s.text.excess += EXCESS[unit]
        s.dumped.bytes -= 6 - dumped_size(unit)
        if dumped_size(unit) == 1:
            s.dumped.excess += EXCESS[unit]
        elif dumped_size(unit) == 6:
            s.dumped.excess += EXCESS[c"0"] * (4 if unit & 15 < 10 else 3)
    return at + 6


cdef void string(Scan *s) noexcept nogil:
    cdef int64_t weighed = 0
    cdef int64_t *excess = &weighed if s.weighs else NULL
    cdef const byte *start = s.at + 1
    cdef const byte *at = plain_end(start, s.end, excess)
    while at < s.end and at[0] != c'"':
        if at[0] == c"\\":
            at = escape_end(s, at)
        elif at[0] >= 0x80:
            at = wide_end(at, s.end, excess)
        else:
            at = NULL
        if at == NULL:
            odd(s)
            return
        if at < s.end and at[0] == c"\\":
            continue    # PERF: text may be all escapes
        at = plain_end(at, s.end, excess)
    if at == s.end:
        odd(s)
        return
    s.text.bytes += at - start
    s.text.excess += weighed
    s.dumped.bytes += at - start + 2
    s.dumped.excess += weighed
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
    s.dumped.bytes += s.at - start
    if s.at > start:
        s.dumped.excess += EXCESS[c"0"] * (s.at - start - (start[0] == c"-"))
    if s.at - start > DIGITS:
        odd(s)


cdef inline bint literal(Scan *s, const char *what) noexcept nogil:
    """Go behind true, false or null."""
    if not starts(s, what):
        return odd(s)
    s.at += strlen(what)
    s.dumped.bytes += strlen(what)
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
    s.dumped.bytes += 2
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
        s.dumped.bytes += 2
        s.dumped.excess += EXCESS[c" "]
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
    cdef int64_t *excess = &s.dumped.excess if s.weighs else NULL
    if not another(s, level, c"}"):
        return False
    if peek(s) != c'"':
        return odd(s)
    name.at = s.at + 1
    end = plain_end(name.at, s.end, excess)
    while end != NULL and end < s.end and end[0] >= 0x80:
        end = wide_end(end, s.end, excess)
        if end != NULL:
            end = plain_end(end, s.end, excess)
    if end == NULL or end == s.end or end[0] != c'"':
        return odd(s)
    name.size = end - name.at
    if s.names == NAMES or s.names - level.names == MEMBERS or given_twice(s, level, name):
        return odd(s)
    s.seen[s.names] = name
    s.names += 1
    s.dumped.bytes += name.size + 4
    s.dumped.excess += EXCESS[c" "]
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
    cdef int64_t before = s.text.bytes
    s.attachment |= starts(s, b'"image_url"') or starts(s, b'"input_audio"') or starts(s, b'"file"')
    value(s)
    # Escapes, which may spell one of these, or no string at all.
    s.attachment |= s.text.bytes - before != s.at - start - 2


cdef void members(Scan *s) noexcept nogil:
    """Go behind an object. What its ``role`` and ``type`` say is not counted as text."""
    cdef Level level
    cdef Size text
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
