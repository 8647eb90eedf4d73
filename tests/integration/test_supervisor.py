"""Workers under their supervisor: how they start, are replaced, and end."""

import os
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.integration.supervised import WORKERS
from tests.nodes import PATIENCE_S as LIMIT_S
from tests.nodes import until
from tests.processes import children_of, group_of, stopped, until_gone


class Supervised:
    """A supervisor at work."""

    def __init__(self, process, errors):
        self._process = process
        self._errors = errors
        self.pid = process.pid

    def heard(self):
        """Return the next that was said, in words."""
        return self._process.stdout.readline().split()

    def workers(self, count=WORKERS):
        """Return the next that say that they work."""
        said = [self.heard() for _ in range(count)]
        assert all(words[0] == "worker" for words in said), said
        return [int(words[1]) for words in said]

    def rest(self):
        """Return what is said until all have ended."""
        return self._process.stdout.read().splitlines()

    def ended(self):
        """Return its exit code, once it has one, and see that it leaves nobody."""
        code = self._process.wait(LIMIT_S)
        assert group_of(self.pid) == []
        return code

    @property
    def errors(self):
        return self._errors.read_text()


@pytest.fixture
def supervise(tmp_path):
    """Starts a supervisor of workers that do some work; nobody of them is left in the end."""

    @contextmanager
    def start(work, errors=tmp_path / "errors"):
        command = [sys.executable, "-m", "tests.integration.supervised", work]
        if errors is None:
            command = ["sh", "-c", 'exec "$@" 2>&-', "sh", *command]
        with (
            Path(errors or os.devnull).open("w") as file,
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=file, text=True, process_group=0) as process,
        ):
            watchdog = threading.Timer(LIMIT_S, _kill, [process.pid])  # reading waits for ever
            watchdog.start()
            try:
                yield Supervised(process, errors)
            finally:
                watchdog.cancel()
                _kill(process.pid)

    return start


def _kill(group):
    for pid in group_of(group):
        os.kill(pid, signal.SIGKILL)


def begun(crew):
    """Return the workers, once all of them serve."""
    workers = crew.workers()
    assert crew.heard() == ["ready"]
    return workers


def kill_first(crew, workers):
    """Kill one; another must be there in its place, beside the rest."""
    os.kill(workers[0], signal.SIGKILL)
    (replaced,) = crew.workers(1)
    assert children_of(crew.pid) == sorted([*workers[1:], replaced])


def test_ready_is_said_once_and_when_all_serve(supervise):
    """Not before the last of them serves, and not again when one is replaced."""
    with supervise("serve") as crew:
        workers = begun(crew)
        kill_first(crew, workers)
        os.kill(crew.pid, signal.SIGTERM)
        assert crew.rest() == ["run True"]
        assert crew.ended() == 0
        assert f"worker {workers[0]} was killed by SIGKILL and is replaced" in crew.errors


def test_worker_that_ends_of_itself_is_replaced(supervise):
    """An operator may have one end in peace, and gets a new one."""
    with supervise("serve") as crew:
        workers = begun(crew)
        os.kill(workers[1], signal.SIGTERM)
        crew.workers(1)
        assert f"worker {workers[1]} ended with code 0 and is replaced" in crew.errors


def test_several_that_die_at_once_are_all_replaced(supervise):
    """Signals of their deaths may melt into one while the supervisor looks elsewhere."""
    with supervise("serve") as crew:
        workers = begun(crew)
        with stopped([crew.pid]):
            for worker in workers:
                os.kill(worker, signal.SIGKILL)
        assert sorted(crew.workers()) == children_of(crew.pid)


def test_one_that_dies_again_and_again_is_replaced_ever_more_slowly(supervise):
    """Each pause is twice as long as the one before, up to the longest."""
    with supervise("die_young") as crew:
        words = [crew.heard() for _ in range(WORKERS + 1 + 9)]
        os.kill(crew.pid, signal.SIGTERM)
        crew.rest()
        assert crew.ended() == 0
    born_s = [float(said[2]) for said in words if said != ["ready"]]
    for born, pause_s in zip(born_s[WORKERS:], (0.05, 0.1, 0.2, 0.4, 0.4), strict=False):
        assert born - born_s[0] >= pause_s
    assert born_s[-1] - born_s[0] < LIMIT_S / 2


def test_those_that_cannot_start_end_it_all(supervise):
    """One that fails before all serve shows that none can."""
    with supervise("fail") as crew:
        said = crew.rest()
        assert said[-1] == "run False"
        assert "ready" not in said
        crew.ended()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("work", ["serve", "never_be_ready"])
def test_signal_ends_all(supervise, number, work):
    """In peace, whether they serve or are still about to."""
    with supervise(work) as crew:
        crew.workers()
        os.kill(crew.pid, number)
        assert crew.rest()[-1] == "run True"
        assert crew.ended() == 0
        assert crew.errors == ""


def test_signals_on_top_of_others_change_nothing(supervise):
    """Whoever is impatient does not hurt."""
    with supervise("serve") as crew:
        crew.workers()
        with stopped([crew.pid]):
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                os.kill(crew.pid, number)
        assert crew.rest()[-1] == "run True"
        assert crew.ended() == 0


def test_those_who_take_no_hint_are_killed(supervise):
    """After their calls' time and a grace."""
    with supervise("be_stubborn") as crew:
        crew.workers()
        assert crew.heard() == ["ready"]
        os.kill(crew.pid, signal.SIGTERM)
        assert crew.rest() == ["run True"]
        assert crew.ended() == 0


def test_workers_end_when_their_supervisor_is_killed(supervise):
    """They notice by the lifeline."""
    with supervise("serve") as crew:
        workers = begun(crew)
        os.kill(crew.pid, signal.SIGKILL)
        until_gone(workers)
        assert crew.rest() == ["ended"] * WORKERS


def test_end_of_the_terminal_is_ignored_under_nohup(supervise):
    """What was ignored when it began is ignored by it, and by its workers."""
    with supervise("shrug") as crew:
        workers = begun(crew)
        os.killpg(crew.pid, signal.SIGHUP)
        kill_first(crew, workers)


@pytest.mark.parametrize("errors", ["/dev/full", None])
def test_log_that_cannot_be_written_ends_nothing(supervise, errors):
    """A full disk, or no standard error at all, keeps no worker from being replaced."""
    with supervise("serve", errors) as crew:
        kill_first(crew, begun(crew))


def test_fork_that_fails_is_tried_again(supervise):
    """Want of memory kills a worker, and may keep the next from being forked off; the others go on."""
    with supervise("come_late") as crew:
        workers = begun(crew)
        os.kill(workers[0], signal.SIGKILL)
        crew.workers(1)
        until(lambda: len(children_of(crew.pid)) == WORKERS, "it is not replaced")
