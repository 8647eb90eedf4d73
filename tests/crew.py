"""Forked processes that work side by side on what they inherited."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import pickle
import random
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

LIBC = ctypes.CDLL(None)


class Worker:
    """A forked process that waits until it is let go, then does its work; a context that kills it in the end.

    Args:
        work: What it does, called without arguments; what it returns must be picklable.
        limit_s: It dies, and tells where it stood, if it is not done by then.

    Attributes:
        pid: Its process id.
    """

    def __init__(self, work: Callable[[], Any], limit_s: int = 60) -> None:
        gate, self._opener = os.pipe()
        self._answer, answer = os.pipe()
        self._is_there = True
        sys.stdout.flush()  # else both would print what is still to be printed
        self.pid = os.fork()
        if not self.pid:
            os.close(self._opener)
            os._exit(_live(work, limit_s, gate, answer))
        os.close(gate)
        os.close(answer)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *error: object) -> None:
        if self._is_there:
            os.kill(self.pid, signal.SIGKILL)
            self.wait()
        os.close(self._opener)
        os.close(self._answer)

    def go(self) -> None:
        """Let it begin."""
        os.write(self._opener, b"!")

    def answer(self) -> Any:
        """Wait until it is done, and return what its work returned."""
        with os.fdopen(os.dup(self._answer), "rb") as pipe:
            told = pipe.read()
        status = self.wait()
        assert status == 0, f"a worker ended with status {status}"
        return pickle.loads(told)

    def stop(self) -> None:
        """Stop it wherever it is, and wait until it has stopped."""
        os.kill(self.pid, signal.SIGSTOP)
        _, status = os.waitpid(self.pid, os.WUNTRACED)
        self._is_there = os.WIFSTOPPED(status)
        assert self._is_there, f"a worker that was to be stopped ended with status {status}"

    def resume(self) -> None:
        """Let it go on."""
        os.kill(self.pid, signal.SIGCONT)

    def wait(self) -> int:
        """Wait until it has ended; return its exit status, or the signal that ended it, below 0."""
        _, status = os.waitpid(self.pid, 0)
        self._is_there = False
        return os.waitstatus_to_exitcode(status)


def _live(work: Callable[[], Any], limit_s: int, gate: int, answer: int) -> int:
    """Do a worker's work; return its exit status."""
    faulthandler.dump_traceback_later(limit_s, exit=True, file=sys.__stderr__)
    try:
        os.read(gate, 1)
        told = pickle.dumps(work())
    except BaseException:  # nothing may unwind into the stack that was forked
        traceback.print_exc()
        return 1
    with os.fdopen(answer, "wb") as pipe:
        pipe.write(told)
    return 0


def pause_soon(within_s: float = 30e-6) -> None:
    """Let this process fall asleep once, soon and briefly, wherever it stands then: inside an operation, too."""
    # A handler of Python's would wait for the end of the operation. This one is given the signal's number: 14 µs.
    LIBC.signal(signal.SIGALRM, LIBC.usleep)
    signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-6, within_s))


def crew(work: Callable[[int], Any], count: int, limit_s: int = 60) -> list[Any]:
    """Let processes work side by side, each with its number, and return what each returned."""
    with ExitStack() as stack:
        workers = [stack.enter_context(Worker(partial(work, number), limit_s)) for number in range(count)]
        for worker in workers:
            worker.go()
        return [worker.answer() for worker in workers]
