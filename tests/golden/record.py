"""Records the golden timelines: draws steps, always the same, and writes down what the oracle makes of them."""

import json
import random
from typing import NamedTuple

from tests.engines import OracleEngine
from tests.golden import FOLDER, Player
from tests.oracle import NEVER_US
from tests.strategies import LATEST_US, START_US, S

KEYS = ("global", "team", "role", "user")
STEPS = 40

SHORT = (0, 0, 1, 999, 40_000, S // 3, S, 3 * S)
LONG = (0, S, 60 * S, 3_600 * S)
YEARS = (0, 1, S, 86_400 * S, 365 * 86_400 * S, 20 * 365 * 86_400 * S)
BACK = (0, 1, S // 2, S, 2 * S, 10 * S, -1, -S // 2, -S, -S - 1, -3 * S, -3_600 * S)
CALLS = {"reserve": 5, "settle": 3, "peek": 1}
CHANGES = {**CALLS, "again": 2, "configure": 3, "remove": 0.3}

HOUSE = ([10_000, "50", 100_000], [5_000, "25", 50_000], [100, "5/3", 100], [1_000, "5", 10_000])
SMALL = ([12, "2", 24], [10, "1", 0], [7, "1/3", 7], [3, "5", 1])
THIRDS = ([1_000, "50/3", 10_000], [500, "166667/10000", 500], [90, "1/7", 0], [60, "7/10", 600])
GRANTS = ([50, "0", 0], [20, "0", 200], [10, "0", 5], [30, "2", 30])
DRIPS = ([10, "1/1000000", 0], [3_000, "1/1000000", 30_000], [2, "3/1000000", 2], [100, "1", 1_000])
LARGE = (
    [10**12, "1000000000000", 0],
    [10**12, "1000/7", 10**12],
    [10**9, "500000/3", 10**10],
    [9_999_991, "1/3", 1],
)
SECONDS = ([10**12, "1/4096", 0], [10**12, "3/4096", 10**9], [10, "2", 20], [10**9, "1/1000000", 10**9])


class Theme(NamedTuple):
    """What a timeline is about.

    Attributes:
        about: In one sentence.
        budgets: Of the four keys at first.
        pauses: Before each step, in µs; negative ones are steps of the clock.
        acts: Each with its weight.
        changes: Budgets that others change to.
    """

    about: str
    budgets: tuple
    pauses: tuple = SHORT
    acts: dict = CALLS
    changes: tuple = ()


THEMES = {
    "calls": Theme("Reservations are settled higher and lower, over budgets as they are by default.", HOUSE),
    "refusals": Theme("Small buckets refuse, and pass exactly when the wait is over.", SMALL, acts={"reserve": 1}),
    "debt": Theme(
        "Usage exceeds reservations down to the floor of debt.", SMALL, LONG, {"reserve": 1, "settle": 2}
    ),
    "fractions": Theme("Rates that no decimal writes out are kept exactly.", THIRDS, acts={**CALLS, "again": 1}),
    "grants": Theme("What is spent of a fixed grant comes back by refunds only.", GRANTS, YEARS),
    "drips": Theme("Waits are as long as never.", DRIPS, YEARS),
    "large": Theme("Numbers come close to 2^52.", LARGE, (*SHORT, *LONG)),
    "clock": Theme("The clock steps back, a little and by far, and forward.", SMALL, BACK),
    "years": Theme("The clock jumps forward by years.", THIRDS, YEARS),
    "changes": Theme("Budgets are set while calls are in flight.", SMALL, acts=CHANGES, changes=(*SMALL, *THIRDS)),
    "removals": Theme("Buckets are removed, and come back full.", SMALL, acts={**CALLS, "settle": 5, "remove": 2}),
    "levels": Theme(
        "Budgets are set with a level.", HOUSE, LONG, {**CALLS, "level": 4, "remove": 1}, (*HOUSE, *SMALL)
    ),
    "defaults": Theme("Defaults change, floors of debt alone, too.", SMALL, SHORT, {**CALLS, "default": 3}, SMALL),
    "ticks": Theme(
        "Buckets in debt change between ticks of a µs and of a second.",
        SECONDS,
        (0, 7, S // 3, 123_456, 5 * S),
        {"reserve": 2, "settle": 2, "configure": 1, "default": 2},
        (*SECONDS, *THIRDS),
    ),
    "frozen": Theme(
        "Budgets change while the clock stands still or steps back.",
        SECONDS,
        (0, 7, 123_456, S, -1, -S // 3, -S // 2, -S, -2 * S),
        {**CHANGES, "default": 4},
        (*SECONDS, *THIRDS, *GRANTS),
    ),
}


class Recorder:
    """Draws the steps of one timeline and plays them to the oracle."""

    def __init__(self, name, theme):
        self._theme = theme
        self._random = random.Random(name)
        self._engine = OracleEngine()
        self._player = Player(self._engine, dict(zip(KEYS, theme.budgets, strict=True)))
        self._now_us = START_US
        self._reserved = []
        self.steps = []

    def timeline(self):
        """Return the whole timeline."""
        while len(self.steps) < STEPS:
            self._now_us = min(LATEST_US, self._now_us + self._pick(self._theme.pauses))
            (act,) = self._random.choices(list(self._theme.acts), self._theme.acts.values())
            getattr(self, f"_{act}")()
        return {
            "about": self._theme.about,
            "budgets": dict(zip(KEYS, self._theme.budgets, strict=True)),
            "counters": self._player.counters(),
            "steps": self.steps,
        }

    def _pick(self, choices):
        return self._random.choice(choices)

    def _play(self, act, *subject):
        step = [self._now_us, act, list(subject)]
        result, stored = self._player.play(step)
        self.steps.append([*step, result, stored])
        return result

    # --- acts ---------------------------------------------------------------------------------------------------

    def _reserve(self):
        plan = self._some_keys()
        self._reserve_by(plan, [self._cost(key) for key in plan])

    def _again(self):
        """Reserve by the plan of an earlier call, which may be stale."""
        if self._reserved:
            number, costs = self._pick(self._reserved)
            self._reserve_by(number, costs)

    def _reserve_by(self, plan, costs):
        result = self._play("reserve", plan, costs)
        if result == "stale":
            return
        allowed, _, wait_us, *_ = result
        if allowed:
            self._reserved.append((len(self.steps) - 1, costs))
        elif wait_us < NEVER_US and wait_us <= LATEST_US - self._now_us and self._pick((True, False)):
            self._now_us += wait_us - 1
            self._play("reserve", plan, costs)
            self._now_us += 1
            self._play("reserve", plan, costs)

    def _settle(self):
        if self._reserved:
            number, costs = self._pick(self._reserved)
            self._play("settle", number, [self._delta(cost) for cost in costs])

    def _peek(self):
        self._play("peek", self._some_keys(), [])

    def _configure(self):
        self._play("configure", *self._change(), None)

    def _level(self):
        key, budget = self._change()
        self._play("configure", key, budget, self._pick((budget[0], self._random.randint(-budget[2], budget[0]))))

    def _default(self):
        self._play("default", *self._change())

    def _remove(self):
        """Remove a bucket, and give back what a call took that may have been of it."""
        self._play("remove", self._pick(KEYS))
        for number, costs in self._reserved[-1:]:
            self._play("settle", number, [-cost for cost in costs])

    # --- what they are about ------------------------------------------------------------------------------------

    def _some_keys(self):
        return self._random.sample(KEYS, self._random.randint(1, len(KEYS)))

    def _cost(self, key):
        terms = self._player.terms[key]
        level = max(0, self._engine.oracle.peek(((key.encode(), terms),), self._now_us).levels[0])
        parts = (terms.capacity // 10, terms.capacity // 3, terms.capacity, terms.capacity + 1)
        return self._pick((0, 1, 2, level, level, level + 1, level // 2, *parts))

    def _delta(self, cost):
        return self._pick((-cost, -cost, -(cost // 2), 0, 1, cost + 1, 3 * cost, 25 * cost, 10**12))

    def _change(self):
        """Return a key and another budget for it: one of the theme's, or its own but for the debt."""
        key = self._pick(KEYS)
        capacity, rate, max_debt = self._player.terms[key]
        return key, self._pick((*self._theme.changes, [capacity, str(rate), max_debt // 2]))


def text_of(timeline):
    """Return a timeline as its file has it: a step a line."""
    *head, (_, steps) = timeline.items()
    lines = [f"{json.dumps(name)}: {json.dumps(value, ensure_ascii=False)}" for name, value in head]
    rows = [json.dumps(step, separators=(",", ":")) for step in steps]
    return "{\n" + ",\n".join(lines) + ',\n"steps": [\n' + ",\n".join(rows) + "\n]}\n"


def recorded():
    """Return the text of every timeline by its name."""
    return {name: text_of(Recorder(name, theme).timeline()) for name, theme in THEMES.items()}


if __name__ == "__main__":
    for name, text in recorded().items():
        (FOLDER / f"{name}.json").write_text(text, encoding="utf-8")
