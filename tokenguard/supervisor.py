"""Several processes that serve one socket: they are forked off, replaced when they die, and ended together."""

from __future__ import annotations

import gc
import logging
import math
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_SIGNALS = (*STOPPING, signal.SIGCHLD)

GRACE_S = 5.0
"""How much longer than its running calls a worker may take to end, before it is killed."""

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 10.0
"""Before a worker is replaced that died young: it would only die again."""

_YOUNG_S = 5.0
_CALM_S = 60.0

_log = logging.getLogger("tokenguard")


class Worker:
    """What a worker has of its supervisor.

    Attributes:
        lifeline: A file descriptor that can be read from once the supervisor is gone.
    """

    def __init__(self, lifeline: int, ready: int) -> None:
        self.lifeline = lifeline
        self._ready = ready

    def ready(self) -> None:
        """Say that it serves."""
        with suppress(OSError):  # the supervisor has gone
            os.write(self._ready, b"\n")
        os.close(self._ready)


class Supervisor:
    """Keeps a number of workers alive until a signal comes, then lets them end.

    Args:
        workers: How many.
        work: What a worker does; when it returns, the worker has ended.
        ready: Is called once all of them serve.
        stopping: Is called before they are told to end: what only this process keeps open must not outlive them.
        patience_s: How long running calls may take to end.
    """

    def __init__(
        self,
        workers: int,
        work: Callable[[Worker], None],
        ready: Callable[[], None],
        stopping: Callable[[], None],
        patience_s: float,
    ) -> None:
        self._count = workers
        self._work = work
        self._ready = ready
        self._tell_stopping = stopping
        self._patience_s = patience_s
        self._born_s: dict[int, float] = {}
        self._starting: dict[int, int] = {}  # what a worker says that it is ready on, and its process id
        self._due_s: list[float] = []
        self._pause_s = FIRST_PAUSE_S
        self._mourned_s = -math.inf
        self._ready_count = 0
        self._serves = False
        self._ends_s: float | None = None
        self._stopping = False
        self._failed = False

    def run(self) -> bool:
        """Supervise; return False if the workers could not start."""
        self._lifeline, self._held = os.pipe()
        gc.collect()
        gc.freeze()  # what is there now stays shared: a collection would write to it
        with self._woken() as wake:
            self._wake = wake
            for _ in range(self._count):
                self._fork()
            while self._born_s or self._due_s:
                self._wait()
                self._reap()
                self._replace()
        os.close(self._held)
        os.close(self._lifeline)
        return not self._failed

    # --- signals ----------------------------------------------------------------------------------------------

    @contextmanager
    def _woken(self) -> Iterator[int]:
        """Have signals end a wait; the file descriptor tells which came."""
        told, tell = os.pipe()
        os.set_blocking(told, False)
        os.set_blocking(tell, False)
        nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN  # then the end of a terminal is nothing
        heard = [number for number in _SIGNALS if not (nohup and number == signal.SIGHUP)]
        before = {number: signal.signal(number, lambda *_: None) for number in heard}
        woken_before = signal.set_wakeup_fd(tell)
        try:
            yield told
        finally:
            signal.set_wakeup_fd(woken_before)
            for number, handler in before.items():
                signal.signal(number, handler)
            os.close(told)
            os.close(tell)

    def _wait(self) -> None:
        """Wait until a worker is ready or has died, a signal has come, or something is due."""
        dues = [*self._due_s, *([] if self._ends_s is None else [self._ends_s])]
        timeout_s = max(0.0, min(dues) - time.monotonic()) if dues else None
        readable, _, _ = select.select([self._wake, *self._starting], [], [], timeout_s)
        for ready in readable:
            if ready == self._wake:
                came = os.read(ready, 4096)
                if self._stopping and signal.SIGINT in came:
                    self._signal(signal.SIGINT)  # whoever asks again will not wait for running calls
                if not set(STOPPING).isdisjoint(came):
                    self._stop()
            else:
                self._heard_of(ready)
        if self._ends_s is not None and time.monotonic() >= self._ends_s:
            self._signal(signal.SIGKILL)
            self._ends_s = None

    def _stop(self) -> None:
        """Let all workers end; once is enough, for those that do not are killed in time."""
        if not self._stopping:
            self._tell_stopping()
            self._signal(signal.SIGTERM)
            self._due_s.clear()
            self._stopping = True
            self._ends_s = time.monotonic() + self._patience_s + GRACE_S

    def _signal(self, number: int) -> None:
        for pid in self._born_s:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    # --- workers ----------------------------------------------------------------------------------------------

    def _fork(self) -> None:
        heard, say = os.pipe()
        _flush()
        # A signal that comes now must find the child with its own handlers, or none.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            pid = os.fork()
        except OSError:
            os.close(heard)
            raise
        else:
            if pid == 0:
                os.close(heard)
                self._be_a_worker(say, blocked)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
            os.close(say)
        self._starting[heard] = pid
        self._born_s[pid] = time.monotonic()

    def _be_a_worker(self, say: int, blocked: set[int | signal.Signals]) -> None:
        """Work, and end; never return."""
        code = 1
        try:
            signal.set_wakeup_fd(-1)
            for number in _SIGNALS:
                signal.signal(number, signal.SIG_DFL)
            signal.signal(signal.SIGHUP, signal.SIG_IGN)  # a terminal tells all; what it means is for us to say
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
            for inherited in (self._wake, self._held, *self._starting):
                os.close(inherited)
            self._work(Worker(self._lifeline, say))
            code = 0
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            with suppress(BaseException):
                _flush()
            os._exit(code)

    def _heard_of(self, ready: int) -> None:
        """Take in that a worker is ready, or will never be."""
        said = os.read(ready, 1)
        os.close(ready)
        del self._starting[ready]
        self._ready_count += bool(said)
        if self._ready_count == self._count and not self._serves:
            self._serves = True
            self._ready()

    def _reap(self) -> None:
        while self._born_s:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            if (born_s := self._born_s.pop(pid, None)) is not None and not self._stopping:
                self._mourn(pid, os.waitstatus_to_exitcode(status), time.monotonic() - born_s)

    def _mourn(self, pid: int, code: int, lived_s: float) -> None:
        """Have a worker replaced that died, unless it shows that none can start."""
        if not self._serves:
            self._failed = True
            self._stop()
            return
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        now_s = time.monotonic()
        if now_s - self._mourned_s > _CALM_S:
            self._pause_s = FIRST_PAUSE_S
        self._mourned_s = now_s
        pause_s = 0.0
        if lived_s < _YOUNG_S:
            pause_s, self._pause_s = self._pause_s, min(2 * self._pause_s, LONGEST_PAUSE_S)
        _log.error("worker %d %s and is replaced%s", pid, how, f" in {pause_s:g} s" if pause_s else "")
        self._due_s.append(now_s + pause_s)

    def _replace(self) -> None:
        now_s = time.monotonic()
        for due_s in [due_s for due_s in self._due_s if due_s <= now_s]:
            self._due_s.remove(due_s)
            try:
                self._fork()
            except OSError as error:  # of memory, or of processes: the others go on
                _log.error("a worker cannot be replaced yet: %s", error.strerror)
                self._due_s.append(now_s + LONGEST_PAUSE_S)


def _flush() -> None:
    """Write out what a fork would have written twice; a daemon may have no standard streams."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
