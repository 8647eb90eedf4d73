"""A batch of calls without I/O: what travels to ``lua/calls.lua``, and what comes back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import IntEnum
from functools import cached_property, lru_cache
from typing import NamedTuple

import msgspec

from tokenguard._bucket import Handle, Outcome, outcome_of
from tokenguard.model import Budget, Scale

MAX_CALLS = 64
"""In one batch: what Redis does for it, it does without looking at anybody else."""

MAX_AMOUNT = 2**53
"""The most tokens that one call may ask of a bucket, or give back to it: what a double holds exactly."""

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(list).decode
_HEAD = 4
"""How many integers a reply begins with: done, now_us, forgiven, clock_steps."""
_STALE = -1


def checked(amounts: tuple[int, ...], count: int, least: int) -> tuple[int, ...]:
    """Return costs or deltas if a batch can hold them.

    Raises:
        ValueError: There are not ``count``, or one is below ``least`` or beyond what Lua counts exactly.
    """
    if len(amounts) != count:
        raise ValueError(f"the plan has {count} buckets, got {len(amounts)} amounts")
    if amounts and not (least <= min(amounts) and max(amounts) <= MAX_AMOUNT):
        raise ValueError(f"an amount must be between {least} and 2^53, got {amounts}")
    return amounts


class Kind(IntEnum):
    """What a call asks for, as the script numbers it."""

    RESERVE = 1
    SETTLE = 2
    PEEK = 3


class Ref(NamedTuple):
    """One bucket as a batch names it.

    Attributes:
        key: Its key in Redis.
        scale: The scale that its budget has, as text.
    """

    key: bytes
    scale: str


class Stale:
    """What came of a reserve whose plan was made under another epoch."""


STALE = Stale()


class RedisHandle:
    """A plan made ready for Redis.

    Attributes:
        epoch: What its budgets were read under.
        refs: Its buckets.
        budgets: Its budgets.
        plan: The same for the embedded engine, which reads what Redis answers.
        share: What a node goes by on its own; made when it has to.
    """

    def __init__(self, epoch: str, refs: tuple[Ref, ...], budgets: tuple[Budget, ...], plan: Handle) -> None:
        self.epoch = epoch
        self.refs = refs
        self.budgets = budgets
        self.plan = plan
        self.share: Handle | None = None

    def __len__(self) -> int:
        return len(self.refs)

    @cached_property
    def alone(self) -> tuple[list[bytes], list[str | int], list[int], list[int]]:
        """What a batch of one call is made of: keys, scales, where these are, and how many buckets and which."""
        keys, scales, scale_at, flat = _flat([Call(Kind.PEEK, self.refs, ())])
        return keys, scales, scale_at, flat[1:]


class Call(NamedTuple):
    """One call of a batch.

    Attributes:
        kind: What it asks for.
        refs: Its buckets.
        amounts: Costs or deltas in tokens, one for each; none for a peek.
        handle: The plan; None for a settlement that nobody waits for.
    """

    kind: Kind
    refs: tuple[Ref, ...]
    amounts: tuple[int, ...]
    handle: RedisHandle | None = None


Result = Outcome | Stale | int


class Reply(NamedTuple):
    """What came of a batch.

    Attributes:
        done: False if the batch was sent before, or came too late: then there are no results.
        now_us: The time it was evaluated at, by the clock of Redis.
        forgiven: Tokens that fell below the floor of a bucket's debt, summed over all calls.
        clock_steps: How many buckets met a clock that had stepped back by over 1 s.
        results: For each call: an outcome, ``STALE``, or the tokens that a settlement forgave.
    """

    done: bool
    now_us: int = 0
    forgiven: int = 0
    clock_steps: int = 0
    results: Sequence[Result] = ()


def scale_text(scale: Scale) -> str:
    """Return a scale as it stands in Redis: ``C D r q tau``."""
    return "{} {} {} {} {}".format(*scale)


def read_scale(text: str) -> Scale:
    """Return the scale that a text names."""
    return Scale(*map(int, text.split(" ")))


@lru_cache(1024)
def _parts(text: str) -> tuple[str | int, ...]:
    return (text, *read_scale(text))


def encode(
    calls: Sequence[Call], number: int, epoch: str, *, recorded: bool, now_us: int | None = None
) -> tuple[list[bytes], bytes]:
    """Return the keys of a batch's buckets, and the batch as ``lua/calls.lua`` reads it."""
    how = (number, recorded, epoch, False if now_us is None else now_us)
    if len(calls) == 1 and (handle := calls[0].handle) is not None:  # PERF: row "one caller" of redis_rows
        keys, scales, scale_at, places = handle.alone
        return keys, _encode((*how, scales, scale_at, (calls[0].kind, *places, *calls[0].amounts)))
    keys, scales, scale_at, flat = _flat(calls)
    return keys, _encode((*how, scales, scale_at, flat))


def _flat(calls: Iterable[Call]) -> tuple[list[bytes], list[str | int], list[int], list[int]]:
    """Return the keys of some calls' buckets, their scales, where these are, and the calls themselves."""
    places: dict[Ref, int] = {}
    flat: list[int] = []
    for call in calls:
        flat.append(call.kind)
        flat.append(len(call.refs))
        for ref in call.refs:
            place = places.get(ref)
            if place is None:
                place = places[ref] = len(places) + 1
            flat.append(place)
        flat.extend(call.amounts)
    texts: dict[str, int] = {}
    scales: list[str | int] = []
    scale_at: list[int] = []
    for ref in places:
        at = texts.get(ref.scale)
        if at is None:
            at = texts[ref.scale] = len(scales) + 1
            scales += _parts(ref.scale)
        scale_at.append(at)
    return [ref.key for ref in places], scales, scale_at, flat


def decode(calls: Iterable[Call], reply: bytes) -> Reply:
    """Return what the script says came of a batch."""
    told = _decode(reply)
    if not told[0]:
        return Reply(done=False)
    now_us, forgiven, clock_steps = map(int, told[1:_HEAD])  # a sum of very much that is forgiven comes as a float
    results: list[Result] = []
    at = _HEAD
    for kind, refs, costs, handle in calls:
        if kind is Kind.SETTLE:
            results.append(int(told[at]))
            forgiven += int(told[at])
            at += 1
            continue
        assert handle is not None  # noqa: S101 - who asks for more than a settlement has a plan
        if kind is Kind.PEEK:
            outcome = outcome_of(handle.plan, None, True, told, at, now_us)
        elif told[at] == _STALE:
            results.append(STALE)
            at += 1
            continue
        else:
            at += 1
            outcome = outcome_of(handle.plan, costs, told[at - 1] == 1, told, at, now_us)
        outcome.handle = handle
        results.append(outcome)
        at += 2 * len(refs)
    return Reply(True, now_us, forgiven, clock_steps, results)
