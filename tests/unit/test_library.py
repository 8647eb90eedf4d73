"""The limiter that programs import, as a stranger uses it: in threads, in tasks, and in both at once."""

import asyncio
import copy
import functools
import gc
import math
import pickle
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

import tokenguard
from tests.mirror import learned
from tokenguard import (
    AlreadySettled,
    BudgetExceeded,
    BudgetNotFound,
    Call,
    Decision,
    InvalidSetting,
    InvalidValue,
    Limiter,
    Unsettled,
)
from tokenguard.config import SETTINGS
from tokenguard.library.settings import Settings

PATIENCE_S = 20
ENDINGS = [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit, asyncio.CancelledError]
FREE = {"CAP_GLOBAL": "unlimited", "RATE_GLOBAL": "", "CAP_TEAM": "unlimited", "RATE_TEAM": ""}
"""Settings without which users alone have budgets."""


@pytest.fixture
def limiter():
    """A limiter of users that each have 1,000 tokens, once and for all."""
    with Limiter("memory://", **FREE, CAP_USER=1000, RATE_USER=0, TOKENGUARD_BUCKETS=1000) as limiter:
        yield limiter


def level(limiter, user="alice", **who):
    """Return what a user has left."""
    return limiter.peek(user=user, **who)[-1].level


def waiting(limiter):
    """Return how many wait for a budget."""
    return sum(map(len, limiter._desk.line._waiting.values()))


def until(condition):
    """Look on until something has come about."""
    until_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < until_s, "it does not come about"
        threading.Event().wait(0.001)


# --- a call --------------------------------------------------------------------------------------------------


def test_settled_call_costs_what_it_took(limiter):
    """The estimate is reserved while the block runs, and what it took is charged in its stead."""
    with limiter.reserve(user="alice", tokens=600) as call:
        assert level(limiter) == 400
        assert call.is_open
        call.settle(250)

    assert level(limiter) == 750
    assert not call.is_open


def test_async_block_does_the_same(limiter):
    """``async with`` reserves and settles as ``with`` does."""

    async def guarded():
        async with limiter.reserve(user="alice", tokens=600) as call:
            assert level(limiter) == 400
            call.settle(250)

    asyncio.run(guarded())

    assert level(limiter) == 750


def test_call_that_took_more_than_estimated_is_charged_all(limiter):
    """What is beyond the estimate, and beyond what there is, becomes debt."""
    with limiter.reserve(user="alice", tokens=10) as call:
        call.settle(1500)

    assert level(limiter) == -500


def test_nothing_is_reserved_before_the_block(limiter):
    """A call that is made and never begun takes nothing, and warns of that when it is thrown away."""
    call = limiter.reserve(user="alice", tokens=600)

    assert level(limiter) == 1000
    assert not call.is_open
    with pytest.raises(RuntimeError, match="nothing is reserved yet"):
        call.settle(1)
    for name in ("refund", "keep", "decision", "limit_headers"):
        with pytest.raises(RuntimeError, match="nothing is reserved yet"):
            getattr(call, name)()
    assert repr(call) == "<Call of alice for 600 tokens, not reserved yet>"
    with pytest.warns(Unsettled, match=r"never begun: nothing was reserved.*`with` or `async with`"):
        del call


def test_call_tells_how_the_buckets_are(limiter):
    """The decision that let it pass, and the fields for an answer, are there while it runs and after."""
    with limiter.reserve(user="alice", tokens=600) as call:
        assert repr(call) == "<Call of alice for 600 tokens, open>"
        call.settle(1)

    assert call.decision.allowed
    assert call.decision.buckets[-1].level == 400
    assert (b"x-ratelimit-remaining-tokens", b"400") in call.limit_headers()
    assert repr(call) == "<Call of alice for 600 tokens, settled>"


def left_by(error):
    return 1000 if issubclass(error, Exception) else 400


@pytest.mark.parametrize("error", ENDINGS)
def test_exception_in_the_block_refunds(limiter, error):
    """A block that fails before it is settled gives back what it had; one that is ended from outside keeps it.

    The exception goes on, and nothing warns.
    """
    with pytest.raises(error), limiter.reserve(user="alice", tokens=600):
        raise error

    assert level(limiter) == left_by(error)


@pytest.mark.parametrize("error", ENDINGS)
def test_exception_in_an_async_block_refunds(limiter, error):
    """Likewise in a coroutine, whoever drives it."""

    async def guarded():
        async with limiter.reserve(user="alice", tokens=600):
            raise error

    with pytest.raises(error):
        guarded().send(None)

    assert level(limiter) == left_by(error)


def test_generator_that_nobody_reads_on_keeps_what_it_had(limiter):
    """Who stops reading in the middle of the block has had what may have been paid for."""

    def stream():
        with limiter.reserve(user="alice", tokens=600):
            yield

    streaming = stream()
    next(streaming)
    assert level(limiter) == 400

    streaming.close()

    assert level(limiter) == 400


def test_cancelled_block_keeps_what_it_had(limiter):
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

    asyncio.run(main())

    assert level(limiter) == 400


def test_call_is_reserved_once(limiter):
    """It cannot be asked for again, be it refused or not."""
    call = limiter.try_reserve(user="alice", tokens=600)
    again = limiter.reserve(user="alice", tokens=600)
    for _ in range(2):
        with pytest.raises((BudgetExceeded, RuntimeError)), again:
            pass
    with pytest.raises(RuntimeError, match="a call is reserved once"):
        call.attempt()
    call.refund()
    assert level(limiter) == 1000


def test_exception_after_settling_changes_nothing(limiter):
    """What was settled stays settled, whatever happens then."""

    def fail_later():
        with limiter.reserve(user="alice", tokens=600) as call:
            call.settle(100)
            raise ValueError("later")

    with pytest.raises(ValueError, match="later"):
        fail_later()

    assert level(limiter) == 900


@pytest.mark.parametrize("usage", [None, "100", 1.5, True, math.nan, -1, 10**12 + 1])
def test_usage_that_is_no_number_leaves_the_estimate_spent(limiter, usage):
    """The call was made: an answer without usage must not make it free."""
    with (
        pytest.raises(InvalidValue, match="tokens must be a whole number from 0 to 10\\^12, got"),
        limiter.reserve(user="alice", tokens=600) as call,
    ):
        call.settle(usage)

    assert level(limiter) == 400
    assert not call.is_open


def test_usage_that_is_no_number_can_be_mended(limiter):
    """Whoever catches the error may settle still."""
    with limiter.reserve(user="alice", tokens=600) as call:
        with pytest.raises(InvalidValue):
            call.settle(None)
        call.settle(100)

    assert level(limiter) == 900


def test_refund_and_keep(limiter):
    """A call that was not made is given back; one whose usage nobody knows is kept; neither warns."""
    with limiter.reserve(user="alice", tokens=600) as call:
        call.refund()
    assert level(limiter) == 1000

    with limiter.reserve(user="alice", tokens=600) as call:
        call.keep()
    assert level(limiter) == 400


@pytest.mark.parametrize("first", ["settle", "refund", "keep"])
@pytest.mark.parametrize("second", ["settle", "refund", "keep"])
def test_settling_twice_is_an_error_and_changes_nothing(limiter, first, second):
    """A call is dealt with once, in whichever way."""

    def deal(how):
        getattr(call, how)(*([100] if how == "settle" else []))

    with limiter.reserve(user="alice", tokens=600) as call:
        deal(first)
        before = level(limiter)
        with pytest.raises(AlreadySettled):
            deal(second)

    assert level(limiter) == before


def test_of_two_threads_that_settle_one_wins(limiter):
    """However they race, one amount is charged and the other is refused."""
    together = threading.Barrier(2)

    def settle(call, tokens):
        together.wait(PATIENCE_S)
        try:
            call.settle(tokens)
        except AlreadySettled:
            return 0
        return tokens

    spent = 0
    with ThreadPoolExecutor(2) as pool:
        for _ in range(50):
            with limiter.reserve(user="alice", tokens=5) as call:
                charged = [future.result(PATIENCE_S) for future in [pool.submit(settle, call, n) for n in (1, 2)]]
            assert sorted(charged)[0] == 0
            spent += sum(charged)
            assert level(limiter) == 1000 - spent


def test_another_thread_may_settle(limiter):
    """A call belongs to no thread."""
    with ThreadPoolExecutor(1) as pool, limiter.reserve(user="alice", tokens=600) as call:
        pool.submit(call.settle, 100).result(PATIENCE_S)

    assert level(limiter) == 900


def test_call_guards_one_block(limiter):
    """A second block would be guarded by nothing, and is refused."""
    with limiter.reserve(user="alice", tokens=600) as call:
        call.settle(100)

    with pytest.raises(AlreadySettled, match="guards no further block"), call:
        pytest.fail("it has begun")

    async def again():
        async with call:
            pytest.fail("it has begun")

    with pytest.raises(AlreadySettled):
        asyncio.run(again())
    assert level(limiter) == 900


# --- what nobody settled ---------------------------------------------------------------------------------------


def line_of(function):
    """Return the number of the line on which a function's block begins: the second of its body."""
    return function.__code__.co_firstlineno + 1


def test_unsettled_block_warns_at_its_line(limiter):
    """The estimate counts as spent, and the warning names the file and line of the block."""

    def forgetful():
        with limiter.reserve(user="alice", tokens=600):
            pass

    with pytest.warns(Unsettled, match=r"estimate stays spent.*call\.keep\(\)") as told:
        forgetful()

    assert [(warning.filename, warning.lineno) for warning in told] == [(__file__, line_of(forgetful))]
    assert level(limiter) == 400


def test_unsettled_async_block_warns_at_its_line(limiter):
    """Likewise in a coroutine."""

    async def forgetful():
        async with limiter.reserve(user="alice", tokens=600):
            pass

    with pytest.warns(Unsettled) as told:
        asyncio.run(forgetful())

    assert [(warning.filename, warning.lineno) for warning in told] == [(__file__, line_of(forgetful))]
    assert level(limiter) == 400


def test_left_by_return_warns_too(limiter):
    """However a block is left without an exception, it is left."""

    def returns():
        with limiter.reserve(user="alice", tokens=600):
            return 1

    with pytest.warns(Unsettled):
        assert returns() == 1


def test_warning_may_be_an_error(limiter):
    """Where warnings are errors it is raised, and the estimate is spent all the same."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(Unsettled), limiter.reserve(user="alice", tokens=600) as call:
            pass

    assert level(limiter) == 400
    assert not call.is_open


def test_call_that_is_dropped_warns(limiter):
    """What ``try_reserve`` returned and nobody settled is told of when it is thrown away."""
    with pytest.warns(Unsettled):
        limiter.try_reserve(user="alice", tokens=600)

    assert level(limiter) == 400


def test_switch_is_a_truth_or_a_word():
    """What is on or off in the environment may be True or False here."""
    for off in (False, "off"):
        with Limiter(TOKENGUARD_PROVIDER_LIMITS=off) as limiter:
            assert not limiter._engine.config.provider_limits
    with pytest.raises(InvalidSetting, match="on or off, got '0'"):
        Limiter(TOKENGUARD_PROVIDER_LIMITS=0)


def test_settings_of_a_limiter_are_settings():
    """What a limiter takes has the names of the environment."""
    assert Settings.__annotations__.keys() < SETTINGS.keys()


def test_decision_is_as_good_as_its_word(limiter):
    """A call is true, a refusal is not, and says what it is in one line."""
    with limiter.reserve(user="alice", tokens=600) as call:
        call.keep()

    refused = limiter.try_reserve(user="alice", tokens=600)

    assert call
    assert not refused
    assert repr(refused) == "<Decision refused by user:alice on tokens, waiting does not help>"
    assert repr(call.decision) == "<Decision allowed>"


def test_reprs_of_budgets_and_of_what_is_closed():
    """A budget is shown in one line, and a limiter that is closed says so."""
    with Limiter() as limiter:
        budget = limiter.budgets.set("user", "bob", capacity=60, refill_per_sec=0.5)
        assert repr(budget) == "<BudgetState user:bob on tokens: 60/60, 0.5/s, explicit>"
    assert "closed" in repr(limiter)


# --- refusals --------------------------------------------------------------------------------------------------


def test_refusal_raises_and_changes_no_bucket():
    """It tells whose budget it was, when to try again, and how all buckets are; none is touched."""
    with Limiter(
        "memory://", CAP_GLOBAL=10_000, RATE_GLOBAL=0, CAP_TEAM=500, RATE_TEAM=0, CAP_USER=1000
    ) as limiter:
        with limiter.reserve(user="alice", team="red", tokens=400) as call:
            call.keep()
        before = limiter.peek(user="alice", team="red")

        with (
            pytest.raises(BudgetExceeded) as refused,
            limiter.reserve(user="alice", team="red", tokens=400),
        ):
            pytest.fail("it has begun")

        after = limiter.peek(user="alice", team="red")
    assert [(state.name, state.level) for state in after[:2]] == [
        (state.name, state.level) for state in before[:2]
    ]
    assert refused.value.scope == "team:red"
    assert refused.value.retry_after is None
    assert [str(state.name.scope) for state in refused.value.decision.buckets] == [
        "global:*",
        "team:red",
        "user:alice",
    ]
    assert str(refused.value) == (
        "Budget used up for team:red on tokens: limit 500, remaining 100, requested 400. It does not refill by "
        "itself. This is a TokenGuard budget, not a limit of the provider."
    )


def test_refusal_tells_when_to_try_again(limiter):
    """A budget that refills says when it has enough."""
    limiter.budgets.set("user", "alice", capacity=1000, refill_per_sec=1, level=0)

    with pytest.raises(BudgetExceeded, match="Please try again in 8m") as refused:
        limiter.reserve(user="alice", tokens=500).__enter__()

    assert 499 < refused.value.retry_after <= 500


def test_request_that_is_too_large_says_so(limiter):
    """Twice what a bucket holds it will never let pass, and waiting is of no use."""
    with pytest.raises(BudgetExceeded, match="Waiting does not help") as refused:
        limiter.reserve(user="alice", tokens=2001, wait=math.inf).__enter__()

    assert refused.value.retry_after is None


def test_try_reserve_returns_the_refusal(limiter):
    """It is a decision, not an exception; else it is a call, which is reserved already."""
    call = limiter.try_reserve(user="alice", tokens=600)
    assert isinstance(call, Call)
    assert level(limiter) == 400

    refused = limiter.try_reserve(user="alice", tokens=600)
    assert isinstance(refused, Decision)
    assert not refused.allowed
    assert str(refused.binding.name.scope) == "user:alice"

    with call:
        call.settle(100)
    assert level(limiter) == 900


def test_try_reserve_async_returns_the_refusal(limiter):
    """Likewise in a coroutine."""

    async def main():
        call = await limiter.try_reserve_async(user="alice", tokens=600)
        assert isinstance(await limiter.try_reserve_async(user="alice", tokens=600), Decision)
        async with call:
            call.settle(100)

    asyncio.run(main())

    assert level(limiter) == 900


def test_refusal_travels_between_processes(limiter):
    """An error that is pickled or copied tells the same."""
    with pytest.raises(BudgetExceeded) as refused:
        limiter.reserve(user="alice", tokens=2001).__enter__()

    for same in (pickle.loads(pickle.dumps(refused.value)), copy.deepcopy(refused.value)):
        assert isinstance(same, BudgetExceeded)
        assert same.decision == refused.value.decision
        assert str(same) == str(refused.value)


def test_errors_are_of_one_tree():
    """Whoever catches TokenGuardError catches what is raised on purpose; a bad value is a ValueError, too."""
    for error in (BudgetExceeded, AlreadySettled, InvalidValue, InvalidSetting, BudgetNotFound):
        assert issubclass(error, tokenguard.TokenGuardError)
    assert issubclass(InvalidSetting, ValueError)
    assert issubclass(Unsettled, UserWarning)


# --- bad arguments ---------------------------------------------------------------------------------------------

SURROGATE = "\ud800"


@pytest.mark.parametrize(
    ("arguments", "field", "message"),
    [
        ({"user": ""}, "user", "user must be 1 to 256 bytes of UTF-8, got 0"),
        ({"user": "a" * 257}, "user", "got 257"),
        ({"user": None}, "user", "user must be a string, got None"),
        ({"user": 7}, "user", "user must be a string, got 7"),
        ({"user": ["alice"]}, "user", "user must be a string, got ['alice']"),
        ({"user": b"alice"}, "user", "user must be a string, got b'alice'"),
        ({"user": SURROGATE}, "user", "user must be valid UTF-8, got a lone surrogate"),
        ({"user": "a\x1fb"}, "user", "user must not contain control characters"),
        ({"user": " alice"}, "user", "user must not begin or end with white space"),
        ({"team": ""}, "team", "team must be 1 to 256 bytes"),
        ({"team": {}}, "team", "team must be a string, got {}"),
        ({"role": 1.5}, "role", "role must be a string"),
        ({"rolegroup": SURROGATE}, "rolegroup", "rolegroup must be valid UTF-8"),
        ({"model": 4}, "model", "model must be a string, got 4"),
        ({"model": ["gpt"]}, "model", "model must be a string, got ['gpt']"),
        ({"model": "gpt-4o "}, "model", "model must not begin or end with white space"),
        ({"model": "m" * 257}, "model", "model must be 1 to 256 bytes"),
        ({"prompt": 2}, "prompt", "prompt must be at most tokens, 1, got 2"),
        ({"prompt": -1}, "prompt", "prompt must be a whole number from 0 to 10^12, got -1"),
        ({"tokens": -1}, "tokens", "tokens must be a whole number from 0 to 10^12, got -1"),
        ({"tokens": 10**12 + 1}, "tokens", "got 1000000000001"),
        ({"tokens": 1.0}, "tokens", "got 1.0"),
        ({"tokens": True}, "tokens", "got True"),
        ({"tokens": None}, "tokens", "got None"),
        ({"tokens": "5"}, "tokens", "got '5'"),
        ({"wait": -0.1}, "wait", "wait must be seconds, at least 0, got -0.1"),
        ({"wait": math.nan}, "wait", "got nan"),
        ({"wait": True}, "wait", "got True"),
        ({"wait": False}, "wait", "got False"),
        ({"wait": None}, "wait", "got None"),
        ({"wait": "5"}, "wait", "got '5'"),
    ],
)
def test_bad_argument_is_named(limiter, arguments, field, message):
    """What cannot be used is refused before anything is reserved, and the message says what is allowed."""
    given = {"user": "alice", "tokens": 1, **arguments}

    with pytest.raises(InvalidValue) as refused:
        limiter.reserve(**given)

    assert refused.value.field == field
    assert message in str(refused.value)
    with pytest.raises(InvalidValue):
        limiter.try_reserve(**given)
    if field not in ("tokens", "prompt", "wait"):
        given.pop("tokens")
        with pytest.raises(InvalidValue, match=field):
            limiter.peek(**given)


@pytest.mark.parametrize("wait", [0, 0.0, 1, 10**400, math.inf])
def test_wait_may_be_any_number_of_seconds(limiter, wait):
    """Whole numbers, fractions, and for ever."""
    with limiter.reserve(user="alice", tokens=600, wait=wait) as call:
        call.refund()


@pytest.mark.parametrize(
    ("url", "settings", "message"),
    [
        (None, {}, "got None"),
        (b"memory://", {}, "got b'memory://'"),
        ("", {}, "url must be memory://, file:///a/path, or a URL of Redis such as redis://host:6379/0; got ''"),
        ("memory", {}, "got 'memory'"),
        ("memory://here", {}, "got 'memory://here'"),
        ("file:state", {}, "got 'file:state'"),
        ("file://elsewhere/state", {}, "got 'file://elsewhere/state'"),
        ("file://[::1/state", {}, "got 'file://[::1/state'"),
        ("file:///a?b", {}, "got 'file:///a?b'"),
        ("file:///", {}, "must be the path of a file"),
        (f"file:///tmp/{SURROGATE}", {}, "must be the path of a file"),
        ("file:///no/such/folder/state", {}, "there is no folder /no/such/folder"),
        ("http://localhost", {}, "url must be redis://"),
        ("file:///no/such/folder/state", {}, "url: "),
        ("redis://localhost:70000", {}, "a port is no number from 1 to 65535"),
        ("memory://", {"CAP_USR": 5}, "CAP_USR is not a setting: did you mean CAP_USER?"),
        ("memory://", {"cap_user": 5}, "cap_user is not a setting: did you mean CAP_USER?"),
        ("memory://", {"capacity": 5}, "capacity is not a setting: known are OPENAI_API_KEY"),
        ("memory://", {"CAP_USER": 0}, "CAP_USER must be a whole number from 1 to"),
        ("memory://", {"CAP_USER": True}, "got 'True'"),
        ("memory://", {"RATE_USER": math.nan}, "RATE_USER must be a number from 0 to 10^12, got 'nan'"),
        ("memory://", {"TOKENGUARD_REALM": "staging"}, "REDIS_URL is not"),
        ("redis://a", {"REDIS_URL": "redis://b"}, "REDIS_URL is what the URL says: give that"),
        ("memory://", {"TOKENGUARD_WORKERS": 4}, "TOKENGUARD_WORKERS is a setting of the server's"),
        ("file:///a", {"TOKENGUARD_STATE": "/b"}, "TOKENGUARD_STATE is what the URL says"),
    ],
)
def test_bad_url_or_setting_is_named(url, settings, message):
    """A typo is an error with what is allowed, never a limit that does not hold."""
    with pytest.raises(InvalidSetting) as refused:
        Limiter(url, **settings)

    assert message in str(refused.value)


@pytest.mark.parametrize(
    "url",
    [
        "redis://:hunter2@host:0",
        "redis://user:hunter2@host:70000",
        "redis//:hunter2@host",
        "http://user:hunter2@host",
        "file://user:hunter2@host/state",
        "memory://user:hunter2@host",
    ],
)
def test_password_is_not_shown(url):
    """A URL that cannot be used is not repeated where it may hold a password."""
    with pytest.raises(InvalidSetting) as refused:
        Limiter(url)

    assert "hunter2" not in str(refused.value)


def test_password_is_not_shown_of_a_url_that_can_be_used():
    """Nor by the limiter itself."""
    with Limiter("redis://user:hunter2@localhost:1/0") as limiter:
        assert "hunter2" not in repr(limiter)
        assert "localhost" in repr(limiter)


def test_limiter_from_the_environment(monkeypatch, tmp_path):
    """It goes by what the proxy goes by, ``.env`` included."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".env").write_text("CAP_USER=77\nRATE_USER=0\n")
    monkeypatch.setenv("CAP_TEAM", "55")

    with Limiter.from_env() as limiter:
        assert [state.limit for state in limiter.peek(user="alice", team="red")][1:] == [55, 77]

    monkeypatch.setenv("CAP_TEEM", "55")
    with pytest.raises(InvalidSetting, match="CAP_TEEM"):
        Limiter.from_env()


# --- budgets ---------------------------------------------------------------------------------------------------


def test_budget_is_set_listed_and_deleted(limiter):
    """A change binds the very next call, and what was used stays used."""
    with limiter.reserve(user="alice", tokens=600) as call:
        call.settle(600)

    state = limiter.budgets.set("user", "alice", capacity=2000, refill_per_sec=0)

    assert (state.scope, state.id, state.meter, state.model) == ("user", "alice", "tokens", None)
    assert (state.capacity, state.refill_per_sec, state.max_debt, state.level) == (2000, 0, 20_000, 1400)
    assert state.source == "explicit"
    assert limiter.budgets.list() == [state] == [limiter.budgets.get("user", "alice")]
    with limiter.reserve(user="alice", tokens=1400) as call:
        call.refund()

    assert limiter.budgets.delete("user", "alice").capacity == 1000
    assert limiter.budgets.list() == []
    assert limiter.budgets.get("user", "alice").source == "default"
    assert level(limiter) == 400


def test_budget_that_is_not_there(limiter):
    """What was never set cannot be removed, and what is unlimited has no budget."""
    with pytest.raises(BudgetNotFound):
        limiter.budgets.delete("user", "alice")
    with pytest.raises(BudgetNotFound, match="unlimited"):
        limiter.budgets.get("role", "dev")
    limiter.budgets.set("role", "dev", capacity=10, refill_per_sec=1)
    assert limiter.budgets.delete("role", "dev") is None


def test_budget_that_was_learned_is_shown_and_removed(limiter):
    """By its source, as it is listed; one that was set for the same model stays."""
    ours = limiter.budgets.set("global", capacity=10, refill_per_sec=0, model="gpt-4o")
    limiter._engine.budgets.put(learned(60))
    (state,) = (state for state in limiter.budgets.list() if state.source == "headers")

    which = {"meter": state.meter, "model": state.model, "source": state.source}
    assert limiter.budgets.get("global", **which).capacity == 60
    assert limiter.budgets.delete("global", **which) is None
    assert limiter.budgets.list() == [ours]


def test_list_is_whole(limiter):
    """However many there are, all are told of, once, in the order of their names."""
    for number in range(1001, 0, -1):
        limiter.budgets.set("role", f"{number:04}", capacity=number, refill_per_sec=0)

    assert [state.capacity for state in limiter.budgets.list()] == list(range(1, 1002))


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"scope": "users"}, "scope"),
        ({"scope": None}, "scope"),
        ({"scope": []}, "scope"),
        ({"id": None}, "id"),
        ({"id": 5}, "id"),
        ({"id": SURROGATE}, "id"),
        ({"scope": "global"}, "id"),
        ({"capacity": 0}, "capacity"),
        ({"capacity": True}, "capacity"),
        ({"capacity": 1.5}, "capacity"),
        ({"capacity": math.nan}, "capacity"),
        ({"capacity": 10**12 + 1}, "capacity"),
        ({"refill_per_sec": -1}, "refill_per_sec"),
        ({"refill_per_sec": math.nan}, "refill_per_sec"),
        ({"refill_per_sec": math.inf}, "refill_per_sec"),
        ({"refill_per_sec": None}, "refill_per_sec"),
        ({"refill_per_sec": True}, "refill_per_sec"),
        ({"meter": "usd"}, "meter"),
        ({"meter": "gate"}, "meter"),
        ({"model": ""}, "model"),
        ({"model": SURROGATE}, "model"),
        ({"max_debt": -1}, "max_debt"),
        ({"max_debt": 1.5}, "max_debt"),
        ({"level": 11}, "level"),
        ({"level": math.nan}, "level"),
    ],
)
def test_bad_budget_is_named(limiter, arguments, field):
    """The message is in the words of Python, not in those of HTTP, and nothing is changed."""
    given = {"scope": "user", "id": "alice", "capacity": 10, "refill_per_sec": 1, **arguments}

    with pytest.raises(InvalidValue) as refused:
        limiter.budgets.set(given.pop("scope"), given.pop("id"), **given)

    assert refused.value.field == field
    assert str(refused.value).startswith(field)
    assert limiter.budgets.list() == []


def test_budgets_of_models_and_requests(limiter):
    """A budget of one model's requests binds calls of that model, and no refund gives a request back."""
    limiter.budgets.set("user", "alice", capacity=1, refill_per_sec=0, meter="requests", model="gpt")

    with limiter.reserve(user="alice", tokens=1, model="gpt") as call:
        call.refund()

    assert isinstance(limiter.try_reserve(user="alice", tokens=1, model="gpt"), Decision)
    with limiter.reserve(user="alice", tokens=1, model="other") as call:
        call.refund()


# --- the decorator ---------------------------------------------------------------------------------------------

ANSWER = SimpleNamespace(usage=SimpleNamespace(total_tokens=30))


def test_guarded_function_is_charged_what_its_answer_tells(limiter):
    """The usage of an answer as the openai SDK's is settled."""

    @limiter.guard(user="alice", tokens=100)
    def ask(prompt):
        """Ask."""
        assert level(limiter) == 900
        return ANSWER

    assert ask("x") is ANSWER
    assert (ask.__name__, ask.__doc__) == ("ask", "Ask.")
    assert level(limiter) == 970


def test_guarded_coroutine_function_stays_one(limiter):
    """It is awaited inside of the call."""

    @limiter.guard(user="alice", tokens=100)
    async def ask():
        await asyncio.sleep(0)
        assert level(limiter) == 900
        return ANSWER

    assert asyncio.iscoroutinefunction(ask)
    assert asyncio.run(ask()) is ANSWER
    assert level(limiter) == 970


def test_arguments_may_be_reckoned(limiter):
    """Who calls, and what it costs, may depend on the call; so may what it took on what it returned."""

    @limiter.guard(
        user=lambda who, **_: who,
        team=lambda *_, **__: None,
        model=lambda *_, **__: "m",
        tokens=lambda _, text: len(text),
        used=len,
    )
    def echo(who, text):
        return text[:3]

    assert echo("bob", text="x" * 20) == "xxx"
    assert level(limiter, "bob") == 997


def test_answer_without_usage_costs_the_estimate(limiter):
    """Nobody can tell, and so nobody is warned."""
    for answer in (None, "text", SimpleNamespace(usage=None), SimpleNamespace(usage=SimpleNamespace())):
        limiter.guard(user="alice", tokens=100)(lambda answer=answer: answer)()

    assert level(limiter) == 600


def test_guarded_function_that_fails_is_refunded(limiter):
    """An exception is as good as no call."""

    @limiter.guard(user="alice", tokens=100)
    def fail():
        raise ValueError("failed")

    with pytest.raises(ValueError, match="failed"):
        fail()

    assert level(limiter) == 1000


@pytest.mark.parametrize("used", [lambda answer: answer["usage"], lambda _: -1, lambda _: "5"])
def test_usage_that_cannot_be_told_leaves_the_estimate_spent(limiter, used):
    """An error in ``used`` is told, and does not make the call free."""
    ask = limiter.guard(user="alice", tokens=100, used=used)(dict)

    with pytest.raises((KeyError, InvalidValue)):
        ask()

    assert level(limiter) == 900


def test_guarded_function_is_refused(limiter):
    """It is not called at all."""
    ask = limiter.guard(user="alice", tokens=3000)(lambda: pytest.fail("called"))

    with pytest.raises(BudgetExceeded):
        ask()


def test_methods_can_be_guarded(limiter):
    """What is reckoned is given the object, too."""

    class Agent:
        name = "bob"

        @limiter.guard(user=lambda self: self.name, tokens=100)
        def ask(self):
            return ANSWER

    Agent().ask()

    assert level(limiter, "bob") == 970


def test_generators_are_not_guarded(limiter):
    """They run on after they were called, and so that is refused where it is written."""

    def stream():
        yield

    async def stream_soon():
        yield

    for generator in (stream, stream_soon, functools.partial(stream)):
        with pytest.raises(TypeError, match=r"is a generator.*with limiter\.reserve"):
            limiter.guard(user="alice", tokens=1)(generator)


def test_plain_function_that_returns_a_coroutine_is_not_guarded(limiter):
    """Of what it is to take nothing would be known, and so it is told before anything is sent."""

    async def ask():
        pytest.fail("sent")

    guarded = limiter.guard(user="alice", tokens=100)(lambda: ask())

    with pytest.raises(TypeError, match="returns a coroutine: guard an `async def` that awaits it"):
        guarded()
    assert level(limiter) == 1000


# --- waiting ---------------------------------------------------------------------------------------------------


def test_waiting_thread_is_served_when_tokens_are_given_back(limiter):
    """It sleeps until somebody settles for less, and then has what it asked for."""
    held = limiter.try_reserve(user="alice", tokens=1000)
    with ThreadPoolExecutor(1) as pool:
        served = pool.submit(limiter.try_reserve, user="alice", tokens=600, wait=PATIENCE_S)
        until(lambda: waiting(limiter))
        assert not served.done()

        held.settle(100)

        call = served.result(PATIENCE_S)
    assert isinstance(call, Call)
    call.settle(600)
    assert level(limiter) == 300
    assert not waiting(limiter)


def test_waiting_task_is_served_when_a_thread_gives_back(limiter):
    """A task is woken in its own loop, from any thread."""
    held = limiter.try_reserve(user="alice", tokens=1000)

    async def main():
        async with limiter.reserve(user="alice", tokens=600, wait=PATIENCE_S) as call:
            call.settle(600)

    with ThreadPoolExecutor(1) as pool:
        served = pool.submit(asyncio.run, main())
        until(lambda: waiting(limiter))
        held.refund()
        served.result(PATIENCE_S)

    assert level(limiter) == 400


def test_bucket_that_fills_up_serves_who_waits(limiter):
    """A wait of milliseconds ends with the tokens, and not before the bucket had them."""
    limiter.budgets.set("user", "alice", capacity=1000, refill_per_sec=100_000, level=0)

    with limiter.reserve(user="alice", tokens=500, wait=PATIENCE_S) as call:
        assert call.decision.buckets[-1].level >= 0
        call.settle(500)

    async def main():
        limiter.budgets.set("user", "bob", capacity=1000, refill_per_sec=100_000, level=0)
        async with limiter.reserve(user="bob", tokens=500, wait=PATIENCE_S) as call:
            call.settle(500)

    asyncio.run(main())


@pytest.mark.parametrize("change", ["capacity", "level", "delete"])
def test_change_of_a_budget_serves_who_waits(limiter, change):
    """Whoever waits for a budget hears when it becomes larger, or is no more."""
    limiter.budgets.set("user", "alice", capacity=100, refill_per_sec=0, level=0)
    with ThreadPoolExecutor(1) as pool:
        served = pool.submit(limiter.try_reserve, user="alice", tokens=50, wait=PATIENCE_S)
        until(lambda: waiting(limiter))

        if change == "capacity":
            limiter.budgets.set("user", "alice", capacity=200, refill_per_sec=0)
        elif change == "level":
            limiter.budgets.set("user", "alice", capacity=100, refill_per_sec=0, level=100)
        else:
            limiter.budgets.delete("user", "alice")

        served.result(PATIENCE_S).refund()


def test_waiting_in_vain_tells_the_last_refusal(limiter):
    """When the time is over it is refused like anybody, and stands in no line."""
    held = limiter.try_reserve(user="alice", tokens=1000)

    async def main():
        with pytest.raises(BudgetExceeded, match="Budget used up for user:alice"):
            await limiter.reserve(user="alice", tokens=10, wait=0.002).__aenter__()

    assert not limiter.try_reserve(user="alice", tokens=10, wait=0.002).allowed
    asyncio.run(main())

    held.refund()
    assert not waiting(limiter)
    assert level(limiter) == 1000


def test_waiting_in_vain_behind_others_is_a_refusal(limiter):
    """Though there may be enough for it, that is for those ahead, and the refusal can be told."""
    held = limiter.try_reserve(user="alice", tokens=600)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(limiter.try_reserve, user="alice", tokens=800, wait=PATIENCE_S)
        until(lambda: waiting(limiter))

        with pytest.raises(BudgetExceeded, match="remaining 400, requested 10") as refused:
            limiter.reserve(user="alice", tokens=10, wait=0.002).__enter__()

        async def main():
            return await limiter.try_reserve_async(user="alice", tokens=10, wait=0.002)

        assert refused.value.scope == "user:alice"
        assert not asyncio.run(main()).allowed
        held.refund()
        first.result(PATIENCE_S).refund()


def test_cancelled_task_waits_no_more(limiter):
    """What it would have had goes to the next."""

    async def main():
        held = limiter.try_reserve(user="alice", tokens=1000)
        first, second = (
            asyncio.create_task(limiter.try_reserve_async(user="alice", tokens=1000, wait=PATIENCE_S))
            for _ in range(2)
        )
        await asyncio.sleep(0)
        assert waiting(limiter) == 2
        held.refund()
        first.cancel()  # it has been told already

        call = await second
        assert first.cancelled()
        call.refund()

    asyncio.run(main())

    assert level(limiter) == 1000
    assert not waiting(limiter)


def test_one_user_that_waits_does_not_hold_up_another(limiter):
    """Alice's empty budget is Alice's affair."""
    held = limiter.try_reserve(user="alice", tokens=1000)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(limiter.try_reserve, user="alice", tokens=1, wait=PATIENCE_S)
        until(lambda: waiting(limiter))

        limiter.try_reserve(user="bob", tokens=1000, wait=PATIENCE_S).keep()

        assert not first.done()
        held.refund()
        first.result(PATIENCE_S).keep()


def test_event_loop_that_was_closed_holds_up_nobody(limiter):
    """A task that waited there can never be told; whoever comes behind it is served."""
    held = limiter.try_reserve(user="alice", tokens=1000)
    loop = asyncio.new_event_loop()
    lost = limiter.try_reserve_async(user="alice", tokens=1000, wait=PATIENCE_S)
    task = loop.create_task(lost)
    loop.run_until_complete(asyncio.sleep(0))
    loop.run_until_complete(asyncio.sleep(0))
    assert waiting(limiter) == 1
    loop.close()
    held.refund()

    limiter.try_reserve(user="alice", tokens=1000, wait=PATIENCE_S).refund()

    task._log_destroy_pending = False
    lost.close()


def test_threads_and_tasks_are_served_once_each_and_in_order(limiter):
    """200 of them wait for one budget: first come, first served, nobody early, and no token is lost."""
    held = limiter.try_reserve(user="alice", tokens=1000)
    served = []

    def wait_here(number):
        with limiter.reserve(user="alice", tokens=1000, wait=PATIENCE_S) as call:
            served.append(number)
            call.settle(number % 2)

    async def wait_soon(number):
        async with limiter.reserve(user="alice", tokens=999, wait=PATIENCE_S) as call:
            served.append(number)
            await asyncio.sleep(0)
            call.settle(0)

    def loop_of(started):
        asyncio.set_event_loop(loop := asyncio.new_event_loop())
        started.append(loop)
        loop.run_forever()
        loop.close()
        asyncio.set_event_loop(None)

    limiter.budgets.set("user", "alice", capacity=1000, refill_per_sec=0, max_debt=0)
    started = []
    thread = threading.Thread(target=loop_of, args=(started,))
    thread.start()
    until(lambda: started and started[0].is_running())
    with ThreadPoolExecutor(100) as pool:
        everybody = []
        for number in range(200):
            if number % 2:
                everybody.append(asyncio.run_coroutine_threadsafe(wait_soon(number), started[0]))
            else:
                everybody.append(pool.submit(wait_here, number))
            until(lambda number=number: waiting(limiter) == number + 1)
        assert not served

        held.refund()

        for one in everybody:
            one.result(PATIENCE_S)
    started[0].call_soon_threadsafe(started[0].stop)
    thread.join(PATIENCE_S)
    assert served == list(range(200))
    assert level(limiter) == 1000
    assert not waiting(limiter)


def test_crowd_conserves_every_token(limiter):
    """Threads and tasks that wait, fail and settle at any amount leave what they did not use, to the unit."""
    limiter.budgets.set("user", "alice", capacity=100_000, refill_per_sec=0, level=2000)
    spent = []

    def use_up(call, number):
        if number % 5 == 0:
            raise ValueError("failed")
        call.settle(number % 13)
        spent.append(number % 13)

    def thread(number):
        with limiter.reserve(user="alice", tokens=500, wait=PATIENCE_S) as call:
            use_up(call, number)

    async def task(number):
        async with limiter.reserve(user="alice", tokens=700, wait=PATIENCE_S) as call:
            await asyncio.sleep(0)
            use_up(call, number)

    async def tasks():
        return await asyncio.gather(*map(task, range(100)), return_exceptions=True)

    with ThreadPoolExecutor(26) as pool:
        loop = pool.submit(asyncio.run, tasks())
        threads = [pool.submit(thread, number) for number in range(100)]
        failed = [error for error in loop.result(PATIENCE_S) if error]
        failed += [error for error in (one.exception(PATIENCE_S) for one in threads) if error]

    assert [type(error) for error in failed] == [ValueError] * 40
    assert len(spent) == 160
    assert level(limiter) == 2000 - sum(spent)
    assert not waiting(limiter)


# --- its life --------------------------------------------------------------------------------------------------


def test_closed_limiter_is_of_no_use():
    """Whatever is asked of it then, it says that it is closed; closing it again does nothing."""
    limiter = Limiter("memory://", TOKENGUARD_BUCKETS=100)
    early = limiter.reserve(user="alice", tokens=1)
    guarded = limiter.guard(user="alice", tokens=1)(lambda: None)
    limiter.close()

    for ask in (
        early.__enter__,
        guarded,
        lambda: limiter.reserve(user="alice", tokens=1),
        lambda: limiter.try_reserve(user="alice", tokens=1),
        lambda: limiter.peek(user="alice"),
        lambda: limiter.budgets.list(),
        lambda: limiter.budgets.set("user", "alice", capacity=1, refill_per_sec=0),
        lambda: limiter.budgets.get("user", "alice"),
        lambda: limiter.budgets.delete("user", "alice"),
    ):
        with pytest.raises(RuntimeError, match="the limiter is closed"):
            ask()
    limiter.close()
    asyncio.run(limiter.aclose())


def test_open_call_can_be_settled_after_closing(limiter):
    """Whoever closes too early does no harm to the calls under way."""
    with limiter.reserve(user="alice", tokens=600) as call:
        limiter.close()
        call.settle(100)

    assert not call.is_open


def test_closing_wakes_all_who_wait(limiter):
    """They are told that it is closed, wherever they stand in the line."""
    held = limiter.try_reserve(user="alice", tokens=1000)

    async def wait():
        await limiter.try_reserve_async(user="alice", tokens=1, wait=3 * PATIENCE_S)

    with ThreadPoolExecutor(3) as pool:
        those = [pool.submit(limiter.try_reserve, user="alice", tokens=1, wait=3 * PATIENCE_S) for _ in range(2)]
        those.append(pool.submit(asyncio.run, wait()))
        until(lambda: waiting(limiter) == 3)

        limiter.close()

        for one in those:
            with pytest.raises(RuntimeError, match="the limiter is closed"):
                one.result(PATIENCE_S)
    held.refund()


def test_async_context_closes_it():
    """``async with Limiter(...)`` closes it at its end, as ``with`` does."""

    async def main():
        async with Limiter("memory://", TOKENGUARD_BUCKETS=100) as limiter:
            (await limiter.try_reserve_async(user="alice", tokens=1)).settle(1)
        with pytest.raises(RuntimeError):
            limiter.peek(user="alice")
        await limiter.aclose()

    asyncio.run(main())


def test_state_goes_on_in_the_next_limiter(tmp_path):
    """What is in a file is there when it is opened again: budgets and levels."""
    url = f"file://{tmp_path}/state"
    with Limiter(url, **FREE, CAP_USER=1000, RATE_USER=0, TOKENGUARD_BUCKETS=100) as limiter:
        limiter.budgets.set("user", "alice", capacity=500, refill_per_sec=0)
        with limiter.reserve(user="alice", tokens=200) as call:
            call.settle(150)

    with Limiter(url, **FREE, CAP_USER=1000, RATE_USER=0, TOKENGUARD_BUCKETS=100) as limiter:
        assert (level(limiter), limiter.budgets.get("user", "alice").capacity) == (350, 500)


def test_two_limiters_do_not_share_a_file(tmp_path):
    """The second is refused, and says why, until the first is closed."""
    url = f"file://{tmp_path}/a%20state"
    first = Limiter(url, TOKENGUARD_BUCKETS=100)

    with pytest.raises(InvalidSetting, match=r"a state by another server that runs"):
        Limiter(url, TOKENGUARD_BUCKETS=100)

    first.close()
    Limiter(url, TOKENGUARD_BUCKETS=100).close()


def test_closed_limiter_leaves_its_file_to_the_next(tmp_path):
    """A budget that is set through it then would overwrite what is somebody else's by now."""
    url = f"file://{tmp_path}/state"
    first = Limiter(url, TOKENGUARD_BUCKETS=100)
    first.close()
    with Limiter(url, TOKENGUARD_BUCKETS=100) as second:
        second.budgets.set("user", "alice", capacity=5, refill_per_sec=0)
        with pytest.raises(RuntimeError):
            first.budgets.set("user", "bob", capacity=6, refill_per_sec=0)

    with Limiter(url, TOKENGUARD_BUCKETS=100) as third:
        assert [state.id for state in third.budgets.list()] == ["alice"]


def test_forgotten_limiter_is_closed(tmp_path):
    """Once nobody has it, its file is free, and all that was spent is in it."""
    url = f"file://{tmp_path}/state"

    def spend():
        limiter = Limiter(url, **FREE, CAP_USER=1000, RATE_USER=0, TOKENGUARD_BUCKETS=100)
        with limiter.reserve(user="alice", tokens=600) as call:
            call.settle(600)

    spend()

    with Limiter(url, **FREE, CAP_USER=1000, RATE_USER=0, TOKENGUARD_BUCKETS=100) as limiter:
        assert level(limiter) == 400


def test_call_keeps_a_forgotten_limiter_open(tmp_path):
    """In one line, the limiter lives for as long as its call, and what that took is saved."""
    url = f"file://{tmp_path}/state"
    settings = {**FREE, "CAP_USER": 1000, "RATE_USER": 0, "TOKENGUARD_BUCKETS": 100}

    with Limiter(url, **settings).reserve(user="alice", tokens=600) as call:
        gc.collect()
        with pytest.raises(InvalidSetting):
            Limiter(url, **settings)
        call.settle(500)
    del call

    Limiter(url, **settings).budgets.set("user", "bob", capacity=7, refill_per_sec=0)
    with Limiter(url, **settings) as limiter:
        assert level(limiter) == 500
        assert limiter.budgets.get("user", "bob").capacity == 7
