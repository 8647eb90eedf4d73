"""What of a head travels on, and what it says of a call.

A head comes as a list of fields, or as ``Fields``, which stand in a connection's bytes. What is handed on is a
list, or a block: lines, each with its CRLF.
"""

from typing import Self

from typing_extensions import disjoint_base

from tokenguard._fields import Fields
from tokenguard.model import Headers, Identity

IDENTITY_HEADERS: dict[bytes, str]
"""The fields that say who calls, and which part of an identity each is."""
REQUEST_ID: bytes
"""The header field that one call is known by, from the caller to the provider and back."""
LIMITS: tuple[str, ...]
"""What the provider's limits are on, as the names of its fields end."""
MAX_KNOWN: int
"""How many callers' fields are remembered as what they came to; the oldest are forgotten first."""
HOP_BY_HOP: tuple[bytes, ...]
"""Fields that are between two of the three alone."""
NOT_TO_UPSTREAM: tuple[bytes, ...]
"""Fields of a request that do not travel to the provider."""
NOT_TO_CALLER: tuple[bytes, ...]
"""Fields of an answer that do not travel back."""

@disjoint_base
class Asked:
    """The fields of a request, sorted out.

    Attributes:
        encoded: Whether the body has a content-encoding.
    """

    encoded: bool

    def __new__(cls, headers: Headers | Fields) -> Self: ...
    def identity(self) -> Identity:
        """Return who calls.

        Raises:
            InvalidRequest: A field is malformed or given twice, or the user is missing.
        """

    def forwarded(self, credentials: Headers, request_id: str) -> Headers:
        """Return what travels to the provider: the fields but those between us two, and our credentials."""

    def forwarded_block(self, ours: bytes, request_id: str) -> bytes:
        """Return the same as a block; ``ours`` are lines, put last."""

@disjoint_base
class Told:
    """The fields of an answer, sorted out.

    Attributes:
        length: What content-length tells; -1 if nothing does.
        encoding: What content-encoding tells, in lower case; None if there is none.
        events: Whether the body is server-sent events.
        typed: Whether there is a content-type.
        measured: Whether there is a content-length, or one that has not been dropped.
        limits: What the provider tells of its own limits: 0 nothing, 1 what can be used, 2 what cannot.
        usable: Whether it is what can be used.
        requests_limit: The limit on requests; -1 if it is not told, or makes no sense.
        requests_left: What remains of it, likewise.
        tokens_limit: The limit on tokens, of those that are told the tightest; likewise.
        tokens_left: The least that remains of any of them, likewise.
        tokens_left_of_limit: What remains of the tightest one itself, likewise.
        in_windows: Whether a time is told in whole seconds without a unit, as who counts in windows does (Azure).
    """

    limits: int
    usable: bool
    requests_limit: int
    requests_left: int
    tokens_limit: int
    tokens_left: int
    tokens_left_of_limit: int
    in_windows: bool
    length: int
    encoding: bytes | None
    events: bool
    typed: bool
    measured: bool

    def __new__(cls, headers: Headers | Fields) -> Self: ...
    def reset(self, of_tokens: bool) -> bytes:
        """Return when the bucket of the limit on tokens, or on requests, is full, as the provider words it."""

    def values(self, *names: bytes) -> list[bytes]:
        """Return the values of all fields with one of some names."""

    def returned(self, drop_length: bool, drop_encoding: bool) -> Headers:
        """Return what travels back to the caller; the provider's own limits and id under names of their own."""

    def returned_block(self, drop_length: bool, drop_encoding: bool, last: bytes) -> bytes:
        """Return the same as a block; ``last`` are lines, put last.

        A field that is given more than once is there once, with all its values, as Falcon has it.
        """

def read_identity(headers: Headers) -> Identity:
    """Return who calls.

    Raises:
        InvalidRequest: A field is malformed or given twice, or the user is missing.
    """

def forwarded_headers(headers: Headers, credentials: Headers, request_id: str) -> Headers:
    """Return what travels to the provider: the caller's fields but those between us two, and our credentials."""

def returned_headers(headers: Headers, drop_length: bool, drop_encoding: bool) -> Headers:
    """Return what travels back to the caller; the provider's own limits and id under names of their own."""
