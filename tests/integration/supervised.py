"""Workers that do next to nothing, under a real supervisor.

Run: python -m tests.integration.supervised WORK
Each line that it prints says what happened: ``ready``, ``worker PID``, ``ended``, ``run`` and what that returned.
"""

from __future__ import annotations

import errno
import itertools
import os
import select
import signal
import sys
import time

from tokenguard import supervisor
from tokenguard.supervisor import Supervisor

WORKERS = 3
PATIENCE_S = 0.2
supervisor.GRACE_S = 0.2
supervisor.FIRST_PAUSE_S, supervisor.LONGEST_PAUSE_S = 0.05, 0.4


_places, _place = os.pipe()
"""What all workers but one find something in."""
_deaths, _death = os.pipe()
"""What a worker finds something in once all serve."""


def say(*words):
    """Say it at once, and not between somebody else's words."""
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


def serve(worker):
    """Serve until a signal or the lifeline says that it is over."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    say("worker", os.getpid())
    worker.ready()
    select.select([worker.lifeline], [], [])
    say("ended")


def be_stubborn(worker):
    """Serve, and take no hint."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    say("worker", os.getpid())
    worker.ready()
    while True:
        signal.pause()


def die_young(worker):
    """Serve, and die as soon as all do."""
    worker.ready()
    os.read(_deaths, 1)
    say("worker", os.getpid(), time.monotonic())
    os.kill(os.getpid(), signal.SIGKILL)


def fail(worker):
    """Serve as all do but one, which cannot."""
    try:
        os.read(_places, 1)
    except BlockingIOError:
        raise SystemExit(3) from None
    serve(worker)


def never_be_ready(worker):
    """Begin, and get no further."""
    say("worker", os.getpid())
    select.select([worker.lifeline], [], [])


def come_late(worker):
    """Serve; the first that is forked off in another's place meets with a want of memory."""
    serve(worker)


def shrug(worker):
    """Serve in the care of ``nohup``, to which the end of a terminal is nothing."""
    serve(worker)


def fork_in_vain_once(after):
    """Have a fork fail, after some that did not."""
    fork, forks = os.fork, itertools.count()

    def fork_or_fail():
        if next(forks) == after:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return fork()

    os.fork = fork_or_fail


def ready():
    """Say it, and let those die that want to."""
    say("ready")
    os.write(_death, b"!" * 100)


def main(work):
    """Supervise."""
    os.set_blocking(_places, False)
    os.write(_place, b"!" * (WORKERS - 1))
    if work == "come_late":
        fork_in_vain_once(WORKERS)
    if work == "shrug":
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    say("run", Supervisor(WORKERS, globals()[work], ready, lambda: None, PATIENCE_S).run())


if __name__ == "__main__":
    main(sys.argv[1])
