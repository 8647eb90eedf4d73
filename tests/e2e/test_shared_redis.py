"""Servers that share a Redis, as their operators and callers see them."""

import json

import httpx
import openai
import pytest

from tests.e2e.conftest import DRIVERS, OUR_KEY
from tests.nodes import until
from tests.redis_servers import RedisServer

PASSWORD = "correct-horse"
ASK = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "Hello"}]}


@pytest.fixture
def redis():
    """A server with a password, which the test may kill."""
    with RedisServer("--requirepass", PASSWORD, login={"password": PASSWORD}) as server:
        yield server


@pytest.fixture
def settings(redis, upstream_url):
    return {
        "OPENAI_API_KEY": OUR_KEY,
        "OPENAI_BASE_URL": upstream_url,
        "REDIS_URL": f"redis://:{PASSWORD}@127.0.0.1:{redis.port}",
        "TOKENGUARD_REDIS_TIMEOUT_S": 10,
        "CAP_USER": 1000,
        "RATE_USER": 0,
    }


def ask(server, user="alice"):
    return server.post("/v1/chat/completions", json=ASK, headers={"x-user-id": user})


def health(server):
    return httpx.get(server.url, timeout=10).json()


def test_servers_of_both_drivers_share_budgets_and_buckets(settings, fake, tmp_path):
    """A budget set on one binds the very next call on the other, and what one settles the other sees."""
    with DRIVERS["uvicorn"](tmp_path, **settings) as a, DRIVERS["gunicorn"](tmp_path, **settings) as b:
        assert b.client("alice").chat.completions.create(**ASK).usage.total_tokens == 30
        assert a.level("user", "alice") == 970

        a.set_budget("user", "alice", 40)
        with pytest.raises(openai.RateLimitError, match="user:alice"):
            b.client("alice").chat.completions.create(**ASK)
        b.set_budget("user", "alice", 2000)
        for chunk in a.client("alice").chat.completions.create(**ASK, stream=True):
            assert chunk.id

        assert a.level("user", "alice") == b.level("user", "alice") == 1940
        assert "redis at 127.0.0.1" in a.start_line
        assert f"redis at 127.0.0.1:{settings['REDIS_URL'][-5:]}" in health(b)["backend"]


@pytest.mark.parametrize("driver", DRIVERS)
def test_outage_is_told_and_ends_without_a_restart(redis, settings, fake, tmp_path, driver):
    """Callers get a 503 to try again after, health says degraded, the log says it once, and then it is over."""
    with DRIVERS[driver](tmp_path, **settings) as server:
        assert ask(server).status_code == 200
        server.set_budget("user", "alice", 500)
        assert health(server)["status"] == "ok"
        redis.kill()

        answers = [ask(server) for _ in range(5)]
        refused = server.post(
            "/config/budget", json={"scope": "user", "id": "x", "capacity": 1, "refillPerSec": 0}
        )

        assert {answer.status_code for answer in [*answers, refused]} == {503}
        assert answers[0].headers["retry-after"] == "1"
        error = answers[0].json()["error"]
        assert error["code"] == "backend_unavailable"
        assert str(redis.port) not in json.dumps(error)
        degraded = health(server)
        assert degraded["status"] == "degraded"
        assert "calls are answered 503" in degraded["trouble"]
        assert len(fake.received) == 1

        redis.start()

        until(lambda: health(server)["status"] == "ok", "it does not come back")
        until(lambda: ask(server).status_code == 200, "calls do not pass")
        assert server.level("user", "alice") == 470
        log = server.log
        assert PASSWORD not in log + server.start_line + json.dumps(degraded) + answers[0].text
        assert [log.count(line) for line in ("Redis is unavailable", "Redis is back")] == [1, 1], log


def test_idle_server_notices_that_redis_is_gone(redis, settings, tmp_path):
    """Nobody has to call first."""
    with DRIVERS["uvicorn"](tmp_path, **settings) as server:
        assert health(server)["status"] == "ok"
        redis.kill()
        until(lambda: health(server)["status"] == "degraded", "it does not notice")
        redis.start()
        until(lambda: health(server)["status"] == "ok", "it does not come back")


def test_server_starts_without_redis(redis, settings, fake, tmp_path):
    """It says so, and serves as soon as there is one."""
    redis.kill()
    with DRIVERS["uvicorn"](tmp_path, **settings) as server:
        assert health(server)["status"] == "degraded"
        assert ask(server).status_code == 503
        redis.start()
        until(lambda: ask(server).status_code == 200, "it does not come back")


def test_open_policy_passes_calls_and_charges_them_later(redis, settings, fake, tmp_path):
    """While Redis is away every call passes; afterwards its bucket has paid for them."""
    with DRIVERS["uvicorn"](tmp_path, **settings, TOKENGUARD_REDIS_DOWN="open") as server:
        assert ask(server).status_code == 200
        redis.kill()
        assert [ask(server).status_code for _ in range(40)] == [200] * 40
        redis.start()
        until(lambda: health(server)["status"] == "ok", "it does not come back")
        until(lambda: server.level("user", "alice") == 1000 - 40 * 30, "it is not charged")
        assert ask(server).status_code == 429


def test_metrics_tell_of_redis(settings, fake, tmp_path):
    """How many calls travelled in how many batches, and whether it is up."""
    with DRIVERS["uvicorn"](tmp_path, **settings) as server:
        ask(server)
        text = httpx.get(f"{server.url}/metrics", timeout=10).text
        assert "tokenguard_redis_up 1.0" in text
        assert "tokenguard_redis_batched_total 2.0" in text
        assert "tokenguard_reservations_open 0.0" in text


def test_stopping_settles_in_redis(redis, settings, fake, tmp_path):
    """What is under way when the server is told to stop is settled before it is gone."""
    with DRIVERS["uvicorn"](tmp_path, **settings) as server:
        stream = server.client("alice").chat.completions.create(**ASK, stream=True)
        next(iter(stream))
        for _ in stream:
            pass
        assert server.stop() == 0
    with redis.client() as client:
        level, _, capacity, *_ = client.get("tg:{default}:b:user\x1falice\x1ftokens\x1f").split(" ")
    assert (int(level), int(capacity)) == (970, 1000)


@pytest.mark.parametrize("value", ["redis//nowhere", "redis://:hunter2@host:port", "amqp://host"])
def test_url_that_cannot_be_stops_the_start(tmp_path, value):
    """With what is allowed, and without what was given."""
    import subprocess
    import sys

    from tests.e2e.conftest import environment

    done = subprocess.run(
        [sys.executable, "-m", "tokenguard", "demo", "--port", "0"],
        cwd=tmp_path, env=environment(REDIS_URL=value), capture_output=True, text=True, timeout=20,
    )  # fmt: skip
    assert done.returncode == 1
    assert "REDIS_URL must be redis://" in done.stderr
    assert "hunter2" not in done.stderr
