"""How many tokens a text comes to, by the classes of its bytes: what every estimate begins with.

Bytes a token differ between a language and the next by far less than between words and figures, or between small
letters and capitals. The weights are fitted to what OpenAI's o200k_base makes of 37 kinds of text;
docs/performance.md tells how far they are off, and benchmarks/estimates.py measures it again.

What is weighed is decoded text in UTF-8. The careful reader weighs with ``weigh``; the quick one has the same
weights in C, and comes to the same sum.
"""

from __future__ import annotations

from zlib import adler32

TOKEN = 256
"""What a token weighs."""

PLAIN = 60
"""What a byte of ASCII weighs that is of no class below: a small letter, a mark."""

_CLASSES = (
    (0x00, 0x1F, 180),  # line ends, tabs
    (0x20, 0x20, 30),
    (0x30, 0x39, 204),  # digits
    (0x41, 0x5A, 128),  # capitals
    (0x80, 0xBF, 36),  # all but the first byte of a character
    (0xC0, 0xCB, 220),  # Latin letters with accents
    (0xCC, 0xD3, 52),  # Greek, Cyrillic
    (0xD4, 0xDF, 72),  # Hebrew, Arabic
    (0xE0, 0xE1, 40),  # Indic scripts, Thai, Vietnamese
    (0xE2, 0xE2, 208),  # quotation marks, dashes, symbols
    (0xE3, 0xE3, 104),  # kana
    (0xE4, 0xE9, 128),  # Chinese characters
    (0xEA, 0xED, 120),  # Hangul
    (0xEE, 0xEF, 64),  # wide marks
    (0xF0, 0xFF, 255),  # emoji
)
"""First byte, last byte, and what each of them weighs, 0 to 255."""


def _weights() -> bytes:
    weights = bytearray([PLAIN] * 256)
    for first, last, weight in _CLASSES:
        weights[first : last + 1] = bytes([weight] * (last - first + 1))
    return bytes(weights)


WEIGHTS = _weights()
"""What each byte weighs."""


def weigh(text: bytes) -> int:
    """Return how many 256ths of a token a text is expected to come to.

    PERF: the low half of Adler-32 is one more than the sum of the bytes, as long as that is below 65521: it takes
    half of what ``sum`` does (the row "request of 100 kB, carefully" of benchmarks/test_bench_reading.py).
    """
    weights = text.translate(WEIGHTS)
    return sum([(adler32(weights[at : at + 256]) & 0xFFFF) - 1 for at in range(0, len(weights), 256)])
