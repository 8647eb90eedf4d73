"""The limiter that programs import, over a real Redis: in threads, in event loops, and in both at once."""

import asyncio
import gc
import signal
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import uvloop

from tests.nodes import until
from tests.processes import stopped
from tokenguard import BackendDown, BudgetExceeded, Decision, InvalidValue, Limiter, Unsettled

PATIENCE_S = 20
SETTINGS = {"CAP_GLOBAL": "unlimited", "RATE_GLOBAL": "", "CAP_USER": 1000, "RATE_USER": 0}
LOOPS = [asyncio.new_event_loop, uvloop.new_event_loop]


def limiter_on(url, **settings):
    return Limiter(url, **{**SETTINGS, "TOKENGUARD_BUCKETS": 100, "TOKENGUARD_REDIS_TIMEOUT_S": 10, **settings})


@pytest.fixture
def server(redis_server):
    """The run's Redis, emptied."""
    with redis_server.client() as client:
        client.flushall()
    return redis_server


@pytest.fixture
def limiter(server):
    """A limiter of users that each have 1,000 tokens; what it leaves behind is warned of, and fails the test."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with limiter_on(server.url) as limiter:
            yield limiter
        gc.collect()


@pytest.fixture(params=LOOPS, ids=["asyncio", "uvloop"])
def run(request):
    """Runs a coroutine in a loop of its own that ends with it, as ``asyncio.run`` does."""

    def run(work):
        with asyncio.Runner(loop_factory=request.param) as runner:
            return runner.run(work)

    return run


def level(limiter, user="alice"):
    return limiter.peek(user=user)[-1].level


def waiting(limiter):
    return sum(map(len, limiter._desk.line._waiting.values()))


def clients_of(server):
    """Return how many connections of ours Redis has."""
    with server.client() as client:
        return sum(one["name"] == "tokenguard" for one in client.client_list())


def ours():
    """Return the threads that were begun by limiters."""
    return [thread for thread in threading.enumerate() if thread.name.startswith("tokenguard-")]


async def call(limiter, reserved=100, used=10, **more):
    """Make a call."""
    async with limiter.reserve(user="alice", tokens=reserved, **more) as guarded:
        guarded.settle(used)


# --- calls -----------------------------------------------------------------------------------------------------


def test_threads_share_a_budget(limiter):
    """A call is reserved, settled, refunded and refused as in memory."""
    with limiter.reserve(user="alice", tokens=600) as guarded:
        assert level(limiter) == 400
        assert isinstance(limiter.try_reserve(user="alice", tokens=600), Decision)
        guarded.settle(250)
    with pytest.raises(ValueError, match="failed"), limiter.reserve(user="alice", tokens=600):
        raise ValueError("failed")
    with pytest.raises(BudgetExceeded, match="limit 1000, remaining 750, requested 800"):
        limiter.reserve(user="alice", tokens=800).__enter__()

    assert level(limiter) == 750


def test_calls_are_settled_while_the_limiter_is_closed(redis_server):
    """Whether a thread settles before, after or while somebody closes, it comes back, and Redis hears of it."""
    for turn in range(5):
        settings = {
            "TOKENGUARD_REALM": f"closing-{turn}",
            "CAP_USER": 1000,
            "RATE_USER": 0,
            "CAP_GLOBAL": "unlimited",
        }
        limiter = Limiter(redis_server.url, **settings)
        calls = [limiter.try_reserve(user="alice", tokens=100) for _ in range(8)]
        together = threading.Barrier(len(calls) + 1)

        def settle(call, together=together):
            together.wait(PATIENCE_S)
            call.settle(10)

        with ThreadPoolExecutor(len(calls)) as threads:
            settling = [threads.submit(settle, call) for call in calls]
            together.wait(PATIENCE_S)
            limiter.close()
            for settled in settling:
                settled.result(PATIENCE_S)
        with Limiter(redis_server.url, **settings) as later:
            assert level(later) == 1000 - 10 * len(calls)


def test_interrupted_reserve_takes_nothing(server):
    """Ctrl-C while Redis is thinking leaves no call, and what is taken for it is given back once Redis answers."""
    with Limiter(server.url, CAP_USER=1000, RATE_USER=0, TOKENGUARD_REDIS_TIMEOUT_S=PATIENCE_S) as limiter:
        assert level(limiter) == 1000
        backend = limiter._engine.backend

        def interrupt():
            until(lambda: backend._thread._under_way, "nobody asks")
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

        with ThreadPoolExecutor(1) as threads:
            with stopped([server.process.pid]):
                interrupting = threads.submit(interrupt)
                with pytest.raises(KeyboardInterrupt):
                    limiter.try_reserve(user="alice", tokens=100)
            interrupting.result(PATIENCE_S)
        # Whoever looks at the very moment of that answer may see it taken still.
        until(lambda: level(limiter) == 1000, "it is not given back")


def test_async_block_ends_when_it_is_settled(limiter, run):
    """After the block, Redis knows what the call took, as everybody sees."""

    async def main():
        async with limiter.reserve(user="alice", tokens=600) as guarded:
            guarded.settle(250)
        assert await asyncio.to_thread(level, limiter) == 750
        with pytest.raises(ValueError, match="failed"):
            async with limiter.reserve(user="alice", tokens=600):
                raise ValueError("failed")
        assert isinstance(await limiter.try_reserve_async(user="alice", tokens=800), Decision)

    run(main())

    assert level(limiter) == 750


def test_cancelled_block_keeps_what_it_had(limiter, run):
    """A task that is cancelled inside of its block may have had the provider at work."""

    async def guarded(entered):
        async with limiter.reserve(user="alice", tokens=600):
            entered.set()
            await asyncio.Event().wait()

    async def main():
        entered = asyncio.Event()
        task = asyncio.create_task(guarded(entered))
        await entered.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(level, limiter) == 400

    run(main())


def test_call_cancelled_on_its_way_takes_nothing(limiter, run):
    """A reserve that nobody waits for anymore is undone, whether it had been sent or not."""

    async def main():
        await call(limiter, used=0)  # there is a connection
        for turns in range(8):
            task = asyncio.create_task(limiter.try_reserve_async(user="alice", tokens=600))
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            (outcome,) = await asyncio.gather(task, return_exceptions=True)
            if not isinstance(outcome, asyncio.CancelledError):
                outcome.refund()
                await outcome.settled()
        await call(limiter, used=0)

    run(main())

    assert level(limiter) == 1000


def test_plain_block_in_a_loop_that_ends_is_settled(limiter, run):
    """What ``with`` reserved is settled when it ends, even where the loop ends at once."""

    async def main():
        with limiter.reserve(user="alice", tokens=600) as guarded:
            guarded.settle(250)

    run(main())

    assert level(limiter) == 750


def test_call_that_nobody_waited_for_is_settled_before_the_loop_ends(limiter, run):
    """``settle`` does not wait in an event loop, and yet it is done."""

    async def main():
        guarded = await limiter.try_reserve_async(user="alice", tokens=600)
        guarded.settle(250)

    run(main())

    assert level(limiter) == 750


def test_threads_settle_what_tasks_reserved_and_the_other_way_round(limiter, run):
    """A call belongs to no loop and to no thread."""

    async def reserved():
        return await limiter.try_reserve_async(user="alice", tokens=600)

    guarded = run(reserved())
    guarded.settle(100)
    assert level(limiter) == 900

    async def settle(guarded):
        guarded.settle(100)
        await guarded.settled()

    run(settle(limiter.try_reserve(user="alice", tokens=600)))
    assert level(limiter) == 800


def test_unsettled_block_warns_at_its_line(limiter, run):
    """As in memory, from a plain block and from one of a coroutine."""

    def forgetful():
        with limiter.reserve(user="alice", tokens=1):
            pass

    async def forgetful_soon():
        async with limiter.reserve(user="alice", tokens=1):
            pass

    for function, use in ((forgetful, forgetful), (forgetful_soon, lambda: run(forgetful_soon()))):
        with pytest.warns(Unsettled) as told:
            use()
        line = function.__code__.co_firstlineno + 1
        assert [(warning.filename, warning.lineno) for warning in told] == [(__file__, line)]


def test_loops_one_after_another_leave_nothing_behind(limiter, server, run):
    """Nobody need close anything: a connection ends with its event loop, without a warning."""
    for _ in range(3):
        run(call(limiter))
        gc.collect()
        until(lambda: clients_of(server) == 0, "a connection is left open")

    assert level(limiter) == 970
    assert not [lane for lane in limiter._engine.backend._lanes if lane.is_closed()]


def test_loops_and_threads_at_once(limiter):
    """Threads and two loops share one limiter and one budget, exactly."""

    async def many():
        await asyncio.gather(*(call(limiter, 2, 1) for _ in range(50)))

    def thread(_):
        with limiter.reserve(user="alice", tokens=2, wait=PATIENCE_S) as guarded:
            guarded.settle(1)

    def loop(factory):
        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(many())

    with ThreadPoolExecutor(12) as pool:
        loops = [pool.submit(loop, factory) for factory in LOOPS]
        threads = [pool.submit(thread, number) for number in range(50)]
        for one in (*loops, *threads):
            one.result(PATIENCE_S)

    assert level(limiter) == 1000 - 150


# --- waiting ---------------------------------------------------------------------------------------------------


def test_whoever_waits_is_served_in_order(limiter):
    """Threads and tasks wait for what one of them holds, and are served as they came."""
    held = limiter.try_reserve(user="alice", tokens=1000)
    served = []

    def thread(number):
        with limiter.reserve(user="alice", tokens=1000, wait=PATIENCE_S) as guarded:
            served.append(number)
            guarded.settle(0)

    async def task(number):
        async with limiter.reserve(user="alice", tokens=1000, wait=PATIENCE_S) as guarded:
            served.append(number)
            guarded.settle(0)

    with ThreadPoolExecutor(20) as pool:
        everybody = []
        for number in range(20):
            work = pool.submit(asyncio.run, task(number)) if number % 2 else pool.submit(thread, number)
            everybody.append(work)
            until(lambda number=number: waiting(limiter) == number + 1, "it does not stand in line")
        assert not served

        held.refund()

        for one in everybody:
            one.result(PATIENCE_S)
    assert served == list(range(20))
    assert level(limiter) == 1000
    assert not waiting(limiter)


def test_task_that_is_cancelled_while_it_waits_lets_the_next_pass(limiter, run):
    """It has taken nothing, and its turn is the next one's."""

    async def main():
        held = await limiter.try_reserve_async(user="alice", tokens=1000)
        first = asyncio.create_task(limiter.try_reserve_async(user="alice", tokens=1000, wait=PATIENCE_S))
        second = asyncio.create_task(limiter.try_reserve_async(user="alice", tokens=1000, wait=PATIENCE_S))
        await asyncio.to_thread(until, lambda: waiting(limiter) == 2, "they do not wait")
        held.refund()
        await held.settled()
        first.cancel()
        (await second).refund()
        assert first.cancelled()

    run(main())

    assert level(limiter) == 1000


def test_budget_that_is_raised_serves_who_waits(limiter, run):
    """Also where the event loop that sets it is the one in which somebody waits."""
    limiter.budgets.set("user", "alice", capacity=100, refill_per_sec=0, level=0)

    async def main():
        waits = asyncio.create_task(limiter.try_reserve_async(user="alice", tokens=50, wait=PATIENCE_S))
        await asyncio.to_thread(until, lambda: waiting(limiter), "it does not wait")
        limiter.budgets.set("user", "alice", capacity=150, refill_per_sec=0)
        (await waits).keep()

    run(main())

    assert level(limiter) == 0


def test_waiting_in_vain_is_a_refusal(limiter, run):
    """It says how things are when the time is over, for one behind others, too."""

    async def main():
        held = await limiter.try_reserve_async(user="alice", tokens=600)
        first = asyncio.create_task(limiter.try_reserve_async(user="alice", tokens=800, wait=PATIENCE_S))
        await asyncio.to_thread(until, lambda: waiting(limiter), "it does not wait")
        behind = await limiter.try_reserve_async(user="alice", tokens=10, wait=0.01)
        assert not behind.allowed
        assert behind.binding.remaining == 400
        held.refund()
        (await first).refund()

    run(main())

    assert level(limiter) == 1000


# --- budgets ---------------------------------------------------------------------------------------------------


def test_budgets_are_shared_by_all_limiters(limiter, server):
    """What one sets binds the very next call of another."""
    with limiter_on(server.url) as other:
        other.budgets.set("user", "alice", capacity=50, refill_per_sec=0)

        assert isinstance(limiter.try_reserve(user="alice", tokens=101), Decision)
        assert [(state.id, state.capacity) for state in limiter.budgets.list()] == [("alice", 50)]
        assert limiter.budgets.delete("user", "alice").capacity == 1000
        assert other.budgets.list() == []
        with pytest.raises(InvalidValue, match="refill_per_sec must be"):
            limiter.budgets.set("user", "alice", capacity=5, refill_per_sec=-1)


def test_budgets_can_be_set_from_an_event_loop(limiter, run):
    """They wait for Redis in a thread of their own, and so the loop waits, but hangs not."""

    async def main():
        limiter.budgets.set("user", "alice", capacity=50, refill_per_sec=0)
        assert isinstance(await limiter.try_reserve_async(user="alice", tokens=101), Decision)
        await asyncio.to_thread(limiter.budgets.delete, "user", "alice")

    run(main())

    assert limiter.budgets.list() == []


def test_redis_that_is_away_is_told_of(redis):
    """Calls, budgets and peeks say so; nothing hangs, and closing neither."""
    with limiter_on(redis.url, TOKENGUARD_REDIS_TIMEOUT_S=0.4) as limiter:
        limiter.peek(user="alice")
        redis.kill()

        for ask in (
            lambda: limiter.reserve(user="alice", tokens=1).__enter__(),
            lambda: limiter.try_reserve(user="alice", tokens=1, wait=PATIENCE_S),
            lambda: limiter.peek(user="alice"),
            lambda: limiter.budgets.list(),
            lambda: limiter.budgets.set("user", "alice", capacity=5, refill_per_sec=0),
        ):
            with pytest.raises(BackendDown):
                ask()


# --- closing ---------------------------------------------------------------------------------------------------


def test_closing_leaves_nothing_behind(server, run):
    """``aclose`` in the loop that used it, or ``close`` anywhere, ends threads and connections."""

    async def main():
        async with limiter_on(server.url) as limiter:
            await call(limiter)
            await asyncio.to_thread(limiter.peek, user="alice")
            with pytest.raises(BudgetExceeded):
                await limiter.reserve(user="alice", tokens=2001).__aenter__()
        with pytest.raises(RuntimeError, match="the limiter is closed"):
            await limiter.reserve(user="alice", tokens=1).__aenter__()
        assert not ours()
        await asyncio.to_thread(until, lambda: clients_of(server) == 0, "a connection is left open")

    run(main())
    gc.collect()


def test_closing_ends_the_connections_of_loops_that_go_on(server, run):
    """Whoever closes it elsewhere need not know which loops have used it."""

    async def main():
        limiter = limiter_on(server.url)
        await call(limiter)
        limiter.close()
        await asyncio.to_thread(until, lambda: clients_of(server) == 0, "a connection is left open")

    run(main())
    gc.collect()


def test_closing_as_the_last_thing_in_a_loop(server, run):
    """A loop that ends right after ends the connection all the same."""

    async def main():
        limiter = limiter_on(server.url)
        await call(limiter)
        limiter.close()

    run(main())
    gc.collect()
    until(lambda: clients_of(server) == 0, "a connection is left open")


def test_call_that_outlives_its_limiter_is_settled(server, run):
    """It is charged what it took, and no thread is left for it."""
    limiter = limiter_on(server.url)
    guarded = limiter.try_reserve(user="alice", tokens=600)
    limiter.close()

    guarded.settle(250)

    assert not ours()
    with limiter_on(server.url) as other:
        assert level(other) == 750

    async def main():
        limiter = limiter_on(server.url)
        async with limiter.reserve(user="alice", tokens=600) as guarded:
            await limiter.aclose()
            guarded.settle(250)

    run(main())
    gc.collect()
    until(lambda: clients_of(server) == 0, "a connection is left open")
    with limiter_on(server.url) as other:
        assert level(other) == 500


def test_closing_wakes_all_who_wait(server):
    """They are told that it is closed, and their loops end well."""
    limiter = limiter_on(server.url)
    held = limiter.try_reserve(user="alice", tokens=1000)
    with ThreadPoolExecutor(2) as pool:
        those = [
            pool.submit(limiter.try_reserve, user="alice", tokens=1, wait=3 * PATIENCE_S),
            pool.submit(asyncio.run, call(limiter, 1, 1, wait=3 * PATIENCE_S)),
        ]
        until(lambda: waiting(limiter) == 2, "they do not wait")
        limiter.close()
        for one in those:
            with pytest.raises(RuntimeError, match="the limiter is closed"):
                one.result(PATIENCE_S)
    held.keep()
    assert not ours()


def test_limiter_that_is_garbage_is_closed_wherever_that_is_found(server):
    """Its own thread may come upon it, and does not wait for itself."""
    limiter = limiter_on(server.url)
    limiter.peek(user="alice")
    thread = limiter._engine.backend._thread

    async def collect():
        gc.collect()

    limiter.itself = limiter
    del limiter

    thread.run(collect())

    until(lambda: not ours() and clients_of(server) == 0, "it is not closed")
