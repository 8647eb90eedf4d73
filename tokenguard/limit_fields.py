"""The ``x-ratelimit-*`` header fields: of each meter's tightest bucket.

Source: https://platform.openai.com/docs/guides/rate-limits
"""

from __future__ import annotations

from collections.abc import Sequence

from tokenguard.model import NEVER_US, Headers, Meter

_NAMES = [
    (meter, b"x-ratelimit-limit-" + text, b"x-ratelimit-remaining-" + text, b"x-ratelimit-reset-" + text)
    for meter, text in ((meter, meter.value.encode()) for meter in Meter)
]
_NEVER_US = NEVER_US


def by_meter(meters: Sequence[Meter]) -> tuple[tuple[int, ...], ...]:
    """Return the numbers of buckets, those of one meter together; meters in the order in which they appear."""
    groups: dict[Meter, list[int]] = {}
    for i, meter in enumerate(meters):
        groups.setdefault(meter, []).append(i)
    return tuple([tuple(group) for group in groups.values()])


def tightest(groups: tuple[tuple[int, ...], ...], levels: list[int]) -> list[int]:
    """Return of each group the bucket with the least in it, the first of equals."""
    found = []
    for group in groups:
        lowest = group[0]
        for i in group:
            if levels[i] < levels[lowest]:
                lowest = i
        found.append(lowest)
    return found


def add_fields(headers: Headers, meter: Meter, limit: int, level: int, full_in_us: int) -> None:
    """Add the fields that tell of one bucket.

    Args:
        headers: Where to.
        meter: What the bucket counts.
        limit: Its capacity.
        level: What is in it.
        full_in_us: How long until it is full.
    """
    for names in _NAMES:
        if names[0] is meter:
            headers.append((names[1], f"{limit}".encode()))
            headers.append((names[2], f"{level if level > 0 else 0}".encode()))
            if full_in_us < _NEVER_US:
                headers.append((names[3], duration(full_in_us).encode()))


def duration(us: int) -> str:
    """Return a time as the provider writes it, rounded up to the millisecond: 12ms, 8.64s, 6m0s, 1h0m2s."""
    ms = -(-us // 1000)
    if ms < 1000:
        return f"{ms}ms"
    minutes = ms // 60_000
    ms %= 60_000
    hours = minutes // 60
    minutes %= 60
    text = f"{ms // 1000}"
    if hours:
        text = f"{hours}h{minutes}m{text}"
    elif minutes:
        text = f"{minutes}m{text}"
    if ms % 1000:
        text += f".{ms % 1000:03d}".rstrip("0")
    return text + "s"
