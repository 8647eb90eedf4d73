"""Workers that share a socket and a table: whichever answers, it is as if there were one."""

import os
import random
import re
import signal
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import count

import httpx
import pytest

from tests.e2e import storm
from tests.e2e.conftest import OUR_KEY, running_workers
from tests.e2e.fake_openai import JSON, completion, usage_of
from tests.e2e.test_observing import quiet, series
from tests.nodes import until
from tests.processes import until_gone

WORKERS = 4
GRANT = 6000
TEAM_GRANT = 10**6
GLOBAL_GRANT = 10**9
FIXED = {
    "CAP_GLOBAL": GLOBAL_GRANT,
    "RATE_GLOBAL": 0,
    "CAP_TEAM": TEAM_GRANT,
    "RATE_TEAM": 0,
    "CAP_USER": GRANT,
    "RATE_USER": 0,
}
MESSAGES = [{"role": "user", "content": "Say hello"}]
PROMPT = 9
TAKEN = 30
CLIENTS = 4
"""Of each worker's, in a crowd."""
SEED = 25
KILLS = 4

_models = map("model-{}".format, count())
"""A new one for each call: nothing is learned of it."""


@pytest.fixture
def crew(tmp_path, upstream_url, fake):
    """A server of some workers, with fixed grants."""
    with running_workers(
        tmp_path, WORKERS, OPENAI_API_KEY=OUR_KEY, OPENAI_BASE_URL=upstream_url, **FIXED
    ) as server:
        yield server


def call(user, **more):
    """Return what ``httpx`` needs for a call of which exactly what it takes is reserved."""
    body = {"model": next(_models), "messages": MESSAGES, "max_tokens": TAKEN - PROMPT, **more}
    return {"json": body, "headers": {"x-user-id": user, "x-team-id": "team-of-all"}}


def ask(server, user, **more):
    """Make a call, over a connection of its own."""
    return server.post("/v1/chat/completions", **call(user, **more))


@contextmanager
def clients_of_each(server):
    """Have some clients of each worker: the connections that they keep are its."""
    clients = []
    try:
        for worker in server.workers:
            with server.only(worker):
                for _ in range(CLIENTS):
                    clients.append(httpx.Client(base_url=server.url, timeout=30, verify=False))
                    clients[-1].get("/")
        yield clients
    finally:
        for client in clients:
            client.close()


def crowd(clients, user, calls):
    """Let all clients make calls at once; return the answers."""

    def ask_often(client):
        answers = [client.post("/v1/chat/completions", **call(user)) for _ in range(calls)]
        # It was one connection, so one worker that answered.
        assert len({a.extensions["network_stream"].get_extra_info("client_addr") for a in answers}) == 1
        return answers

    with ThreadPoolExecutor(len(clients)) as pool:
        return [answer for answers in pool.map(ask_often, clients) for answer in answers]


def balance(seen):
    """Assert that the metrics account for every token; return how many are spent."""
    reserved, settled, refunded, overrun = (
        seen[f"tokenguard_tokens_{what}_total"] for what in ("reserved", "settled", "refunded", "overrun")
    )
    assert reserved + overrun == settled + refunded
    return settled


# --- budgets --------------------------------------------------------------------------------------------------


def test_budget_set_through_one_binds_the_next_call_on_every_other(crew, user):
    """Setting, showing and removing: each worker in turn does it, and all others go by it at once."""
    assert len(crew.workers) == WORKERS
    path = f"/config/budget/user/{user}"
    for capacity, setter in enumerate(crew.workers, start=TAKEN):
        with crew.only(setter):
            crew.set_budget("user", user, capacity, level=0)
        for worker in crew.workers:
            with crew.only(worker):
                assert ask(crew, user).status_code == 429
                assert crew.get(path).json()["capacity"] == capacity
                assert crew.level("user", user) == 0
        with crew.only(setter):
            crew.set_budget("user", user, GRANT, level=WORKERS * TAKEN)
        for worker in crew.workers:
            with crew.only(worker):
                assert ask(crew, user).status_code == 200
        with crew.only(setter):
            assert ask(crew, user).status_code == 429
            assert crew.request("DELETE", path).json()["deleted"]
        for worker in crew.workers:
            with crew.only(worker):
                assert crew.get(path).json()["source"] == "default"
                assert crew.request("DELETE", path).status_code == 404


def test_crowd_on_all_is_admitted_as_by_one(crew, user):
    """Of a grant exactly what is in it is given, however many ask whom, and refusals cost nothing."""
    with clients_of_each(crew) as clients:
        answers = crowd(clients, user, calls=25)
    admitted = GRANT // TAKEN
    assert Counter(answer.status_code for answer in answers) == {200: admitted, 429: len(answers) - admitted}
    assert crew.level("user", user) == 0
    assert crew.level("team", "team-of-all") == TEAM_GRANT - GRANT
    assert crew.level("global", "*") == GLOBAL_GRANT - GRANT
    seen = quiet(crew)
    assert balance(seen) == GRANT
    assert seen['tokenguard_refusals_total{meter="tokens",scope="user"}'] == len(answers) - admitted


def test_crowd_is_charged_what_it_took(crew, fake, user):
    """Whether calls take less than was reserved or more, every scope lacks the sum of what they took."""
    rng = random.Random(SEED)

    async def script(reply):
        usage = usage_of(PROMPT, rng.randint(0, 3 * TAKEN))
        await reply.whole(200, JSON, completion(reply.received, usage))

    fake.script = script
    crew.set_budget("user", user, TEAM_GRANT)
    with clients_of_each(crew) as clients:
        answers = crowd(clients, user, calls=15)
    took = sum(answer.json()["usage"]["total_tokens"] for answer in answers)
    assert crew.level("user", user) == TEAM_GRANT - took
    assert crew.level("team", "team-of-all") == TEAM_GRANT - took
    assert crew.level("global", "*") == GLOBAL_GRANT - took
    assert balance(quiet(crew)) == took


# --- metrics --------------------------------------------------------------------------------------------------


def told(server):
    """Return the metrics, but for what asking for them moves."""
    return {name: value for name, value in series(server).items() if 'route="/metrics"' not in name}


def only_grown(before, after):
    """Return whether no counter went back."""
    counters = [name for name in before if re.search(r"_(total|count|sum|bucket)(\{|$)", name)]
    assert len(counters) > 30
    return [name for name in counters if after[name] < before[name]] == []


def test_metrics_are_the_same_whoever_answers(crew, user):
    """Each worker tells what all of them counted."""
    crew.set_budget("user", user, GRANT, level=WORKERS * TAKEN)
    for worker in crew.workers:
        with crew.only(worker):
            assert ask(crew, user).status_code == 200
    assert ask(crew, user).status_code == 429
    quiet(crew)
    seen = []
    for worker in crew.workers:
        with crew.only(worker):
            seen.append(told(crew))
    assert seen == [seen[0]] * WORKERS
    assert seen[0]["tokenguard_workers"] == WORKERS
    assert seen[0]['tokenguard_requests_total{route="/v1/chat/completions",status="200"}'] == WORKERS
    assert seen[0]['tokenguard_requests_total{route="/v1/chat/completions",status="429"}'] == 1
    assert balance(seen[0]) == WORKERS * TAKEN


def test_what_a_killed_worker_counted_stays_and_its_calls_do_not(crew, fake, user):
    """Counters go on from where it left them, also when its place is taken; its calls are under way no more."""
    arrived = threading.Event()

    async def script(reply):
        arrived.set()
        await reply.until_gone()

    victim = crew.workers[0]
    with crew.only(victim):
        assert ask(crew, user).status_code == 200
        fake.script = script
        with ThreadPoolExecutor(1) as pool:
            lost = pool.submit(ask, crew, user)
            assert arrived.wait(20)
            before = series(crew)
            os.kill(victim, signal.SIGKILL)
            with pytest.raises((httpx.RemoteProtocolError, httpx.ReadError)):
                lost.result(20)
    until_gone([victim])
    assert before["tokenguard_calls_in_flight"] == before["tokenguard_reservations_open"] == 1
    fake.script = None
    for _ in range(2):
        until(lambda: series(crew)["tokenguard_workers"] == WORKERS, "it is not replaced")
        assert crew.get("/").json()["workers"] == WORKERS
        for worker in crew.workers:
            with crew.only(worker):
                after = series(crew)
                assert after["tokenguard_calls_in_flight"] == after["tokenguard_reservations_open"] == 0
                assert after["tokenguard_tokens_reserved_total"] == 2 * TAKEN
                assert after["tokenguard_tokens_settled_total"] == TAKEN
                assert only_grown(before, after)
        before = after
        os.kill(crew.workers[-1], signal.SIGKILL)
        until(lambda: series(crew)["tokenguard_workers"] < WORKERS, "it lives on")
    assert crew.level("user", user) == GRANT - 2 * TAKEN


# --- death ----------------------------------------------------------------------------------------------------


class Callers:
    """Callers who call on and on, each call by a user of its own, until they are told that it is enough.

    Attributes:
        statuses: What each user was answered; None if the connection was lost.
    """

    def __init__(self, server, callers):
        self.statuses = {}
        self._url = server.url
        self._callers = callers
        self._enough = threading.Event()
        self._pool = ThreadPoolExecutor(callers)

    def __enter__(self):
        self._calling = [self._pool.submit(self._call_on, number) for number in range(self._callers)]
        return self

    def __exit__(self, *error):
        self._enough.set()
        self._pool.shutdown()
        for calling in self._calling:
            calling.result()

    def _call_on(self, caller):
        limits = httpx.Limits(max_keepalive_connections=0)  # any worker may answer any call
        with httpx.Client(base_url=self._url, timeout=30, verify=False, limits=limits) as client:
            for number in count():
                if self._enough.is_set():
                    return
                user = f"caller-{caller}-{number}"
                self.statuses[user] = None
                with suppress(httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError):
                    answer = client.post("/v1/chat/completions", **of_the_storm(user, stream=number % 2 == 0))
                    self.statuses[user] = answer.status_code


def of_the_storm(user, *, stream):
    body = {"model": f"model-of-{user}", "messages": MESSAGES, "max_tokens": 50, "stream": stream}
    return {"json": body, "headers": {"x-user-id": user, "x-request-id": user}}


def kill_some(server, callers):
    """Kill workers at random under load, each time once the one before is replaced."""
    rng = random.Random(SEED)
    for _ in range(KILLS):
        enough = len(callers.statuses) + rng.randint(20, 60)
        until(lambda enough=enough: len(callers.statuses) >= enough, "nobody is answered")
        victim = rng.choice(server.workers)
        os.kill(victim, signal.SIGKILL)
        until_gone([victim])
        until(lambda: server.get("/").json()["workers"] == WORKERS, "it is not replaced")


def test_workers_killed_under_load_cost_no_more_than_their_own_calls(tmp_path):
    """Others go on, nobody is answered with an error, and every scope is charged for the same."""
    with storm.Upstream(SEED) as upstream:
        url = f"http://127.0.0.1:{upstream.port}/v1"
        settings = {"OPENAI_API_KEY": OUR_KEY, "OPENAI_BASE_URL": url, **storm.SETTINGS}
        with running_workers(tmp_path, WORKERS, **settings) as server, httpx.Client(base_url=server.url) as client:
            with Callers(server, 8) as callers:
                kill_some(server, callers)
            seen = storm.quiet(client)
            whole = {user for user, status in callers.statuses.items() if status == 200}
            lost = {user for user, status in callers.statuses.items() if status is None}
            assert whole | lost == set(callers.statuses)
            assert len(lost) <= 8 * KILLS
            spent = 0
            for user in callers.statuses:
                charged = storm.USER_CAPACITY - level(client, f"user/{user}")
                assert charged in ({storm.USED} if user in whole else {0, storm.RESERVED, storm.USED}), user
                spent += charged
            assert storm.GLOBAL_CAPACITY - level(client, "global") == spent
            assert seen["tokenguard_reservations_open"] == 0
            counted = sum(seen[f"tokenguard_tokens_{what}_total"] for what in ("reserved", "overrun"))
            counted -= seen["tokenguard_tokens_refunded_total"]
            assert abs(counted - spent) <= KILLS * storm.RESERVED  # it died between the deed and its being counted
            assert server.log.count("was killed by SIGKILL and is replaced") == KILLS


def level(client, scope):
    return client.get(f"/config/budget/{scope}").json()["level"]
