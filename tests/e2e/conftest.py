"""The real server as a process, a fake upstream, real clients."""

from __future__ import annotations

import itertools
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial

import httpx
import openai
import pytest

from tests.e2e.fake_openai import FakeOpenAI, Serving
from tests.e2e.limited_openai import ADMIN_KEY, PROJECT, LimitedOpenAI
from tests.nodes import until
from tests.processes import children_of, group_of, has_loaded, stopped
from tests.redis_servers import RedisServer

UNLIMITED = {f"CAP_{kind}": "unlimited" for kind in ("GLOBAL", "TEAM", "USER")}
OUR_KEY = "sk-ours-0123456789"
THEIR_KEY = "sk-the-callers-own"
START_SECONDS = 20
STOP_SECONDS = 20

_numbers = itertools.count(1)


@dataclass
class TokenGuard:
    """A running server."""

    process: subprocess.Popen
    url: str
    start_line: str
    log_path: os.PathLike
    clients: list = field(default_factory=list)

    @property
    def log(self):
        """What it has written to standard error so far."""
        return self.log_path.read_text()

    def client(self, user, kind=openai.OpenAI, **headers):
        """Return an OpenAI client that calls as ``user`` and does not retry."""
        client = kind(
            base_url=f"{self.url}/v1",
            api_key=THEIR_KEY,
            max_retries=0,
            timeout=10,
            default_headers={"x-user-id": user, **headers},
        )
        if kind is openai.OpenAI:
            self.clients.append(client)
        return client

    @property
    def workers(self):
        """The processes that it has started to serve."""
        return [pid for pid in children_of(self.process.pid) if has_loaded(pid, "tokenguard/_bucket.")]

    def only(self, worker):
        """Have all requests answered by one worker for a while: the others stand still."""
        return stopped([other for other in self.workers if other != worker])

    def request(self, method, path, **more):
        """Ask over a connection of its own."""
        # Certificates, which nobody needs here, would take 30 ms to load.
        return httpx.request(method, self.url + path, timeout=10, verify=False, **more)

    def get(self, path, **more):
        return self.request("GET", path, **more)

    def post(self, path, **more):
        return self.request("POST", path, **more)

    def set_budget(self, scope, scope_id, capacity, refill=0, **more):
        body = {"scope": scope, "id": scope_id, "capacity": capacity, "refillPerSec": refill, **more}
        answer = self.post("/config/budget", json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def level(self, scope, scope_id, **query):
        answer = self.get(f"/config/budget/{scope}/{scope_id}", params=query)
        assert answer.status_code == 200, answer.text
        return answer.json()["level"]

    def stop(self):
        """Ask it to stop, as a supervisor does; return its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(STOP_SECONDS)


def environment(**settings):
    """Return a clean environment with the given settings."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    return {**kept, **{name: str(value) for name, value in settings.items()}}


@contextmanager
def running(folder, *command, **settings):
    """Start ``tokenguard`` in ``folder`` on a free port; stop it at the end and check how it went."""
    log_path = folder / f"tokenguard-{next(_numbers)}.log"
    call = [sys.executable, "-m", "tokenguard", *command, "--port", "0"]
    with (
        log_path.open("w") as log,
        subprocess.Popen(
            call,
            cwd=folder,
            env=environment(**settings),
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            process_group=0,
        ) as process,
    ):
        watchdog = threading.Timer(START_SECONDS, process.kill)  # readline waits for ever
        watchdog.start()
        line = process.stdout.readline()
        watchdog.cancel()
        address = re.search(r"on (http://\S+)", line)
        if address is None:
            process.wait(STOP_SECONDS)
            pytest.fail(f"the server did not start: {log_path.read_text()}")
        server = TokenGuard(process, address[1], line, log_path)
        with _stopped_at_the_end(server):
            yield server


@contextmanager
def running_under(folder, manager, *options, **settings):
    """Start another server in ``folder`` on a socket of ours, ``{fd}`` in its options; likewise."""
    log_path = folder / f"{manager}-{next(_numbers)}.log"
    with socket.create_server(("127.0.0.1", 0), backlog=256) as listening, log_path.open("w") as log:
        # Whoever connects before it serves waits in the socket's queue, so that nobody has to ask when it does.
        listening.set_inheritable(True)
        with subprocess.Popen(
            [sys.executable, "-m", manager, *(option.format(fd=listening.fileno()) for option in options)],
            cwd=folder,
            env=environment(**settings),
            stdout=log,
            stderr=log,
            pass_fds=[listening.fileno()],
            process_group=0,
        ) as process:
            server = TokenGuard(process, f"http://127.0.0.1:{listening.getsockname()[1]}", "", log_path)
            try:
                httpx.get(server.url, timeout=START_SECONDS)
            except httpx.HTTPError:
                process.kill()
                pytest.fail(f"the server did not start: {server.log}")
            with _stopped_at_the_end(server):
                yield server


def running_wsgi(folder, *options, **settings):
    """Start the WSGI app in ``folder`` under gunicorn, with threads; likewise."""
    fixed = ["--worker-class", "gthread", "--threads", "32", "--graceful-timeout", "5"]
    fixed += ["--no-control-socket", "--bind", "fd://{fd}", "--log-level", "warning"]
    return running_under(folder, "gunicorn", "tokenguard.wsgi:create_app()", *fixed, *options, **settings)


def running_asgi(folder, *options, **settings):
    """Start the ASGI app in ``folder`` under uvicorn; likewise."""
    fixed = ["--factory", "--fd", "{fd}", "--log-level", "warning", "--no-access-log"]
    return running_under(folder, "uvicorn", "tokenguard.asgi:create_app", *fixed, *options, **settings)


@contextmanager
def _stopped_at_the_end(server):
    try:
        yield
    finally:
        for client in server.clients:
            client.close()
        try:
            if server.process.poll() is None:
                code = server.stop()
                assert code == 0, f"exit code {code}: {server.log}"
            # What other servers start beside their workers ends just after them.
            until(lambda: group_of(server.process.pid) == [], "it leaves processes behind")
        finally:
            for pid in group_of(server.process.pid):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
    assert "Traceback" not in server.log, server.log


def running_without_the_lane(folder, **settings):
    """Start ``tokenguard serve`` in ``folder`` so that Falcon answers whatever comes; likewise."""
    return running(folder, "serve", TOKENGUARD_FASTLANE="off", **settings)


DRIVERS = {
    "uvicorn": lambda folder, **settings: running(folder, "serve", **settings),
    "uvicorn without the lane": running_without_the_lane,
    "gunicorn": running_wsgi,
}
"""The ways in which requests come in, as functions that start a server."""


def running_workers(folder, workers, **settings):
    """Start some workers in ``folder`` that share a socket and a table; likewise."""
    return running(folder, "serve", "--workers", str(workers), **settings)


@pytest.fixture(scope="session")
def _fake_server():
    fake = FakeOpenAI()
    with Serving(fake) as serving:
        yield fake, serving


@pytest.fixture
def fake(_fake_server):
    """The upstream, as if new."""
    fake, _ = _fake_server
    fake.__init__()
    return fake


@pytest.fixture
def upstream_loop(_fake_server):
    """The event loop that the upstream runs in."""
    return _fake_server[1].loop


@pytest.fixture(scope="session")
def upstream_url(_fake_server):
    return f"http://127.0.0.1:{_fake_server[1].port}/v1"


@pytest.fixture(scope="session")
def redis_server():
    """A Redis for the servers of these tests alone.

    NOTE: a server that lives as long as the run publishes its budgets again whenever somebody empties its Redis.
    """
    with RedisServer() as server:
        yield server


KINDS = [*DRIVERS, "uvicorn with redis", "uvicorn with workers"]
"""Servers of each kind, for tests of what all of them have to do alike.

NOTE: with Redis and with workers the fast lane answers, as it does by default. Falcon's path, which stands
behind the lane for whatever is odd, differs from it in how bytes are read and not in where buckets live, so
that memory is enough for it; ``test_two_paths.py`` compares the two byte for byte.
"""


@pytest.fixture(scope="session")
def start_kind(request, tmp_path_factory):
    """Return what starts a server of a kind, with some settings."""

    def start_one(kind, **settings):
        driver, _, more = kind.partition(" with ")
        start, shared = DRIVERS[driver], {}
        if more == "workers":
            start = partial(running_workers, workers=2)
        elif more == "redis":  # a busy machine may hold up a batch for long, and that is no outage
            shared = {"REDIS_URL": request.getfixturevalue("redis_server").url, "TOKENGUARD_REDIS_TIMEOUT_S": 10}
        return start(tmp_path_factory.mktemp("server"), **shared, **settings)

    return start_one


@pytest.fixture(scope="session", params=KINDS)
def server(request, start_kind, upstream_url):
    """One server of each kind for tests that need no settings of their own; the defaults are far away."""
    with start_kind(
        request.param,
        OPENAI_API_KEY=OUR_KEY,
        OPENAI_BASE_URL=upstream_url,
        CAP_GLOBAL=10**9,
        CAP_TEAM="unlimited",
        CAP_USER=10**6,
        RATE_USER=0,
        TOKENGUARD_READ_TIMEOUT_S=5,
    ) as server:
        yield server


@pytest.fixture(scope="session")
def _limited_server():
    fake = LimitedOpenAI()
    with Serving(fake) as serving:
        yield fake, f"http://127.0.0.1:{serving.port}/v1"


@pytest.fixture
def provider(_limited_server):
    """An upstream with limits of its own, as if new: it has none until a test sets some."""
    fake, _ = _limited_server
    fake.__init__()
    return fake


@pytest.fixture(scope="session")
def behind_limits(_limited_server):
    """What a server needs to reach that upstream, and nothing that limits anybody."""
    return {"OPENAI_API_KEY": OUR_KEY, "OPENAI_BASE_URL": _limited_server[1], **UNLIMITED}


@pytest.fixture(scope="session")
def administered(behind_limits):
    """The same, with what its admin API asks for; of its own accord the server seldom asks it."""
    admin = {"OPENAI_ADMIN_KEY": ADMIN_KEY, "OPENAI_PROJECT_ID": PROJECT}
    return {**behind_limits, **admin, "TOKENGUARD_SYNC_INTERVAL_S": 86_400}


@pytest.fixture(scope="session", params=KINDS)
def guard(request, start_kind, administered, _limited_server):
    """A server of each kind that faces that upstream."""
    fake, _ = _limited_server
    asked = len(fake.admin_at_s)
    with start_kind(request.param, **administered, TOKENGUARD_READ_TIMEOUT_S=5) as server:
        until(lambda: len(fake.admin_at_s) > asked, "it does not ask for the limits when it starts")
        yield server


@pytest.fixture
def model():
    """A model that no other test knows."""
    return f"model-{next(_numbers)}"


@pytest.fixture
def user():
    """A user whom no other test knows."""
    return f"user-{next(_numbers)}"
