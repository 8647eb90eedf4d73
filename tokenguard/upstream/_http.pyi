"""HTTP/1.1 as bytes: reads heads and answers, strictly. What C alone can see of it stands in ``_http.pxd``.

Every line ends in CRLF, a name is a token right before its colon, a value holds no control character, a length is
told once, in one way. What two readers could take for different things is not taken at all.

Source: RFC 9110, sections 5 and 6; RFC 9112, sections 2 and 4 to 7.
"""

from typing import Final, final

from tokenguard.model import Headers

MAX_HEAD_BYTES: Final[int]
"""The most bytes of the head of an answer, together with those of the interim answers before: 64 KiB."""
MAX_FIELDS: Final[int]
"""The most fields that a head may have: 256."""
MAX_CHUNK_LINE_BYTES: Final[int]
"""The most bytes that the size of a chunk and its extension may have: 4 KiB."""
MAX_TRAILER_BYTES: Final[int]
"""The most bytes that may stand behind the last chunk: 8 KiB."""

@final
class AnswerReader:
    """Reads one answer after the other, in whatever pieces they come.

    Interim answers (1xx) are passed over, and trailers and the extensions of chunks are checked and dropped. An
    answer that changes to another protocol (101) is refused.

    Attributes:
        status: The status, 100 to 999, once the head has come; other values until then are of no meaning.
        headers: The fields of the head, likewise: the names in lower case, the values without blanks around them.
        headed: Whether the head has come.
        done: Whether the answer has come to its end.
        reusable: Whether the connection can carry another request once this answer is done: the provider keeps it,
            and has said nothing that nobody asked for.
    """

    @property
    def status(self) -> int: ...
    @property
    def headers(self) -> Headers: ...
    @property
    def headed(self) -> bool: ...
    @property
    def done(self) -> bool: ...
    @property
    def reusable(self) -> bool: ...
    def begin(self, bodiless: bool) -> None:
        """Expect the next answer.

        Args:
            bodiless: Whether it has no body whatever its head says, as the answer to a HEAD.
        """

    def feed(self, data: bytes) -> bytes:
        """Take in what has come.

        Args:
            data: The bytes; nothing may be fed after an error but after ``begin``.

        Returns:
            What it adds to the body.

        Raises:
            UpstreamError: It is no answer, or one that is not plain; ``sent`` is True.
        """

    def end(self) -> bool:
        """Take note that the connection has ended, which ends an answer that does not tell its length.

        Returns:
            Whether the answer is whole.
        """

def read_head(head: bytes) -> tuple[bytes, Headers, int | None, bool] | None:
    """Read the head of a message, from its first byte to its blank line.

    Args:
        head: All of it, and nothing more.

    Returns:
        The first line as it is, without its end, the fields, the length of the body in bytes and whether that is
        in chunks; None if it is not plain.
    """
