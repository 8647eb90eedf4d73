"""The machine: on which core a process runs, what it has taken of it, and how much memory is its own."""

import os
import re
import resource
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

_PROC = Path("/proc")
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
CORES = sorted(os.sched_getaffinity(0))
CANDIDATE, LOAD = CORES[0], CORES[-1]
"""The core of what is measured, and the one of whoever calls it and of the provider behind it."""


def on(core):
    """Return what a process does first to run on one core only."""
    return lambda: os.sched_setaffinity(0, {core})


@contextmanager
def urgently():
    """Give this process, and those that it starts meanwhile, precedence over others; only root can."""
    os.nice(-15)
    # NOTE: where the kernel groups processes by session, how nice one is counts within its session only.
    autogroup = _PROC / "self" / "autogroup"
    if autogroup.exists():
        autogroup.write_text("-15")
    try:
        yield
    finally:
        os.nice(15)
        if autogroup.exists():
            autogroup.write_text("0")


def group_cpu_s(leader):
    """Return the processor time of a group's processes so far, the kernel's part included."""
    return sum(map(_cpu_s, _group(leader)))


def machine_cpu_s():
    """Return the processor time that anybody has had so far, and what the hypervisor gave to others."""
    first = (_PROC / "stat").read_text().partition("\n")[0]
    user, nice, system, _idle, _waiting, *interrupts_and_stolen = map(int, first.split()[1:9])
    return sum((user, nice, system, *interrupts_and_stolen)) / _TICKS_PER_S


def own_cpu_s():
    """Return the processor time of this process and of those it has waited for."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def private_mib(leader):
    """Return the memory that one process of a group has to itself: the one that has most."""
    return max(map(_private_mib, _group(leader)))


@contextmanager
def awake():
    """Keep the cores from halting, at a priority below anybody's: to wake one takes longer than a proxy does."""

    def idle(core):
        os.sched_setaffinity(0, {core})
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))

    with ExitStack() as stack:
        loops = [
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", "while True: pass"],
                    preexec_fn=lambda core=core: idle(core),
                    process_group=0,
                )
            )
            for core in {CANDIDATE, LOAD}
        ]
        try:
            yield [loop.pid for loop in loops]
        finally:
            for loop in loops:
                loop.kill()


def _group(leader):
    pids = [int(folder.name) for folder in _PROC.iterdir() if folder.name.isdigit()]
    return [pid for pid in pids if int(_stat(pid)[2]) == leader]


def _stat(pid):
    """Return a process's state, its parent, its group and so on; zeros if it is gone."""
    try:
        return (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ["X"] + ["0"] * 20


def _cpu_s(pid):
    """Return a process's processor time to the ns, where its line in /proc counts in ticks of 10 ms.

    Source: clock_getcpuclockid(3), which Python lacks; Linux makes the clock's number of the process's.
    """
    try:
        return time.clock_gettime(~pid << 3 | 2)
    except OSError:
        return 0.0


def _private_mib(pid):
    parts = re.findall(r"^Private_\w+: +(\d+) kB", (_PROC / str(pid) / "smaps_rollup").read_text(), re.MULTILINE)
    return sum(map(int, parts)) / 1024
