"""The ``x-ratelimit-*`` header fields.

Source: https://platform.openai.com/docs/guides/rate-limits
"""

from collections.abc import Iterable

from tokenguard._bucket import Outcome
from tokenguard.model import Headers, Meter

_Groups = tuple[tuple[tuple[bytes, ...], tuple[int, ...]], ...]
"""The numbers of a plan's buckets, those of one meter together, and how the fields that tell of them begin."""

def by_meter(meters: Iterable[Meter]) -> _Groups:
    """Return the groups of a plan's buckets; meters in the order in which they appear."""

def limit_headers(groups: _Groups, outcome: Outcome) -> Headers:
    """Return the fields that tell of each group's tightest bucket: with the least in it, the first of equals."""

def limit_lines(groups: _Groups, outcome: Outcome) -> bytes:
    """Return the same as lines, each with its CRLF."""

def duration(us: int) -> str:
    """Return a time as the provider writes it, rounded up to the millisecond: 12ms, 8.64s, 6m0s, 1h0m2s."""

__pyx_capi__: dict[str, object]
"""How other compiled modules find what is here."""
