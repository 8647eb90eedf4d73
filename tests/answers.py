"""Answers of a provider as bytes: plain ones and damaged ones, and what llhttp takes them for.

Run as a module, it compares our reader to llhttp for as long as it is told:
``python -m tests.answers SECONDS [SEED]``.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from itertools import pairwise
from random import Random
from time import monotonic

import httptools

from tokenguard.errors import UpstreamError
from tokenguard.upstream._http import AnswerReader


@dataclass
class Read:
    """What a reader took some bytes for.

    Attributes:
        status: The status of the answer.
        fields: Its fields, the names in lower case.
        body: What of its body has come.
        done: Whether it has come to its end.
    """

    status: int
    fields: list[tuple[bytes, bytes]]
    body: bytes
    done: bool


class Llhttp:
    """The oracle: the reader that Node has, strict as httptools sets it."""

    def __init__(self):
        self._parser = httptools.HttpResponseParser(self)
        self.read = Read(0, [], b"", False)

    def on_message_begin(self):
        if not self.read.done:
            self.read = Read(0, [], b"", False)

    def on_header(self, name, value):
        if not self.read.done and not self.read.status:
            self.read.fields.append((name.lower(), value.strip(b" \t")))

    def on_headers_complete(self):
        if not self.read.done:
            self.read.status = self._parser.get_status_code()

    def on_body(self, piece):
        if not self.read.done:
            self.read.body += piece

    def on_message_complete(self):
        self.read.done = self.read.status >= 200

    def take(self, pieces):
        """Return what the pieces come to, or why they are refused before the answer's end."""
        for piece in pieces:
            try:
                self._parser.feed_data(piece)
            except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
                return self.read if self.read.done else f"{'body' if self.read.status else 'head'}: {error}"
        return self.read


def theirs(*pieces):
    """Return what llhttp takes pieces of an answer for, or why it refuses them."""
    return Llhttp().take(pieces)


def ours(*pieces):
    """Return what our reader takes them for, and whether the connection may carry another request."""
    reader = AnswerReader()
    body = b""
    try:
        for piece in pieces:
            body += reader.feed(piece)
    except UpstreamError:
        return None, False
    if not reader.headed:
        return Read(0, [], b"", False), False
    return Read(reader.status, reader.headers, body, reader.done), reader.reusable


def cut(data, places):
    """Return data in the pieces that cuts at some places make of it."""
    edges = [0, *sorted(place for place in set(places) if 0 < place < len(data)), len(data)]
    return [data[here:there] for here, there in pairwise(edges)]


UNLIKE = (
    "body: Invalid character in chunk extensions",  # any text is one to us, for nobody reads it
    "body: Content-Length can't be present",  # in a trailer, likewise
    "body: Transfer-Encoding can't be present",
    "body: Data after `Connection: close`",  # an interim answer that says so, or is of HTTP/1.0
)
"""Why llhttp refuses some of what we take."""

# --- at random --------------------------------------------------------------------------------------------------

STATUSES = [b"200 OK", b"200 ", b"200", b"429 Too Many Requests", b"204 No", b"304 No", b"500 \xe9", b"799 Odd"]
INTERIM = [b"100 Continue", b"103 Early Hints", b"102 "]
FIELDS = [
    b"content-type: application/json",
    b"X-Odd:\t\xe9 ",
    b"x-empty:",
    b"date: Sun, 06 Nov 1994 08:49:37 GMT",
    b"connection: close",
    b"connection: Keep-Alive, x",
    b"set-cookie: a=b",
    b"!#$%&'*+-.^_`|~: token",
    b"content-length: 0",
    b"transfer-encoding: chunked",
]
FRAMING = [
    b"content-length: %d",
    b"Content-Length: %d ",
    b"transfer-encoding: chunked",
    b"Transfer-Encoding:CHUNKED",
    b"x-no-framing: %d",
]
ODD_BYTES = b'\r\n\0\t :;,="0123456789abcdefFgx+-_\x7f\x80\xff/HTP.1'
ODD_PIECES = [
    b"\r\n",
    b"\n",
    b"\r",
    b"\r\n\r\n",
    b"\r\n ",
    b" :",
    b"0\r\n\r\n",
    b"HTTP/1.1 200 OK\r\n",
    b"HTTP/2 200\r\n",
    b"\r\ncontent-length: 3",
    b"\r\ntransfer-encoding: chunked",
    b"\r\ntransfer-encoding: gzip, chunked",
    b"\r\ncontent-length: 5, 5",
    b"ffffffffffffffff",
    b"0x3",
    b"+3",
]
EXTENSIONS = [b"", b"", b"", b";a", b";a=b", b';a="b;c"', b";"]


def chunked(rng, body):
    """Return a body in chunks."""
    edges = cut(body, [rng.randrange(len(body) + 1) for _ in range(rng.randrange(4))]) if body else []
    size = rng.choice([b"%x", b"%X", b"0%x"])
    chunks = b"".join((size % len(piece)) + rng.choice(EXTENSIONS) + b"\r\n" + piece + b"\r\n" for piece in edges)
    trailers = b"".join(b"x-trailer: %d\r\n" % n for n in range(rng.choice([0, 0, 0, 1, 2])))
    return chunks + b"0" + rng.choice(EXTENSIONS) + b"\r\n" + trailers + b"\r\n"


def plain(rng):
    """Return an answer that most readers would take."""
    body = bytes(rng.randrange(256) for _ in range(rng.choice([0, 1, 5, 40])))
    framing = rng.choice(FRAMING)
    fields = [*rng.sample(FIELDS[:-2], rng.randrange(4)), framing % len(body) if b"%" in framing else framing]
    rng.shuffle(fields)
    told = b"".join(field + b"\r\n" for field in fields)
    lines = [b"HTTP/1.1 %b\r\n\r\n" % rng.choice(INTERIM) for _ in range(rng.choice([0, 0, 0, 1, 3]))]
    lines.append(b"HTTP/1.%d %b\r\n%b\r\n" % (rng.random() > 0.1, rng.choice(STATUSES), told))
    return b"".join(lines) + (chunked(rng, body) if b"chunked" in framing.lower() else body)


def damaged(rng, data):
    """Return an answer with a few bytes put in, taken away, exchanged or sent twice."""
    for _ in range(rng.choice([0, 1, 1, 2, 4])):
        at = rng.randrange(len(data) + 1)
        upto = min(len(data), at + rng.choice([0, 0, 1, 1, 2, 9]))
        piece = rng.choice([bytes([rng.choice(ODD_BYTES)]), rng.choice(ODD_PIECES), rng.choice(FIELDS), b""])
        data = data[:at] + rng.choice([piece, data[at:upto] * 2]) + data[upto:]
    return data


def raw(rng):
    """Return bytes of no kind, or what begins as an answer and goes on with them."""
    odd = bytes(rng.choice(ODD_BYTES) for _ in range(rng.randrange(60)))
    return (
        rng.choice([b"", b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"]) + odd
    )


def drawn(rng):
    """Return the bytes of an answer, and where to cut them."""
    data = raw(rng) if rng.random() < 0.1 else damaged(rng, plain(rng))
    places = range(len(data)) if rng.random() < 0.2 else [rng.randrange(len(data) + 1) for _ in range(3)]
    return data, list(places)


def compare(data, places):
    """Assert that the pieces are read as the whole is, and as llhttp reads them; return whether they are taken."""
    read, reusable = ours(data)
    assert ours(*cut(data, places)) == (read, reusable), "it is read in another way in pieces"
    if read is None or not read.status:
        return False
    read.fields = [(name, value.strip(b" \t")) for name, value in read.fields]
    other = theirs(data)
    if isinstance(other, str) and other.startswith(UNLIKE):
        return False
    assert read == other, f"llhttp reads {other}, and we {read}"
    return read.done


def hunt(seed, goes_on):
    """Compare one random answer after the other, for as long as ``goes_on`` says of how many there were.

    Returns:
        How many there were, and how many of them were taken whole.
    """
    rng = Random(seed)
    count = taken = 0
    while goes_on(count):
        data, places = drawn(rng)
        try:
            taken += compare(data, places)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}, answer {count}: {data!r} cut at {places}: {error}") from None
        count += 1
    return count, taken


def main():
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else Random().getrandbits(32)
    until = monotonic() + float(sys.argv[1])
    count, taken = hunt(seed, lambda _: monotonic() < until)
    print(f"seed {seed}: {count} answers, {taken} taken whole, no difference")


if __name__ == "__main__":
    main()
