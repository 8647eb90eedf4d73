"""Tables of what was measured, in Markdown: medians over the rounds, and the least and the most."""

from statistics import median
from typing import NamedTuple


class Turn(NamedTuple):
    """What one row did in one round.

    Attributes:
        per_s: Answers a second.
        per_core: Answers for each second of processor time that the candidate took.
        p50_us: How long half of the answers took at most.
        p99_us: How long 99 % of them took at most.
        others: The share of the machine that neither the candidate nor its load had.
        errors: Answers that should have been others, and connections that broke.
    """

    per_s: float
    per_core: float
    p50_us: float
    p99_us: float
    others: float
    errors: int


def table(seen, references, added):
    """Return the table of a load: the turns of each row, by its name.

    Args:
        seen: The turns.
        references: The rows that all are compared with, in each round.
        added: Whether it is of interest what a row adds to a direct call.
    """
    names = ["row", "requests/s", "per core", "p50 ms", "p99 ms"]
    names += ["added p50 µs"] if added else []
    names += [f"{what} to {name}" for name in references for what in ("requests/s", "per core")]
    lines = [_line([*names, "others", "errors"]), _line(["---", *["---:"] * (len(names) + 1)])]
    for row, turns in sorted(seen.items(), key=lambda item: -median(turn.per_core for turn in item[1])):
        cells = [row, *(_range([turn[place] for turn in turns], "{:,.0f}") for place in (0, 1))]
        answered = [turn for turn in turns if turn.per_s]
        cells += [_range([turn[place] / 1e3 for turn in answered], "{:.2f}") for place in (2, 3)]
        if added:
            pairs = zip(turns, seen["direct"], strict=True)
            cells.append(_range([turn.p50_us - direct.p50_us for turn, direct in pairs], "{:,.0f}"))
        for name in references:
            pairs = list(zip(turns, seen[name], strict=True))
            cells += [_range([turn[place] / other[place] for turn, other in pairs], "{:.3g}") for place in (0, 1)]
        cells += [f"{median(turn.others for turn in turns):.0%}", str(sum(turn.errors for turn in turns))]
        lines.append(_line(cells))
    return "\n".join(lines)


def memory_table(seen):
    """Return the table of the memory, in MiB, that each row has to itself before and after the load."""
    lines = [_line(["row", "MiB at the start", "MiB after"]), _line(["---", "---:", "---:"])]
    lines += [_line([row, *(f"{mib:.1f}" for mib in pair)]) for row, pair in seen.items()]
    return "\n".join(lines)


def _line(cells):
    return f"| {' | '.join(cells)} |"


def _range(values, shape):
    if not values:
        return "none"
    middle = f"**{shape.format(median(values))}**"
    return middle if len(values) == 1 else f"{middle} ({shape.format(min(values))} to {shape.format(max(values))})"
