"""Fails if the engine has lost its lead: compares rows of one run with each other, never with a clock elsewhere.

Usage: python benchmarks/guard.py benchmarks/results.json
"""

import json
import sys
from pathlib import Path

OURS = "BucketTable reserve + settle, 1 000 users"
THEIRS = "limits: five hits, 1 000 users"
LEAST = 20
"""How many times longer ``THEIRS`` must take than ``OURS``."""


def read(results: Path) -> dict[str, float]:
    """Return the ns that one call of each row took at best, from what pytest-benchmark wrote."""
    rows = json.loads(results.read_text())["benchmarks"]
    return {row["name"]: row["stats"]["min"] / row["extra_info"].get("calls", 1) * 1e9 for row in rows}


def table(best_ns: dict[str, float]) -> str:
    """Return the rows as text: ns per call, and how many times as long as ours."""
    lines = [f"{'row':<44}{'ns per call':>14}{'x ours':>10}"]
    for name, ns in sorted(best_ns.items(), key=lambda row: row[1]):
        lines.append(f"{name:<44}{ns:>14,.0f}{ns / best_ns[OURS]:>10.2f}")
    return "\n".join(lines)


def main(results: Path) -> str | None:
    """Print the table; return what is wrong, or None."""
    best_ns = read(results)
    missing = {OURS, THEIRS} - best_ns.keys()
    if missing:
        return f"guard: {results} has no row named {' or '.join(sorted(missing))}; it has {sorted(best_ns)}"
    print(table(best_ns))
    ratio = best_ns[THEIRS] / best_ns[OURS]
    if ratio < LEAST:
        return (
            f"guard: {THEIRS!r} must take at least {LEAST} times as long as {OURS!r}, it takes {ratio:.1f} times"
        )
    print(f"guard: {ratio:.1f} times as fast as {THEIRS!r}, at least {LEAST} are asked")
    return None


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    sys.exit(main(Path(sys.argv[1])))
