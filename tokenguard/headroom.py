"""How much more the provider would grant than we do: its own count of a bucket, beside ours.

The provider counts a call when it comes in, by rules of its own, and tells in its answer what remains. Our bucket
is charged what the call may count at most, before it is sent. What the provider told and what our level was then,
at the same moment of the same call, are compared: the difference is the headroom. Below zero somebody else spends,
or the call counted for more than it seemed, and our level is lowered; above zero calls are given back what they
were charged too much, as far as the headroom goes. So our level follows the provider's, and is never above it for
longer than an answer takes.

Only the latest call that was heard of counts: what an answer tells that took longer is of the past, and what calls
after it were charged and given back is not in it. The processes of a node are as one: what one hears of, all know.
"""

from __future__ import annotations

from tokenguard._bucket import Shared
from tokenguard.drift import Charge, Drift

_RISE = 4
"""An answer's word that the headroom has grown is believed to one part in so many; that it has shrunk, at once."""
_OVERDONE = 2
"""Our level is lowered by so many times of what it is too high: what it missed, calls under way may miss too."""
_AMPLE = 2**52
_MOVED, _TOP, _HEARD = range(4, 7)
"""The numbers that are shared, beside the drift's: see ``moved``; the headroom that there would be without it; and
the latest call that was heard of, 0 before there is one."""

PERIOD_S = 2.0
"""Calls are counted for so long at a time."""
REST_S = 0.05
"""So long nothing is asked of a limit that told nothing new."""
MAX_MODELS = 1024
"""Of so many models at most; who was first is forgotten first."""


class Headroom:
    """Of one bucket whose limit was learned from header fields.

    Args:
        shared: What all processes of a node know of it; by default this one alone does.

    Attributes:
        kept: By so many tokens at most it is lowered beyond what was too high.
        is_slow: Whether it takes so long to fill that no answer alone is to empty it: one that errs would hold
            calls back for hours. Then it is lowered by half of what is too high at a time.
        drift: What the provider's count makes of what is not ours.
    """

    def __init__(self, shared: Shared | None = None) -> None:
        self.kept = _AMPLE
        self.is_slow = False
        self._shared = Shared() if shared is None else shared
        self.drift = Drift(self._shared)

    @property
    def moved(self) -> int:
        """How many tokens our level has been raised by on the provider's word, in all; lowering counts below zero.

        What a reservation saw before and what is seen after differ by this.
        """
        return self._shared.get(_MOVED)

    def hold(self, limit: int, kept: int, is_slow: bool = False) -> None:
        """Take in what the bucket holds, how much of it is kept in hand, and whether it is slow."""
        self.kept = kept
        self.is_slow = is_slow
        self.drift.hold(limit)

    def charge(self, level: int, cost: int) -> Charge:
        """Take in a call that has just been charged so much, which left ``level``."""
        return self.drift.charge(level, cost, self._shared.get(_MOVED))

    def told(self, remaining: int, charge: Charge, in_windows: bool = False) -> int:
        """Take in what remained when the provider counted a call; return by how much our level must be lowered.

        Args:
            remaining: What the call left in the provider's bucket.
            charge: What it was charged in ours.
            in_windows: Whether the provider seems to count in windows.
        """
        self.drift.told(remaining, charge, in_windows)
        heard = self._shared.get(_HEARD)
        if charge.turn < heard:
            return 0  # it is of the past
        self._shared.set(_HEARD, charge.turn)
        moved = self._shared.get(_MOVED)
        room, before, fewer = charge.above - moved, self._shared.get(_TOP) - moved, 0
        if room < 0:
            if self.is_slow:
                fewer = (1 - room) // 2
            else:
                fewer = -room + min(-room * (_OVERDONE - 1), self.kept)
            self._shared.add(_MOVED, -fewer)
        elif heard > 0 and room > before:
            room = before + (room - before) // _RISE
        self._shared.set(_TOP, room + moved)
        return fewer

    def give(self, cost: int, kept: int) -> int:
        """Return how many of the tokens that a call was charged may be given back.

        Args:
            cost: What it was charged.
            kept: So much of the headroom is kept, for what is not known yet.
        """
        given = self._shared.get(_TOP) - self._shared.get(_MOVED) - kept
        if given <= 0:
            return 0
        if given > cost:
            given = cost
        self._shared.add(_MOVED, given)
        return given

    def gave(self, tokens: int) -> None:
        """Take in that a call is given back so much, below zero charged, whatever the provider counted it for."""
        moved = self._shared.add(_MOVED, tokens)
        if tokens > 0 and self._shared.get(_TOP) < moved:
            self._shared.set(_TOP, moved)


class _Answers:
    """The answered calls of one model: in this period and in the one before it, and when the last one was."""

    def __init__(self, now_s: float) -> None:
        self.began_s = self.last_s = now_s
        self.now = self.before = 0
        self.rests_until_s = 0.0
        self.unclear = False


class Pace:
    """How many calls of each model the provider answers, in this process."""

    def __init__(self) -> None:
        self._models: dict[str, _Answers] = {}

    def passed(self, model: str, now_s: float) -> None:
        """Count a call that was answered."""
        answers = self._models.get(model)
        if answers is None:
            while len(self._models) >= MAX_MODELS:
                self._models.pop(next(iter(self._models)), None)
            answers = self._models[model] = _Answers(now_s)
        if now_s - answers.began_s >= PERIOD_S:
            answers.before = answers.now if now_s - answers.began_s < 2 * PERIOD_S else 0
            answers.now = 0
            answers.began_s = now_s
        answers.now += 1
        answers.last_s = now_s

    def rest(self, model: str, now_s: float, unclear: bool) -> None:
        """Take in that there is nothing to be learned of a model's limits just now, perhaps for it is unclear."""
        answers = self._models.get(model)
        if answers is not None:
            answers.rests_until_s, answers.unclear = now_s + REST_S, unclear

    def rests(self, model: str, now_s: float) -> bool:
        """Return whether that was only just so."""
        answers = self._models.get(model)
        return answers is not None and now_s < answers.rests_until_s

    def rests_unclear(self, model: str) -> bool:
        """Return whether that was for what it told was unclear."""
        answers = self._models.get(model)
        return answers is not None and answers.unclear

    def last_s(self, model: str) -> float:
        """Return when a call was answered last; -1 if none was."""
        answers = self._models.get(model)
        return -1.0 if answers is None else answers.last_s

    def rate(self, model: str, now_s: float) -> float:
        """Return how many calls a second were answered lately."""
        answers = self._models.get(model)
        if answers is None:
            return 0.0
        age_s = now_s - answers.began_s
        if age_s >= 2 * PERIOD_S:
            return 0.0
        if age_s < PERIOD_S:
            return (answers.now + answers.before) / (age_s + PERIOD_S)
        return answers.now / age_s
