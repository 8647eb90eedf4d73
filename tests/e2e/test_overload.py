"""More callers than connections: who waits, for how long, and what the others are told."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest

from tests.e2e.conftest import DRIVERS, OUR_KEY
from tests.e2e.fake_openai import JSON, completion, usage_of

MESSAGES = [{"role": "user", "content": "Say hello"}]


@pytest.fixture(params=DRIVERS)
def narrow(request, tmp_path, upstream_url):
    """A server of each driver with two connections to the provider, and little patience."""
    with DRIVERS[request.param](
        tmp_path,
        OPENAI_API_KEY=OUR_KEY,
        OPENAI_BASE_URL=upstream_url,
        CAP_USER=10**6,
        RATE_USER=0,
        CAP_GLOBAL="unlimited",
        TOKENGUARD_MAX_CONNECTIONS=2,
        TOKENGUARD_QUEUE_TIMEOUT_S="0.3",
    ) as server:
        yield server


@pytest.fixture
def held(fake, upstream_loop):
    """Makes the provider hold all answers back: returns what tells that two calls have come, and lets them go."""
    two_came, go_on = threading.Event(), asyncio.Event()

    async def script(reply):
        if fake.open_replies == 2:
            two_came.set()
        await go_on.wait()
        await reply.whole(200, JSON, completion(reply.received, usage_of(10, 20)))

    fake.script = script
    yield two_came, lambda: upstream_loop.call_soon_threadsafe(go_on.set)
    upstream_loop.call_soon_threadsafe(go_on.set)


def ask(server, user):
    return server.client(user).chat.completions.create(model="m", messages=MESSAGES)


def test_caller_who_finds_no_connection_is_told_so_and_pays_nothing(narrow, held, user):
    """Whoever waits too long for a connection gets a 503 with Retry-After; those who have one are served."""
    two_came, let_go = held
    with ThreadPoolExecutor(2) as pool:
        served = [pool.submit(ask, narrow, f"{user}-served") for _ in range(2)]
        assert two_came.wait(10)
        with pytest.raises(openai.InternalServerError) as raised:
            ask(narrow, user)
        assert raised.value.status_code == 503
        assert raised.value.code == "overloaded"
        assert raised.value.response.headers["retry-after"] == "1"
        assert narrow.level("user", user) == 10**6
        let_go()
        assert [call.result(10).usage.total_tokens for call in served] == [30, 30]
    assert ask(narrow, user).usage.total_tokens == 30


def test_crowd_does_not_pile_up(narrow, held, fake, user):
    """Of a crowd no more wait than there are connections: the others are told at once, and no token is lost."""
    two_came, let_go = held
    with ThreadPoolExecutor(24) as pool:
        first = [pool.submit(ask, narrow, user) for _ in range(2)]
        assert two_came.wait(10)
        crowd = [pool.submit(ask, narrow, user) for _ in range(20)]
        refused = [call.exception(10) for call in crowd]
        assert all(isinstance(error, openai.InternalServerError) for error in refused)
        assert {error.status_code for error in refused} == {503}
        assert len(fake.received) == 2
        let_go()
        assert [call.result(10).usage.total_tokens for call in first] == [30, 30]
    assert narrow.level("user", user) == 10**6 - 60
    assert "tokenguard_reservations_open 0.0" in httpx.get(f"{narrow.url}/metrics").text
