"""Limits as a provider keeps them, and what it charges to them: no clock is read here, and no I/O is done."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from math import ceil
from typing import NamedTuple

_NS = 10**9
DAY_S = 86_400
MODEL_MAXIMUM = 4096
"""What a caller without a cap may take, in tokens, where the provider reserves as much as the model can say."""


def duration(seconds):
    """Return a time as Go writes durations, to the millisecond: 12ms, 8.64s, 6m0s."""
    ms = round(Fraction(seconds) * 1000)
    if ms < 1000:
        return f"{ms}ms" if ms else "0s"
    minutes, ms = divmod(ms, 60_000)
    rest = f"{ms // 1000}.{ms % 1000:03}".rstrip("0").rstrip(".") + "s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes}m{rest}" if hours else f"{minutes}m{rest}" if minutes else rest


def plain_seconds(seconds):
    """Return a time in whole seconds, as Azure does, rounded up."""
    return str(ceil(seconds))


class Told(NamedTuple):
    """What a provider tells of a limit."""

    limit: int
    remaining: int
    reset_s: Fraction


class Limit:
    """A token bucket: the limit is its capacity, and within the window an empty one is full again.

    All is reckoned in whole numbers: a unit is one of ``window_s`` * 10^9 parts of a token.

    Args:
        limit: The most that it holds, full at first.
        window_s: Whole seconds.
        others_per_s: What others take of it all the time, as far as it is there; whole tokens.
        others_call: How many tokens they take at a time.

    Attributes:
        charged: What calls were charged so far.
    """

    def __init__(self, limit, window_s=60, others_per_s=0, others_call=1):
        self.limit, self.window_s = limit, window_s
        self.others_per_s, self.others_call = others_per_s, others_call
        self._wanted = 0
        self.charged = 0
        self._unit = window_s * _NS
        self._level = limit * self._unit
        self._given = self._others = 0
        self._then_ns = None

    def level(self, now_s):
        """Return what is in it, exactly; below zero it is owed."""
        now_ns = round(now_s * _NS)
        if self._then_ns is None:
            self._then_ns = now_ns
        elif now_ns > self._then_ns:
            self._pass(now_ns)
            self._then_ns = now_ns
        return Fraction(self._level, self._unit)

    def _pass(self, now_ns):
        """Let time pass."""
        self._give(self.limit * (now_ns - self._then_ns), now_ns - self._then_ns)
        self._level = min(self.limit * self._unit, self._level)

    def _give(self, units, ns):
        """Let some flow in, of which others take what they need in that time."""
        self._given += units
        self._level += units
        self._wanted += self.others_per_s * self.window_s * ns
        wanted = self._wanted - self._wanted % (self.others_call * self._unit)
        self._wanted -= wanted
        taken = max(0, min(self._level, wanted))
        self._others += taken
        self._level -= taken

    def given(self, now_s):
        """Return what has flowed in so far, whether there was room for it or not."""
        self.level(now_s)
        return Fraction(self._given, self._unit)

    @property
    def taken_by_others(self):
        """What others have taken so far."""
        return Fraction(self._others, self._unit)

    def take(self, now_s, amount):
        """Charge an amount if it is there; return whether it was."""
        if self.level(now_s) < amount:
            return False
        self.charge(now_s, amount)
        return True

    def charge(self, now_s, amount):
        """Charge an amount that was taken already, or give one back that is below zero."""
        self.level(now_s)
        self.charged += amount
        self._level -= amount * self._unit

    def waste(self, now_s, amount):
        """Take an amount, or what is there of it, for nothing: no call was let through for it."""
        self._level -= max(0, min(int(self.level(now_s) * self._unit), amount * self._unit))

    def wait_s(self, now_s, amount):
        """Return how long until an amount is there."""
        return max(Fraction(0), (amount - self.level(now_s)) * self.window_s / self.limit)

    def told(self, now_s):
        """Return what the provider tells of it: whole tokens, and the time until it is full."""
        level = self.level(now_s)
        return Told(self.limit, max(0, int(level)), (self.limit - level) * self.window_s / self.limit)


class Window(Limit):
    """A count that begins anew with every window, the first when it is first asked: Azure's."""

    def __init__(self, *args, **more):
        super().__init__(*args, **more)
        self._end_ns = None

    def _pass(self, now_ns):
        if self._end_ns is None:
            self._end_ns = self._then_ns + self._unit
        for begin_ns in range(self._end_ns, now_ns + 1, self._unit):
            self._give(0, begin_ns - self._then_ns)
            self._give(self.limit * self._unit - self._level, 0)
            self._then_ns, self._end_ns = begin_ns, begin_ns + self._unit
        self._give(0, now_ns - self._then_ns)

    def _left_s(self, now_s):
        end_ns = round(now_s * _NS) + self._unit if self._end_ns is None else self._end_ns
        return Fraction(end_ns, _NS) - Fraction(round(now_s * _NS), _NS)

    def wait_s(self, now_s, amount):
        """Return how long until an amount is there: until the window ends, if not now."""
        return Fraction(0) if amount <= self.level(now_s) else self._left_s(now_s)

    def told(self, now_s):
        """Return what the provider tells of it: the reset is the end of the window."""
        return super().told(now_s)._replace(reset_s=self._left_s(now_s))


class Asked(NamedTuple):
    """What of a request counts.

    Attributes:
        characters: Of its messages.
        cap: The tokens that an answer may take at most; None where the caller did not say.
        choices: How many answers are asked for.
    """

    characters: int
    cap: int | None
    choices: int

    @classmethod
    def of(cls, body):
        texts = [message.get("content") or "" for message in body["messages"]]
        caps = [body[name] for name in ("max_tokens", "max_completion_tokens") if body.get(name) is not None]
        return cls(sum(map(len, texts)), max(caps, default=None), body.get("n") or 1)


class Charging(NamedTuple):
    """How a provider counts tokens.

    Attributes:
        at_once: What must be there, and is charged, when a request comes.
        in_the_end: What it has been charged once its usage is known.
    """

    at_once: Callable[[Asked], int]
    in_the_end: Callable[[Asked, int], int]


def _openai(asked):
    return max(asked.cap or 0, 16 + asked.characters // 4)


def _azure(asked):
    return asked.characters // 4 + asked.choices * (MODEL_MAXIMUM if asked.cap is None else asked.cap)


CHARGING = {
    "openai": Charging(_openai, lambda asked, _: _openai(asked)),
    "azure": Charging(_azure, lambda asked, used: used if asked.cap is None else _azure(asked)),
    "usage": Charging(lambda _: 1, lambda _, used: used),
}
"""How some count.

OpenAI charges the larger of cap and text, and gives nothing back. Azure charges their sum, and for a caller
without a cap what the model can say at most, until the request ends. Others charge what was used, once they know.
"""


class Refusal(NamedTuple):
    """Why a request is refused.

    Attributes:
        meter: ``requests`` or ``tokens``.
        limit: That meter's limit.
        used: What is in use of it.
        amount: What was asked of it.
        wait_s: How long until it would pass; None where it never does.
    """

    meter: str
    limit: int
    used: int
    amount: int
    wait_s: Fraction | None


@dataclass
class Limits:
    """The limits of a model; None where there is none.

    Attributes:
        project_tokens: A limit on the tokens of the project beside that of the organization.
    """

    requests: Limit | None = None
    tokens: Limit | None = None
    project_tokens: Limit | None = None

    @property
    def named(self):
        """The limits there are, by what their header fields call them."""
        every = {"requests": self.requests, "tokens": self.tokens, "project-tokens": self.project_tokens}
        return {name: limit for name, limit in every.items() if limit is not None}

    def admit(self, now_s, tokens):
        """Charge one request and its tokens, or say why not; a request that is refused counts as one too."""
        amounts = {name: 1 if name == "requests" else tokens for name in self.named}
        for name, limit in self.named.items():
            if not amounts[name] <= min(limit.limit, limit.level(now_s)):
                if self.requests is not None:
                    self.requests.waste(now_s, 1)
                return _refusal(name, limit, amounts[name], now_s)
        for name, limit in self.named.items():
            limit.charge(now_s, amounts[name])
        return None

    def correct(self, now_s, more):
        """Charge tokens that a call took beyond what it was charged."""
        for name, limit in self.named.items():
            if name != "requests":
                limit.charge(now_s, more)

    def told(self, now_s, written=duration):
        """Return what the provider's header fields tell, their times as ``written`` has them."""
        told = {}
        for name, limit in self.named.items():
            values = limit.told(now_s)
            told[f"x-ratelimit-limit-{name}"] = str(values.limit)
            told[f"x-ratelimit-remaining-{name}"] = str(values.remaining)
            told[f"x-ratelimit-reset-{name}"] = written(values.reset_s)
        return told


def _refusal(name, limit, amount, now_s):
    wait_s = limit.wait_s(now_s, amount) if amount <= limit.limit else None
    used = limit.limit - limit.told(now_s).remaining
    return Refusal("requests" if name == "requests" else "tokens", limit.limit, used, amount, wait_s)
