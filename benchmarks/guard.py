"""Fails if we have lost our lead: compares rows of one run with each other, never with a clock elsewhere.

Usage: python benchmarks/guard.py benchmarks/results.json
"""

import json
import sys
from pathlib import Path
from typing import NamedTuple


class Lead(NamedTuple):
    """Two rows of one run, and how many times as long as ours theirs must take at least."""

    ours: str
    theirs: str
    least: float


LEFT = 0.6
"""What part of a ratio that was measured must be left where rows are whole servers: neighbours take some of it."""

LEADS = (
    Lead("BucketTable reserve + settle, 1 000 users", "limits: five hits, 1 000 users", 20),
    Lead("RedisBackend reserve, 64 callers", "limits: five hits on Redis, 64 callers", 8),
    Lead("RedisBackend reserve, 64 callers", "redis-py: plain.lua, 64 callers", 2),
    # Less than 1: a lone reserve may take 2.5 times as long as a script that does nothing.
    Lead("RedisBackend reserve, one caller", "baseline: redis-py, a script that does nothing, one caller", 0.4),
    # Less than 1: a call on a table that others map too takes as long, if no neighbour has a row's second.
    Lead("reserve + settle, a file in memory", "baseline: reserve + settle, memory of its own", 1 / 2),
    # Less than 1: a block of the library may take 6 times as long as what it does inside, an async one 8 times.
    Lead(
        "library: with limiter.reserve(...) + settle, 1 000 users",
        "Limiter reserve + settle, 1 000 users",
        1 / 6,
    ),
    Lead(
        "library: async with limiter.reserve(...) + settle, 1 000 users",
        "Limiter reserve + settle, 1 000 users",
        1 / 8,
    ),
    # Less than 1: how many times as long as a bare hello world a guarded one may take. Bare, it takes 1 µs, or 80.
    Lead("ASGI, ASGIGuard", "baseline: ASGI, bare", 1 / 30),
    Lead("WSGI, WSGIGuard", "baseline: WSGI, bare", 1 / 60),
    Lead("FastAPI, ASGIGuard", "baseline: FastAPI, bare", 1 / 3),
    Lead("Flask, WSGIGuard", "baseline: Flask, bare", 1 / 3),
    # Less than 1: half of what was measured, for a neighbour may slow one row down and spare the other.
    Lead("FastAPI, ASGIGuard", "FastAPI, slowapi's ASGI middleware", 0.8),
    Lead("FastAPI, ASGIGuard", "FastAPI, slowapi's decorator", 0.6),
    # Less than 1: how much of what TokenGuard takes of its core a proxy takes that looks at nothing.
    Lead("a call through TokenGuard", "baseline: bytes handed on by uvloop", 0.33 * LEFT),
    Lead("a call through TokenGuard, by way of Falcon", "baseline: bytes handed on by uvloop", 0.06 * LEFT),
    Lead("request of 600 bytes", "baseline: request of 600 bytes, carefully", 20),
    Lead("request of 100 kB", "baseline: request of 100 kB, carefully", 3),
    Lead("answer of 800 bytes", "baseline: answer of 800 bytes, carefully", 1.4),
    Lead("event of 31 in one piece", "baseline: event of 31 in one piece, carefully", 15),
    Lead("event of 31 in 31 pieces", "baseline: event of 31 in 31 pieces, carefully", 15),
    # How a node stands a herd: most of its calls are refused.
    Lead("a call that is refused", "a call with metrics", 1.5),
    # Less than 1: what the logic around the table may take, in times of the table's own reserve and settle.
    Lead("a call: its request is read and estimated", "baseline: the table's reserve + settle", 1 / 10),
    Lead("a call: it is reserved for", "baseline: the table's reserve + settle", 1 / 5),
    Lead("a call: its request goes on", "baseline: the table's reserve + settle", 1 / 3),
    Lead("a call: its answer's head", "baseline: the table's reserve + settle", 1 / 15),
    Lead("a call: its answer is read, and it is settled", "baseline: the table's reserve + settle", 1 / 30),
)


def read(results: Path) -> dict[str, float]:
    """Return the ns that one call of each row took at best, from what pytest-benchmark wrote."""
    rows = json.loads(results.read_text())["benchmarks"]
    return {row["name"]: row["stats"]["min"] / row["extra_info"].get("calls", 1) * 1e9 for row in rows}


def table(best_ns: dict[str, float]) -> str:
    """Return the rows as text: ns per call, and how many times as long as ours."""
    ours_ns = best_ns[LEADS[0].ours]
    lines = [f"{'row':<64}{'ns per call':>14}{'x ours':>10}"]
    for name, ns in sorted(best_ns.items(), key=lambda row: row[1]):
        lines.append(f"{name:<64}{ns:>14,.0f}{ns / ours_ns:>10.2f}")
    return "\n".join(lines)


def main(results: Path) -> str | None:
    """Print the table and what became of the leads; return what is wrong, or None."""
    best_ns = read(results)
    missing = {name for lead in LEADS for name in lead[:2]} - best_ns.keys()
    if missing:
        return f"guard: {results} has no row named {' or '.join(sorted(missing))}; it has {sorted(best_ns)}"
    print(table(best_ns))
    lost = []
    for ours, theirs, least in LEADS:
        ratio = best_ns[theirs] / best_ns[ours]
        line = f"guard: {theirs!r} takes {ratio:.3g} times as long as {ours!r}, at least {least:.3g} are asked"
        print(line)
        if ratio < least:
            lost.append(line)
    return "\n".join(lost) or None


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    sys.exit(main(Path(sys.argv[1])))
