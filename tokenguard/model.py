"""The words of TokenGuard as frozen values: no I/O, no clock, no arithmetic."""

from __future__ import annotations

from enum import StrEnum
from fractions import Fraction
from hashlib import blake2b
from typing import NamedTuple

from tokenguard._fields import list_of
from tokenguard.errors import InvalidValue

GLOBAL = "global"
SCOPE_KINDS = (GLOBAL, "team", "rolegroup", "role", "user")
"""The levels of the hierarchy, in the order in which a call passes them."""

GLOBAL_ID = "*"
"""The one id of the scope ``global``."""

MAX_ID_BYTES = 256
NEVER_US = 10**15
"""A wait this long, in µs, means never (31 years)."""

SEPARATOR = "\x1f"


class Meter(StrEnum):
    """What a budget counts.

    ``GATE`` is for ourselves alone: calls of a model whose provider has asked to wait, in thousandths of a call.
    """

    TOKENS = "tokens"
    REQUESTS = "requests"
    GATE = "gate"


SETTABLE_METERS = (Meter.TOKENS, Meter.REQUESTS)
"""What a budget that is set by hand may count."""


class Source(StrEnum):
    """Where a limit of the provider's own was learned."""

    HEADERS = "headers"
    ADMIN = "admin"
    ADMIN_DAILY = "admin-daily"
    GATE = "gate"


def checked_name(field: str, value: str) -> str:
    """Return ``value`` if it can name a scope or a model.

    Args:
        field: What the value was given as, for the message.
        value: 1 to 256 bytes of UTF-8 without control characters, and without white space at its ends.

    Raises:
        InvalidValue: It is not.
    """
    try:
        size = len(value.encode())
    except UnicodeEncodeError:
        raise InvalidValue(field, f"{field} must be valid UTF-8, got a lone surrogate") from None
    if not 1 <= size <= MAX_ID_BYTES:
        raise InvalidValue(field, f"{field} must be 1 to {MAX_ID_BYTES} bytes of UTF-8, got {size}")
    if any(character < " " or "\x7f" <= character <= "\x9f" for character in value):
        raise InvalidValue(field, f"{field} must not contain control characters, got {value!r}")
    if value != value.strip():
        raise InvalidValue(field, f"{field} must not begin or end with white space, got {value!r}")
    return value


class Scope(NamedTuple):
    """One level of the hierarchy and an id on it: ``team:data-science``, ``global:*``."""

    kind: str
    id: str

    def __str__(self) -> str:
        return f"{self.kind}:{self.id}"


EVERYBODY = Scope(GLOBAL, GLOBAL_ID)
"""The one scope that every call passes."""


class Identity(NamedTuple):
    """Who calls. What is absent is not on the call's path."""

    user: str
    team: str | None = None
    role: str | None = None
    rolegroup: str | None = None

    def scopes(self) -> list[Scope]:
        """Return the scopes on the caller's path, from ``global`` down to ``user``."""
        ids = (GLOBAL_ID, self.team, self.rolegroup, self.role, self.user)
        return [Scope(kind, id_) for kind, id_ in zip(SCOPE_KINDS, ids, strict=True) if id_ is not None]


class BucketName(NamedTuple):
    """What one budget limits, and one bucket counts.

    Attributes:
        scope: On whom.
        meter: What is counted.
        model: Of which model's calls; None means all models.
        source: Where it was learned, if it is a limit of the provider's own; None if it is ours.
    """

    scope: Scope
    meter: Meter = Meter.TOKENS
    model: str | None = None
    source: Source | None = None

    @property
    def key(self) -> bytes:
        """The name as bytes, the same in every backend."""
        parts = [self.scope.kind, self.scope.id, self.meter, self.model or ""]
        if self.source is not None:
            parts.append(self.source)
        return SEPARATOR.join(parts).encode()

    @property
    def digest(self) -> bytes:
        """Eight bytes that stand for the key where that may be too long."""
        return blake2b(self.key, digest_size=8).digest()

    @classmethod
    def from_key(cls, key: bytes) -> BucketName:
        """Return the name that has a key."""
        kind, scope_id, meter, model, *source = key.decode().split(SEPARATOR)
        return cls(Scope(kind, scope_id), Meter(meter), model or None, Source(source[0]) if source else None)

    def __str__(self) -> str:
        return f"{self.scope} on {self.meter}" + (f" of {self.model}" if self.model else "")


class Scale(NamedTuple):
    """A budget's amounts as exact integers; ``arithmetic.scale`` makes them.

    Attributes:
        capacity: The most the bucket holds, in whole tokens (or requests), 1 to 10^12.
        debt: How far below zero it may go, in whole tokens.
        gain: Units that flow in per tick; 0 for a fixed grant.
        unit: Units per token, at least 1.
        tick_us: The length of a tick: a power of ten from 1 to 10^6 µs.
    """

    capacity: int
    debt: int
    gain: int
    unit: int
    tick_us: int

    @property
    def rate(self) -> Fraction:
        """The refill rate in effect, per second."""
        return Fraction(self.gain * 1_000_000, self.unit * self.tick_us)

    @property
    def per_sec(self) -> float:
        """The same as people write it: whole where it is."""
        return self.rate.numerator if self.rate.denominator == 1 else float(self.rate)


class Budget(NamedTuple):
    """A limit set on a scope: what it limits, and how much."""

    name: BucketName
    scale: Scale


class BucketState(NamedTuple):
    """One bucket as a decision found it, after the decision.

    Attributes:
        name: Which bucket.
        limit: Its capacity, in whole tokens or requests.
        level: What is in it, rounded down; below 0 it is debt.
        cost: What the call asked of it.
        wait_us: How long until it alone would have let the call pass: 0 if it did, ``NEVER_US`` if never.
        full_in_us: How long until it is full, or ``NEVER_US``.
    """

    name: BucketName
    limit: int
    level: int
    cost: int
    wait_us: int
    full_in_us: int

    @property
    def remaining(self) -> int:
        """The level as far as it can be spent: never below 0."""
        return max(0, self.level)


class Decision(NamedTuple):
    """What came of asking for a reservation.

    Attributes:
        allowed: Whether every bucket of the plan passed.
        retry_after_us: How long until the same call would pass if nobody else is admitted meanwhile:
            0 if allowed, ``NEVER_US`` if waiting does not help.
        binding: The bucket with the longest wait; None if allowed.
        buckets: Every bucket of the plan, in the order of the hierarchy.
    """

    allowed: bool
    retry_after_us: int
    binding: BucketState | None
    buckets: tuple[BucketState, ...]

    def __bool__(self) -> bool:
        return self.allowed

    def __repr__(self) -> str:
        if self.binding is None:
            return "<Decision allowed>"
        wait = "waiting does not help" if self.retry_after is None else f"retry after {self.retry_after:g} s"
        return f"<Decision refused by {self.binding.name}, {wait}>"

    @property
    def retry_after(self) -> float | None:
        """The same wait in seconds, or None if waiting does not help."""
        return None if self.retry_after_us >= NEVER_US else self.retry_after_us / 1_000_000


class Usage(NamedTuple):
    """What a call really took, as the provider counts it, in tokens."""

    prompt: int
    completion: int
    total: int


Headers = list[tuple[bytes, bytes]]
"""HTTP header fields: names in lower case, in the order they came."""


class Answer:
    """A whole HTTP answer of our own.

    Args:
        status: The status.
        headers: The fields; None if they are in ``block``.
        body: The body.
        block: The fields as lines, each with its CRLF.
    """

    def __init__(self, status: int, headers: Headers | None, body: bytes, block: bytes = b"") -> None:
        self.status = status
        self.body = body
        self.block = block
        self._headers = headers

    @property
    def headers(self) -> Headers:
        """The fields, however they were given."""
        if self._headers is None:
            self._headers = list_of(self.block)
        return self._headers


class Head:
    """The status and header fields of an answer whose body follows in pieces.

    Attributes:
        status: The status.
        headers: The fields; none if they are in ``block``.
        block: The fields as lines, each with its CRLF.
        typed: Whether they tell the content's type.
        measured: Whether they tell its length.
    """

    def __init__(
        self, status: int, headers: Headers, block: bytes = b"", typed: bool = True, measured: bool = True
    ) -> None:
        self.status = status
        self.headers = headers
        self.block = block
        self.typed = typed
        self.measured = measured


class UpstreamRequest:
    """A request to the provider.

    Attributes:
        method: The HTTP method.
        path: The path below the provider's base URL, with a leading slash.
        headers: All fields but ``host`` and ``content-length``; none if they are in ``block``.
        body: The body, empty for none.
        stream: Whether the caller asked for a stream.
        block: The fields as lines, each with its CRLF.
    """

    def __init__(
        self, method: str, path: str, headers: Headers, body: bytes, stream: bool = False, block: bytes = b""
    ) -> None:
        self.method = method
        self.path = path
        self.headers = headers
        self.body = body
        self.stream = stream
        self.block = block
