"""The state of every version, as it was written once: a later TokenGuard must go on from it.

``python -m tests.golden.state`` writes that of the version that is written now.
"""

from pathlib import Path

from tests.golden import FOLDER
from tests.house import MODEL, NOW_US, grant, named
from tokenguard._bucket import BucketTable
from tokenguard.backends.mirror import record_of
from tokenguard.backends.state import VERSION, State, _encoded
from tokenguard.model import Budget, Meter

STATES = sorted(path.name for path in FOLDER.glob("state-*.bin"))

BUDGETS = [
    Budget(named("global"), grant(10**12, 50)),
    Budget(named("team:red"), grant(5000, "50/3", 0)),
    Budget(named("user:alice", Meter.REQUESTS), grant(7, "1/60", 7)),
    Budget(named("user:alice", Meter.TOKENS, MODEL), grant(1000, "1/1000000", 1)),
    Budget(named("user:zoë d'Été", Meter.TOKENS), grant(20)),
]
"""In the order of their names. One more was removed."""

LEVELS = [-(10**12), 0, -1, 999, 13]
"""What was in their buckets at ``NOW_US``."""

LEVELS_LATER = [-(10**12) + 600 * 50, 5000, 7, 999, 13]
"""What is in them ten minutes later."""

DEFAULT = (b"user\x1fbob\x1ftokens\x1f", grant(1000, 5), 400)
"""A bucket of no budget of its own, its scale and its level at ``NOW_US``."""


def recorded() -> bytes:
    """Return the state as it is written now."""
    table = BucketTable(64, seed=b"golden seed")
    for (name, scale), level in zip(BUDGETS, LEVELS, strict=True):
        table.configure(name.key, scale, level, NOW_US)
    key, scale, level = DEFAULT
    table.configure(key, scale, level, NOW_US)
    records = [record_of(name, scale) for name, scale in BUDGETS]
    gone = named("role:gone")
    log = b"".join([record_of(gone, grant(1)), *records, record_of(gone, None)])
    return _encoded(State(b"golden identity!", 7, table.seed, log, table.dump(0, 64, NOW_US)))


def path_of(version: int) -> Path:
    """Return where a version's state is."""
    return FOLDER / f"state-{version}.bin"


if __name__ == "__main__":
    path_of(VERSION).write_bytes(recorded())
