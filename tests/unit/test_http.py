"""Bytes of HTTP/1.1 are read strictly: what two readers could take for two things is not taken."""

from random import Random

import httptools
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.answers import Read, compare, cut, drawn, hunt, ours
from tests.strategies import properties
from tokenguard.errors import UpstreamError
from tokenguard.upstream import _http
from tokenguard.upstream._http import AnswerReader, read_head

OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"transfer-encoding: chunked\r\n\r\n"
TYPE = [(b"content-type", b"text/plain")]


def told(*fields, line=OK):
    return line + b"".join(field + b"\r\n" for field in fields) + b"\r\n"


def read(status, fields, body, done=True):
    return Read(status, fields, body, done)


def length(digits):
    return [(b"content-length", digits)]


TE = [(b"transfer-encoding", b"chunked")]
TAKEN = {
    # what ends by its length
    "a length": (told(b"content-length: 5") + b"hello", read(200, length(b"5"), b"hello"), True),
    "a length of nothing": (told(b"content-length: 0"), read(200, length(b"0"), b""), True),
    "a length with zeros before": (
        told(b"content-length: 005") + b"hello",
        read(200, length(b"005"), b"hello"),
        True,
    ),
    "blanks around a value": (told(b"CONTENT-length:\t 5  ") + b"hello", read(200, length(b"5"), b"hello"), True),
    "a body that is cut": (told(b"content-length: 5") + b"hel", read(200, length(b"5"), b"hel", False), True),
    "an end, and more": (told(b"content-length: 5") + b"hello!", read(200, length(b"5"), b"hello"), False),
    "two answers": (told(b"content-length: 0") * 2, read(200, length(b"0"), b""), False),
    # what ends by its chunks
    "chunks": (CHUNKED + b"5\r\nhello\r\nA\r\n, world...\r\n0\r\n\r\n", read(200, TE, b"hello, world..."), True),
    "a last chunk of many zeros": (CHUNKED + b"000\r\n\r\n", read(200, TE, b""), True),
    "a chunk's extension": (CHUNKED + b'1;a="b\xe9";c\r\nx\r\n0;d\r\n\r\n', read(200, TE, b"x"), True),
    "a trailer": (CHUNKED + b"0\r\nx-a: b\r\nx-c:\r\n\r\n", read(200, TE, b""), True),
    "chunks, and more": (CHUNKED + b"0\r\n\r\nHTTP", read(200, TE, b""), False),
    "chunks that are cut": (CHUNKED + b"5\r\nhe", read(200, TE, b"he", False), True),
    "chunks in capitals": (
        told(b"Transfer-Encoding: Chunked") + b"0\r\n\r\n",
        read(200, [(b"transfer-encoding", b"Chunked")], b""),
        True,
    ),
    # what ends with its connection
    "no length": (told() + b"hello", read(200, [], b"hello", False), False),
    "no length in HTTP/1.0": (told(line=b"HTTP/1.0 200 OK\r\n") + b"hello", read(200, [], b"hello", False), False),
    # what has no body
    "204": (told(line=b"HTTP/1.1 204 No Content\r\n"), read(204, [], b""), True),
    "304 with a length": (
        told(b"content-length: 5", line=b"HTTP/1.1 304 X\r\n"),
        read(304, length(b"5"), b""),
        True,
    ),
    "204 with a body all the same": (told(line=b"HTTP/1.1 204 X\r\n") + b"hello", read(204, [], b""), False),
    # first lines
    "no reason": (told(b"content-length: 0", line=b"HTTP/1.1 200 \r\n"), read(200, length(b"0"), b""), True),
    "no reason, and no blank": (
        told(b"content-length: 0", line=b"HTTP/1.1 200\r\n"),
        read(200, length(b"0"), b""),
        True,
    ),
    "a bare status": (b"HTTP/1.1 200\r\n\r\n", read(200, [], b"", False), False),
    "a reason that is no ASCII": (told(line=b"HTTP/1.1 204 \xe9\t\r\n"), read(204, [], b""), True),
    "status 600": (told(b"content-length: 0", line=b"HTTP/1.1 600 X\r\n"), read(600, length(b"0"), b""), True),
    # answers before the answer
    "100": (
        told(line=b"HTTP/1.1 100 Continue\r\n") + told(b"content-length: 0"),
        read(200, length(b"0"), b""),
        True,
    ),
    "103 with fields": (
        told(b"link: </a>", b"content-length: 9", line=b"HTTP/1.1 103 Early Hints\r\n")
        + told(b"content-length: 0"),
        read(200, length(b"0"), b""),
        True,
    ),
    # connections
    "close": (
        told(b"connection: x, Close", b"content-length: 0"),
        read(200, [(b"connection", b"x, Close"), *length(b"0")], b""),
        False,
    ),
    "HTTP/1.0 that would go on": (
        told(b"connection: keep-alive", b"content-length: 0", line=b"HTTP/1.0 200 OK\r\n"),
        read(200, [(b"connection", b"keep-alive"), *length(b"0")], b""),
        False,
    ),
    # fields
    "an empty value": (
        told(b"x-empty:", b"x-blank: \t ", b"x-tab: y\t", b"content-length: 0"),
        read(200, [(b"x-empty", b""), (b"x-blank", b""), (b"x-tab", b"y\t"), *length(b"0")], b""),
        True,
    ),
    "a name of all that names are made of": (
        told(b"!#$%&'*+-.^_`|~09azAZ: \xe9\t\xff", b"content-length: 0"),
        read(200, [(b"!#$%&'*+-.^_`|~09azaz", b"\xe9\t\xff"), *length(b"0")], b""),
        True,
    ),
    "a long name": (
        told(b"x" * 255 + b": y", b"content-length: 0"),
        read(200, [(b"x" * 255, b"y"), *length(b"0")], b""),
        True,
    ),
}
"""What is taken: what is read, and whether the connection may carry another request."""

REFUSED = {
    # lines
    "a bare LF in the head": b"HTTP/1.1 200 OK\ncontent-length: 0\r\n\r\n",
    "a bare LF after a field": told(b"content-length: 0\nx: y"),
    "a bare CR in a field": told(b"content-length: 0\rx: y"),
    "a folded field": told(b"x: y", b" z", b"content-length: 0"),
    "a fold before any field": told(b" x: y", b"content-length: 0"),
    "a blank before the colon": told(b"content-length : 5") + b"hello",
    "a field without a colon": told(b"content-length"),
    "a field without a name": told(b": x"),
    "a name that is too long": told(b"x" * 257 + b": y"),
    "a control character in a name": told(b"x\x01y: z"),
    "a quote in a name": told(b'x"y": z'),
    "a NUL in a value": told(b"x: y\0z"),
    "a DEL in a value": told(b"x: y\x7fz"),
    "a control character in a value": told(b"x: y\x1bz"),
    "a control character in the reason": told(line=b"HTTP/1.1 200 O\x07K\r\n"),
    "a blank line first": b"\r\n" + told(b"content-length: 0"),
    # first lines
    "nothing of HTTP": b"\x00\xffgarbage",
    "a few bytes of something else": b"SSH",
    "a preface of HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "settings of HTTP/2": b"\x00\x00\x12\x04\x00\x00\x00\x00\x00",
    "HTTP/2": told(line=b"HTTP/2 200 OK\r\n"),
    "HTTP/1.2": told(line=b"HTTP/1.2 200 OK\r\n"),
    "HTTP/0.9": told(line=b"HTTP/0.9 200 OK\r\n"),
    "ICY": told(line=b"ICY 200 OK\r\n"),
    "small letters": told(line=b"http/1.1 200 OK\r\n"),
    "status 99": told(line=b"HTTP/1.1 99 OK\r\n"),
    "status 099": told(line=b"HTTP/1.1 099 OK\r\n"),
    "status 1000": told(line=b"HTTP/1.1 1000 OK\r\n"),
    "status -20": told(line=b"HTTP/1.1 -20 OK\r\n"),
    "status 2x0": told(line=b"HTTP/1.1 2x0 OK\r\n"),
    "two blanks before the status": told(line=b"HTTP/1.1  200 OK\r\n"),
    "a tab before the status": told(line=b"HTTP/1.1\t200 OK\r\n"),
    "a status that goes on": told(line=b"HTTP/1.1 200OK\r\n"),
    "no status": told(line=b"HTTP/1.1\r\n"),
    "101": told(b"connection: upgrade", b"upgrade: websocket", line=b"HTTP/1.1 101 Switching Protocols\r\n"),
    # lengths
    "two lengths": told(b"content-length: 5", b"content-length: 6") + b"hello",
    "the same length twice": told(b"content-length: 5", b"content-length: 5") + b"hello",
    "a list of lengths": told(b"content-length: 5, 5") + b"hello",
    "a length and chunks": told(b"content-length: 5", b"transfer-encoding: chunked") + b"0\r\n\r\n",
    "chunks and a length": told(b"transfer-encoding: chunked", b"content-length: 5") + b"0\r\n\r\n",
    "chunks in HTTP/1.0": told(b"transfer-encoding: chunked", line=b"HTTP/1.0 200 OK\r\n") + b"0\r\n\r\n",
    "chunks twice": told(b"transfer-encoding: chunked", b"transfer-encoding: chunked") + b"0\r\n\r\n",
    **{
        f"a length of {value!r}": told(b"content-length: " + value) + b"hello"
        for value in (
            b"-1",
            b"5\t",
            b"+5",
            b"0x5",
            b"5a",
            b"a",
            b"",
            b"5 5",
            b"5.0",
            b"5_0",
            b"1e1",
            b"9" * 16,
            b"9" * 400,
        )
    },
    **{
        f"an encoding of {value!r}": told(b"transfer-encoding: " + value) + b"0\r\n\r\n"
        for value in (
            b"identity",
            b"chunked\t",
            b"chunked,",
            b"gzip, chunked",
            b"chunked, chunked",
            b"chunked, identity",
            b"xchunked",
            b"",
            b"x",
        )
    },
    # chunks
    **{
        f"a chunk of {size!r}": CHUNKED + size + b"\r\nhello\r\n0\r\n\r\n"
        for size in (
            b"",
            b"-5",
            b"+5",
            b"0x5",
            b"5_0",
            b"5 ",
            b" 5",
            b"5\t;a",
            b"g",
            b";a",
            b"f" * 13,
            b"0" * 13,
            b"5\n",
        )
    },
    "a chunk that is shorter than its size": CHUNKED + b"5\r\nhell\r\n0\r\n\r\n",
    "a chunk that is longer than its size": CHUNKED + b"5\r\nhello!\r\n0\r\n\r\n",
    "a chunk that ends in LF": CHUNKED + b"5\r\nhello\n0\r\n\r\n",
    "a chunk's size that ends in LF": CHUNKED + b"5\nhello\r\n0\r\n\r\n",
    "a chunk's size that ends in CR": CHUNKED + b"5\rhello\r\n0\r\n\r\n",
    "a LF in an extension": CHUNKED + b"5;a\nb\r\nhello\r\n0\r\n\r\n",
    "a NUL in an extension": CHUNKED + b"5;a\0b\r\nhello\r\n0\r\n\r\n",
    "an extension that is too long": CHUNKED
    + b"5;"
    + b"a" * _http.MAX_CHUNK_LINE_BYTES
    + b"\r\nhello\r\n0\r\n\r\n",
    "a trailer that is too long": CHUNKED + b"0\r\nx: " + b"y" * _http.MAX_TRAILER_BYTES + b"\r\n\r\n",
    "too many trailers": CHUNKED + b"0\r\n" + b"x: y\r\n" * _http.MAX_TRAILER_BYTES,
    "a trailer that is folded": CHUNKED + b"0\r\nx: y\r\n z\r\n\r\n",
    "a trailer without a colon": CHUNKED + b"0\r\nxy\r\n\r\n",
    "a trailer without a name": CHUNKED + b"0\r\n: y\r\n\r\n",
    "a trailer's line that ends in LF": CHUNKED + b"0\r\nx: y\nz: a\r\n\r\n",
    "a trailer's line that ends in CR": CHUNKED + b"0\r\nx: y\rz: a\r\n\r\n",
    "an end in LF": CHUNKED + b"0\r\n\n",
    "an end in CR": CHUNKED + b"0\r\n\rx",
    # too much
    "too many fields": told(*[b"x: y"] * (_http.MAX_FIELDS + 1)),
    "a head that is too large": told(b"x: " + b"y" * _http.MAX_HEAD_BYTES),
    "a head without end": OK + b"x: " + b"y" * _http.MAX_HEAD_BYTES,
    "interim answers without end": told(line=b"HTTP/1.1 100 Continue\r\n") * 3_000,
}

each_taken = pytest.mark.parametrize("case", TAKEN.values(), ids=TAKEN)
each_refused = pytest.mark.parametrize("data", REFUSED.values(), ids=REFUSED)


@each_taken
def test_answer_is_read_whole(case):
    """Status, fields, body and end are what they are, and so is whether the connection is of further use."""
    data, expected, reusable = case
    assert ours(data) == (expected, reusable)
    if reusable:
        compare(data, [])


@each_taken
def test_answer_is_read_alike_in_any_pieces(case):
    """Wherever the bytes are cut, and however often, the answer is the same."""
    data, expected, reusable = case
    for place in range(1, len(data)):
        assert ours(*cut(data, [place])) == (expected, reusable), place
    assert ours(*cut(data, range(len(data)))) == (expected, reusable)


@each_refused
def test_what_could_be_read_in_two_ways_is_refused(data):
    """It is refused whole, in halves and, where that is soon done, byte by byte."""
    assert ours(data) == (None, False)
    for place in range(1, len(data), 1 + len(data) // 100):
        assert ours(*cut(data, [place])) == (None, False), place
    if len(data) < 10_000:
        assert ours(*cut(data, range(len(data)))) == (None, False)


LENGTH = b"content-length: 0"
BOUNDS = {
    "fields": lambda more: told(LENGTH, *[b"x: y"] * (_http.MAX_FIELDS - 1 + more)),
    "a name": lambda more: told(LENGTH, b"x" * (256 + more) + b":"),
    "a head": lambda more: told(LENGTH, b"x: " + b"y" * (_http.MAX_HEAD_BYTES - 43 + more)),
    "interim answers": lambda more: (
        told(line=b"HTTP/1.1 100 X\r\n") * 100
        + told(LENGTH, b"x: " + b"y" * (_http.MAX_HEAD_BYTES - 43 - 1_800 + more))
    ),
    "a chunk's size": lambda more: CHUNKED + b"1".rjust(12 + more, b"0") + b"\r\nx\r\n0\r\n\r\n",
    "an extension": lambda more: (
        CHUNKED + b"1;" + b"a" * (_http.MAX_CHUNK_LINE_BYTES - 1 + more) + b"\r\nx\r\n0\r\n\r\n"
    ),
    "a trailer": lambda more: CHUNKED + b"0\r\nx:" + b"y" * (_http.MAX_TRAILER_BYTES - 6 + more) + b"\r\n\r\n",
}


@pytest.mark.parametrize("sized", BOUNDS.values(), ids=BOUNDS)
def test_bounds_are_exact(sized):
    """What is as large as it may be is taken, and what is larger by one is not."""
    taken, _ = ours(sized(0))
    assert taken.done
    assert ours(sized(1)) == (None, False)


def test_largest_length_has_15_digits():
    """What follows is far from it."""
    taken, _ = ours(told(b"content-length: " + b"9" * 15) + b"hello")
    assert (taken.body, taken.done) == (b"hello", False)


def test_answer_to_head_has_no_body():
    """Its length is that of a body which does not come."""
    reader = AnswerReader()
    reader.begin(True)
    assert reader.feed(told(b"content-length: 5")) == b""
    assert reader.done
    assert reader.reusable


def test_reader_begins_anew():
    """What one answer left does not touch the next."""
    reader = AnswerReader()
    for _ in range(2):
        assert reader.feed(told(line=b"HTTP/1.1 100 X\r\n") + told(b"content-length: 5") + b"hel") == b"hel"
        assert (reader.headed, reader.done) == (True, False)
        assert reader.feed(b"lo") == b"lo"
        assert reader.done
        reader.begin(False)
        assert (reader.status, reader.headers, reader.headed, reader.done, reader.reusable) == (
            0,
            None,
            False,
            False,
            False,
        )


@pytest.mark.parametrize(
    ("data", "whole"),
    [
        (told() + b"hello", True),
        (told(b"content-length: 5") + b"hello", True),
        (told(b"content-length: 5") + b"hell", False),
        (CHUNKED + b"5\r\nhello\r\n", False),
        (CHUNKED + b"0\r\n", False),
        (CHUNKED + b"0\r\n\r\n", True),
        (OK, False),
        (b"", False),
    ],
)
def test_end_of_the_connection_ends_what_has_no_length_alone(data, whole):
    """Whatever told how long it is has to be as long."""
    reader = AnswerReader()
    reader.feed(data)
    assert reader.end() is whole
    assert reader.done is whole


def test_errors_say_what_is_wrong():
    """An operator reads in the log what the provider did."""
    with pytest.raises(
        UpstreamError, match=r"^the provider's answer is no HTTP \(it begins with something else\)$"
    ):
        AnswerReader().feed(b"SSH-2.0-OpenSSH")


@settings(properties, max_examples=300)
@given(st.randoms(use_true_random=False))
def test_whatever_we_take_llhttp_takes_alike(rng):
    """Answers plain and damaged, in any pieces: what we take, llhttp takes for the same."""
    compare(*drawn(rng))


def test_thousands_of_random_answers_are_read_as_llhttp_reads_them():
    """More of the same; ``python -m tests.answers`` goes on for as long as it is told."""
    count, taken = hunt(Random().getrandbits(32), lambda count: count < 5_000)
    assert taken > count / 5


# --- requests ---------------------------------------------------------------------------------------------------

REQUEST = b"POST /v1/chat/completions HTTP/1.1\r\n"


class Request:
    """What llhttp takes a request's head for."""

    def __init__(self):
        self.fields = []

    def on_header(self, name, value):
        self.fields.append((name.lower(), value.strip(b" \t")))


def theirs_of_request(head):
    """Return the fields that llhttp reads in a head; None if it refuses it."""
    request = Request()
    try:
        httptools.HttpRequestParser(request).feed_data(head)
    except httptools.HttpParserUpgrade:
        return request.fields
    except httptools.HttpParserError:
        return None
    return request.fields


PLAIN = {
    "nothing else": (told(line=REQUEST), [], None, False),
    "a length": (told(b"Content-Length: 12", line=REQUEST), [(b"content-length", b"12")], 12, False),
    "chunks": (told(b"transfer-encoding: chunked", line=REQUEST), TE, None, True),
    "fields": (
        told(b"Host:x", b"X-User-ID:  alice ", b"x-empty:", line=REQUEST),
        [(b"host", b"x"), (b"x-user-id", b"alice"), (b"x-empty", b"")],
        None,
        False,
    ),
}


@pytest.mark.parametrize("case", PLAIN.values(), ids=PLAIN)
def test_head_of_a_request_is_read(case):
    """The first line, the fields and the length are what they are, for llhttp too."""
    head, fields, size, chunks = case
    assert read_head(head) == (REQUEST[:-2], fields, size, chunks)
    assert theirs_of_request(head) == fields


ABOUT_FIELDS = {
    name: REQUEST + data[len(OK) :]
    for name, data in REFUSED.items()
    if data.startswith(OK) and data.endswith(b"\r\n\r\n") and data.count(b"\r\n\r\n") == 1
}


@pytest.mark.parametrize("head", ABOUT_FIELDS.values(), ids=ABOUT_FIELDS)
def test_head_of_a_request_that_could_be_read_in_two_ways_is_refused(head):
    """A head is no less strict where it begins a request."""
    if len(head) <= _http.MAX_HEAD_BYTES:
        assert read_head(head) is None


@pytest.mark.parametrize(
    "head",
    [
        b"",
        b"\r\n",
        REQUEST,
        told(line=REQUEST) + b"x",
        told(line=REQUEST)[:-1],
        told(b"host: a", b"host: b", line=REQUEST),
    ],
)
def test_head_of_a_request_is_whole_and_nothing_more(head):
    """What has no blank line, or something behind it, is none; nor is one with two hosts."""
    assert read_head(head) is None


tokens = st.sampled_from(
    [b"host", b"Content-Length", b"transfer-encoding", b"x-user-id", b"Expect", b"x"]
) | st.binary(max_size=6)
values = st.sampled_from([b"5", b"chunked", b"a, b", b"", b"100-continue", b"5, 5"]) | st.binary(max_size=8)
seams = st.sampled_from([b": ", b":", b" : ", b":\t", b""])
ends = st.sampled_from([b"\r\n"] * 8 + [b"\n", b"\r", b"\r\n ", b"\r\r\n"])


@settings(properties, max_examples=300)
@given(st.lists(st.tuples(tokens, seams, values, ends).map(b"".join), max_size=5))
def test_whatever_head_of_a_request_we_take_llhttp_takes_alike(lines):
    """Fields plain and odd: what we take, llhttp takes for the same."""
    head = REQUEST + b"".join(lines) + b"\r\n"
    taken = read_head(head)
    if taken is not None:
        assert theirs_of_request(head) == [(name, value.strip(b"\t ")) for name, value in taken[1]]
