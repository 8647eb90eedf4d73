"""The limiter that programs import, in programs that fork, that end, and that are started again."""

import json
import subprocess
import sys
from textwrap import dedent

import pytest

PATIENCE_S = 60
BEGIN = """
import asyncio, gc, json, multiprocessing, os, sys, threading
from tokenguard import Decision, InvalidSetting, Limiter

def limiter_on(url):
    free = {"CAP_GLOBAL": "unlimited", "RATE_GLOBAL": ""}
    return Limiter(url, **free, CAP_USER=1000, RATE_USER=0, TOKENGUARD_BUCKETS=100)

def level(limiter):
    return limiter.peek(user="alice")[-1].level

def spend(tokens):
    with limiter.reserve(user="alice", tokens=tokens) as call:
        call.settle(tokens)

async def spend_soon(tokens):
    async with limiter.reserve(user="alice", tokens=tokens) as call:
        call.settle(tokens)

def forked(work):
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0, "the child has failed"

def waits():
    return sum(map(len, limiter._desk.line._waiting.values()))

def until(condition):
    for _ in range(10_000):
        if condition():
            return
        threading.Event().wait(0.001)
    raise AssertionError("it does not come about")

limiter = limiter_on(sys.argv[1])
"""


def run(program, url, warnings="error"):
    """Run a program in which ``limiter`` is on a URL; return what it prints, and see that it says nothing else."""
    # From 3.12 on, Python itself warns of a fork beside threads, of which a limiter that has been used has one.
    ours = ("-W", warnings, "-W", "ignore:This process:DeprecationWarning")
    command = [sys.executable, *ours, "-c", BEGIN + dedent(program), url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return json.loads(done.stdout)


@pytest.fixture(params=["memory", "file", "redis"])
def url(request, tmp_path):
    """Where buckets live: a place of each kind."""
    if request.param == "redis":
        server = request.getfixturevalue("redis_server")
        with server.client() as client:
            client.flushall()
        return server.url
    return f"file://{tmp_path}/state" if request.param == "file" else "memory://"


def test_forked_processes_share_buckets(url):
    """A child that is forked off before the first use, or after it, spends of the same budget."""
    program = """
        forked(lambda: spend(100))
        spend(10)
        asyncio.run(spend_soon(20))
        forked(lambda: spend(200))
        forked(lambda: asyncio.run(spend_soon(300)))
        print(level(limiter))
        """

    assert run(program, url) == 370


def test_children_of_multiprocessing_share_buckets(url):
    """Likewise a child that multiprocessing forks."""
    program = """
        spend(10)
        context = multiprocessing.get_context("fork")
        children = [context.Process(target=spend, args=(tokens,)) for tokens in (100, 200)]
        for child in children:
            child.start()
        for child in children:
            child.join()
            assert child.exitcode == 0
        print(level(limiter))
        """

    assert run(program, url) == 690


def test_child_that_ends_by_itself_closes_what_is_its_own(url):
    """A child that leaves by its main program's end does not close anything of its parent's."""
    program = """
        spend(10)
        pid = os.fork()
        spend(100)
        if pid:
            assert os.waitpid(pid, 0)[1] == 0
            spend(1)
            limiter.budgets.set("user", "bob", capacity=5, refill_per_sec=0)
            print(level(limiter))
        """

    assert run(program, url, warnings="default") == 789


def test_child_does_not_wait_behind_threads_of_its_parent(url):
    """Who waited when it was forked off waits elsewhere, and what is given back serves the child's own."""
    program = """
        held = limiter.try_reserve(user="alice", tokens=1000)
        waiting = threading.Thread(target=limiter.try_reserve, kwargs={"user": "alice", "tokens": 5, "wait": 30})
        waiting.start()
        until(waits)

        def child():
            assert not waits()
            own = limiter.try_reserve(user="bob", tokens=1000)
            served = []
            def wait():
                with limiter.reserve(user="bob", tokens=600, wait=30) as call:
                    served.append(1)
                    call.settle(1)
            thread = threading.Thread(target=wait)
            thread.start()
            until(waits)
            own.refund()
            thread.join()
            assert served and not waits()
            limiter.reserve(user="alice", tokens=1, wait=0.001)

        forked(child)
        assert waits() == 1
        held.refund()
        waiting.join()
        print(level(limiter))
        """

    assert run(program, url, warnings="ignore") == 995


def test_fork_in_a_running_loop_tells_the_loop_nothing(url):
    """Its bell is the parent's too: what the child forgets of the loop, it forgets in silence."""
    program = """
        told = []

        class Loop(asyncio.SelectorEventLoop):
            def call_soon_threadsafe(self, *args, **more):
                told.append(args)
                return super().call_soon_threadsafe(*args, **more)

        async def main():
            await spend_soon(10)
            told.clear()

            def child():
                gc.collect()
                assert not told, told

            forked(child)
            await spend_soon(20)

        with asyncio.Runner(loop_factory=Loop) as runner:
            runner.run(main())
        print(level(limiter))
        """

    assert run(program, url) == 970


def test_program_that_closes_nothing_ends_in_silence(url):
    """Neither threads nor event loops have to close anything, with all warnings on."""
    program = """
        spend(10)
        asyncio.run(spend_soon(20))
        asyncio.run(spend_soon(30))
        gc.collect()
        print(level(limiter))
        """

    assert run(program, url) == 940


def test_program_that_exits_in_a_block_keeps_what_it_had(url):
    """What is reserved in a block that is ended from outside stays spent, at the end of a program, too."""
    program = """
        def fail():
            with limiter.reserve(user="alice", tokens=100):
                raise SystemExit(0)
        import atexit
        atexit.register(lambda: print(level(limiter)))
        fail()
        """

    assert run(program, url) == 900


def test_fork_in_a_block_leaves_the_call_to_the_parent(url):
    """However the block ends in the child, what was reserved is the parent's to settle, and is so once."""
    program = """
        def fail():
            raise ValueError

        with limiter.reserve(user="alice", tokens=100) as call:
            pid = os.fork()
            if pid == 0:
                try:
                    call.__exit__(ValueError, ValueError(), None)
                    del call
                finally:
                    os._exit(0)
            os.waitpid(pid, 0)
            call.settle(50)
        print(level(limiter))
        """

    assert run(program, url) == 950


def test_state_goes_on_in_the_next_process(tmp_path):
    """What a process leaves without closing anything, the next one goes on from."""
    url = f"file://{tmp_path}/state"
    program = """
        limiter.budgets.set("user", "alice", capacity=2000, refill_per_sec=0)
        spend(100)
        print(level(limiter))
        """

    assert [run(program, url) for _ in range(3)] == [1900, 1800, 1700]


def test_file_has_one_process_at_a_time(tmp_path):
    """Another one that opens it is told so; forked ones, which share it, are not."""
    program = """
        import subprocess
        spend(1)
        again = "from tokenguard import Limiter; import sys; Limiter(sys.argv[1])"
        done = subprocess.run([sys.executable, "-c", again, sys.argv[1]], capture_output=True, text=True)
        forked(lambda: spend(1))
        print(json.dumps([done.returncode, done.stderr.splitlines()[-1], level(limiter)]))
        """

    code, error, left = run(program, f"file://{tmp_path}/state")

    assert code == 1
    assert "InvalidSetting: url: the state is kept at" in error
    assert "by another server that runs" in error
    assert left == 998


def test_limiter_that_is_garbage_is_closed_by_its_own_thread(tmp_path):
    """The thread that saves its state may come upon it, and saves it and ends all the same."""
    program = """
        from tokenguard.backends import keeper
        spend(100)
        backend = limiter._engine.backend
        found = threading.Event()

        def collect():
            gc.collect()
            found.set()
            return budgets()

        budgets, backend._keeper._budgets = backend._keeper._budgets, collect
        limiter.itself = limiter
        del limiter, backend
        found.wait(30)
        until(lambda: threading.active_count() == 1)
        limiter = limiter_on(sys.argv[1])
        print(level(limiter))
        """

    assert run(program, f"file://{tmp_path}/state") == 900


def test_lock_that_a_thread_holds_while_another_forks_is_free_in_the_child():
    """What is learned of the provider's limits can go on there: whoever had the lock is not."""
    told = run(
        """
        from tokenguard.provider_limits.forked import ForkedLock

        lock, held, done = ForkedLock(), threading.Event(), threading.Event()

        def hold():
            with lock:
                held.set()
                done.wait()

        def take():
            with lock:
                pass

        thread = threading.Thread(target=hold)
        thread.start()
        held.wait()
        forked(take)
        done.set()
        thread.join()
        print(json.dumps("free"))
        """,
        "memory://",
    )
    assert told == "free"
