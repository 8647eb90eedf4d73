"""An operation on a table that is killed at each of its points in turn, and what is there each time.

Run: python -m tests.variants CORE tests.integration.crash KIND OPERATION FOLDER
CORE is a test build. KIND says what the process does that comes next: "repaired", it only repairs; "repaired
twice", it is killed at each point of the repair, and a third one repairs; "repeated", it does the operation again
and is killed likewise. A Report is printed, as JSON.
"""

from __future__ import annotations

import ctypes
import gc
import json
import mmap
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from tests.books import shared_file
from tests.integration.operations import HERE, OPERATIONS, SEED, Operation
from tests.region import Header, Region, header_of
from tokenguard import _bucket
from tokenguard._bucket import BucketTable, region_bytes

PROMPT_S = 0.5
"""How long a repair may take; who waits for the lock in vain gives up after a second."""
MOST_POINTS = 5_000
"""More than any operation has."""
CHILD_S = 10
"""After that a child is taken to hang."""
MOST_PROBLEMS = 10
"""So many are told."""


@dataclass
class Report:
    """What came of it all.

    Attributes:
        kills: How often a process was killed last.
        undone: How often the operation then had not happened.
        done: How often it had.
        problems: What was wrong, and when.
    """

    kills: int = 0
    undone: int = 0
    done: int = 0
    problems: list[str] = field(default_factory=list)


class Scene:
    """A table, what it may be once the operation was killed, and what it is.

    Args:
        operation: What is killed.
        fd: The file in which the table lies.
    """

    def __init__(self, operation: Operation, fd: int) -> None:
        self.operation = operation
        self.keys = HERE + operation.keys
        self.region = mmap.mmap(fd, region_bytes(operation.buckets))
        self.table = BucketTable(operation.buckets, fd=fd, seed=SEED)
        operation.begin(self.table)
        self.begun, self.turn = self.region[:], self.table.turn
        self.whole, self.epochs = [self.picture()], [self.table.epoch]
        for step in operation.steps or (operation.change,):
            step(self.table)
            self.whole.append(self.picture())
            self.epochs.append(self.table.epoch)

    def change(self) -> None:
        self.operation.change(self.table)

    def repair(self) -> None:
        self.table.changes(0)

    def picture(self) -> dict[str, Any]:
        """Return what there is to know of the table, but for how often it was repaired.

        NOTE: of the epoch, it tells whether an operation has moved it: by 1. Each repair moves it by 2.
        """
        counters = self.table.stats()
        del counters["repaired"]
        return {
            "buckets": {key: self.table.state(key) for key in self.keys},
            "counters": counters,
            "log": self.table.changes(0),
            "epoch": self.table.epoch % 2,
            "tallies": self.table.tallies(),
            "shared": header_of(self.region).shared,
        }

    def problems(self, report: Report) -> Iterator[str]:
        """Yield what is wrong with what a killed process left; repair it, and go on from there."""
        yield from self._misread()
        left = header_of(self.region)
        asked_s = time.monotonic()
        self.repair()
        if (took_s := time.monotonic() - asked_s) > PROMPT_S:
            yield f"the lock was to be had after {took_s} s"
        yield from Region(self.region).faults()
        picture = self.picture()
        if picture not in self.whole:
            yield f"it has happened by half: {self._difference(picture)}"
            return
        steps = self.whole.index(picture)
        report.undone += steps == 0
        report.done += steps == len(self.whole) - 1
        yield from self._mistold(steps, left)
        if steps < len(self.whole) - 1:
            yield from self._unrepeatable(steps)

    def _misread(self) -> Iterator[str]:
        """Yield which buckets whoever comes next may read as they were neither before nor after.

        A bucket that comes into being is full for a moment, which is what one is that is not there.
        """
        left, header = self.region[:], header_of(self.region)
        for key in self.keys:
            state = self.table.state(key)
            right = [whole["buckets"][key] for whole in self.whole]
            is_full = state is not None and state[0] == state[2] * state[4]
            if state not in right and not (is_full and None in right):
                yield f"{key!r} is read as {state}, not as one of {right}"
            if header_of(self.region) != header:  # it was read under the lock, which was a dead process's
                self.region[:] = left

    def _mistold(self, steps: int, left: Header) -> Iterator[str]:
        """Yield what is wrong with the numbers from which others learn that something changed."""
        now = header_of(self.region)
        if left.noted and now.repaired == left.repaired:
            yield "it was repaired, and that is not counted"
        if now.epoch < left.epoch or (now.epoch > self.epochs[steps]) != (now.repaired > 0):
            epochs = f"{self.epochs[steps]} before, {left.epoch} when its process died, {now.epoch} now"
            yield f"the epoch was {epochs}, after {now.repaired} repairs"
        if steps and now.turn == self.turn:
            yield "it has happened, and the turn has not moved"

    def _unrepeatable(self, steps: int) -> Iterator[str]:
        """Yield what keeps the operation from being done now, by who goes on with the table as it is."""
        turn = self.table.turn
        self.change()
        if (picture := self.picture()) not in self.whole[steps + 1 :]:
            yield f"done again, it is not done: {self._difference(picture)}"
        if self.table.turn == turn and picture != self.whole[steps]:
            yield "it was done again, and the turn has not moved"
        yield from Region(self.region).faults()

    def _difference(self, picture: dict[str, Any]) -> dict[str, Any]:
        differ = [what for what in picture if any(picture[what] != whole[what] for whole in self.whole)]
        return {what: (picture[what], *(whole[what] for whole in self.whole)) for what in differ}


def dies(work: Callable[[], object], point: int) -> bool:
    """Let a child do some work, and kill it at a point; return whether it came that far."""
    pid = os.fork()
    if not pid:
        signal.alarm(CHILD_S)
        try:
            ctypes.c_int64.in_dll(ctypes.CDLL(_bucket.__file__), "tg_points").value = point
            work()
        except BaseException:  # nothing may unwind into the stack that was forked
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status in (0, -signal.SIGKILL), f"a child ended with status {status}"
    return status != 0


def kills(scene: Scene, left: bytes, work: Callable[[], object]) -> Iterator[int]:
    """Kill some work at each of its points in turn, each time on the region as it was left; yield where."""
    for point in range(1, MOST_POINTS):
        scene.region[:] = left
        if not dies(work, point):
            return
        yield point
    raise AssertionError(f"it has more than {MOST_POINTS} points")


def torture(scene: Scene, kind: str) -> Report:
    """Kill the operation at each point, and perhaps who comes next; report on what is there."""
    report = Report()
    for point in kills(scene, scene.begun, scene.change):
        left = scene.region[:]
        again = kills(scene, left, scene.change if kind == "repeated" else scene.repair)
        for where in [""] if kind == "repaired" else (f", then at {point}" for point in again):
            report.kills += 1
            report.problems += [f"killed at {point}{where}: {problem}" for problem in scene.problems(report)]
    del report.problems[MOST_PROBLEMS:]
    return report


def main(kind: str, name: str, folder: str) -> None:
    """Torture, and tell."""
    gc.disable()  # in a child that is forked off for one operation, it has nothing to collect
    operation = OPERATIONS[name]
    if kind == "repeated":
        operation = operation._replace(steps=(operation.change, operation.change))
    with shared_file(operation.buckets, folder) as fd:
        print(json.dumps(asdict(torture(Scene(operation, fd), kind))))


if __name__ == "__main__":
    main(*sys.argv[1:])
