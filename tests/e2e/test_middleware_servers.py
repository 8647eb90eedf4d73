"""Guarded apps, and the proxy's own, under other people's servers: whichever worker answers, the budget is one."""

import json
import socket
import struct
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import count
from pathlib import Path

import httpx
import pytest

from tests.e2e.conftest import OUR_KEY, running_under
from tests.e2e.test_workers import FIXED, GRANT, TAKEN, clients_of_each, crowd
from tests.nodes import until
from tokenguard import Limiter

ROOT = Path(__file__).parents[2]
APPS = "tests.e2e.guarded_apps"
WORKERS = 2
COSTS, TAKES = 10, 7
FULL = 703
"""A grant for a hundred requests of 7, of which 3 are left: too little for 10."""
SETTINGS = {"CAP_GLOBAL": "unlimited", "CAP_TEAM": "unlimited", "CAP_USER": FULL, "RATE_USER": 0}
RESET = struct.pack("ii", 1, 0)
TIMEOUT_S = 20


def under_uvicorn(folder, app, *options, **settings):
    fixed = ["--fd", "{fd}", "--log-level", "warning", "--no-access-log", "--workers", str(WORKERS)]
    return running_under(folder, "uvicorn", app, *fixed, *options, **settings)


def under_hypercorn(folder, app, **settings):
    return running_under(folder, "hypercorn", app, "--bind", "fd://{fd}", "--workers", str(WORKERS), **settings)


def under_gunicorn(folder, app, *options, **settings):
    fixed = ["--worker-class", "gthread", "--workers", str(WORKERS), "--threads", "8", "--keep-alive", "30"]
    fixed += ["--no-control-socket", "--bind", "fd://{fd}", "--log-level", "warning", "--graceful-timeout", "5"]
    return running_under(folder, "gunicorn", app, *fixed, *options, **settings)


ASGI_ANSWERS = ("/fastapi/answer", "/fastapi/threaded", "/starlette/answer", "/django/answer", "/falcon/answer")
WSGI_ANSWERS = ("/flask/answer", "/django/answer", "/falcon/answer")
ASGI_STREAMS = ("/starlette/stream", "/django/stream-soon")
WSGI_STREAMS = ("/flask/stream", "/django/stream")
SERVERS = {
    "uvicorn": (partial(under_uvicorn, app=f"{APPS}:asgi_app"), ASGI_ANSWERS, ASGI_STREAMS),
    "hypercorn": (partial(under_hypercorn, app=f"{APPS}:asgi_app"), ASGI_ANSWERS, ASGI_STREAMS),
    "gunicorn": (partial(under_gunicorn, app=f"{APPS}:wsgi_app"), WSGI_ANSWERS, WSGI_STREAMS),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("guarded")


@pytest.fixture(scope="module")
def settings(folder):
    """What all processes that share the table have to agree upon."""
    return {**SETTINGS, "TOKENGUARD_TABLE": folder / "table", "TOKENGUARD_BUCKETS": 1000}


@pytest.fixture(scope="module")
def servers(folder, settings):
    """One server of each kind, with two workers each, and all of them with one table."""
    with ExitStack() as stack:
        started = {
            name: stack.enter_context(start(folder, **settings, PYTHONPATH=ROOT))
            for name, (start, _, _) in SERVERS.items()
        }
        for server in started.values():
            until(lambda server=server: len(server.workers) == WORKERS, "they do not start")
        yield started


@pytest.fixture(scope="module")
def limiter(servers, settings):
    """This process, which shares the table too, and so knows what is in it."""
    with Limiter(**settings) as limiter:
        yield limiter


def left(limiter, user):
    (state,) = limiter.peek(user=user)
    return state.level


def asking(user, takes=TAKES):
    """Return what ``httpx`` needs for a request."""
    return {"json": {"costs": COSTS, "takes": takes}, "headers": {"x-user-id": user}}


def all_at_once(clients, paths, request):
    """Have each client ask, one path after the other, until it is refused; return the statuses."""

    def ask(client, first):
        statuses = []
        while not statuses or statuses[-1] == 200:
            path = paths[client][(first + len(statuses)) % len(paths[client])]
            statuses.append(client.post(path, **request).status_code)
        return statuses

    with ThreadPoolExecutor(len(clients)) as pool:
        return [status for statuses in pool.map(ask, clients, count()) for status in statuses]


def test_budget_is_one_whatever_serves_it(servers, limiter, user):
    """Six workers of three servers, five frameworks, and a crowd: of a grant exactly what is in it is given."""
    with ExitStack() as stack:
        paths = {}
        for name, server in servers.items():
            clients = stack.enter_context(clients_of_each(server))
            paths |= dict.fromkeys(clients, SERVERS[name][1])
        assert len(paths) == 3 * WORKERS * 4
        keeps = Counter(all_at_once(list(paths), paths, asking(user, takes=COSTS)))
        assert keeps == {200: FULL // COSTS, 429: len(paths)}
        assert left(limiter, user) == FULL % COSTS
        # And what is settled at less can be had again, down to the last token.
        limiter.budgets.set("user", user, capacity=FULL, refill_per_sec=0, level=FULL)
        settled = Counter(all_at_once(list(paths), paths, asking(user)))
        late = Counter(all_at_once(list(paths)[:1], paths, asking(user)))
        assert settled[200] + late[200] == 100
        assert left(limiter, user) == FULL - 100 * TAKES
        assert all(still_open(server) == 0 for server in servers.values())


def still_open(server):
    """Return how many calls the workers of a server have open."""
    found = 0
    for worker in server.workers:
        with server.only(worker):
            found += server.get("/").json()["open"]
    return found


@contextmanager
def streaming(server, path, user, takes, how):
    """Ask for a stream, hear its beginning, and hang up at the end."""
    body = json.dumps({"costs": COSTS, "takes": takes}).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\nx-user-id: {user}\r\ncontent-length: {len(body)}\r\n\r\n"
    with talking(server, head.encode() + body, b": 2\n\n" if takes else b"Hello") as (connection, _):
        yield
        if how == "resets":
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)


@contextmanager
def talking(server, said, awaited):
    """Connect, say something and hear what is awaited."""
    with socket.create_connection(("127.0.0.1", httpx.URL(server.url).port), TIMEOUT_S) as connection:
        connection.sendall(said)
        heard = b""
        while awaited not in heard:
            piece = connection.recv(65536)
            assert piece, heard
            heard += piece
        yield connection, heard


@pytest.mark.parametrize(("name", "path"), [(name, path) for name in SERVERS for path in SERVERS[name][2]])
def test_caller_who_hangs_up_pays_once(servers, limiter, user, name, path):
    """What was told of a stream by then, or what was reserved; and nothing stays open."""
    server = servers[name]
    callers = [(takes, how) for takes in (None, TAKES) for how in ("closes", "resets")]
    with ExitStack() as stack:
        for takes, how in callers:
            stack.enter_context(streaming(server, path, user, takes, how))
        assert still_open(server) == len(callers)
        assert left(limiter, user) == FULL - len(callers) * COSTS
    until(lambda: still_open(server) == 0, "calls stay open")
    assert left(limiter, user) == FULL - sum(takes or COSTS for takes, _ in callers)


HANDSHAKE = (
    "GET /fastapi/socket HTTP/1.1\r\nhost: x\r\nupgrade: websocket\r\nconnection: upgrade\r\n"
    "sec-websocket-version: 13\r\nsec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA==\r\nx-user-id: {user}\r\n\r\n"
)


def test_websocket_is_guarded_at_its_opening(servers, limiter, user):
    """It is told what is left; and the next, for which too little is, is told why as any request is."""
    limiter.budgets.set("user", user, capacity=15, refill_per_sec=0)
    for status, text in ((b"101", b"x-ratelimit-remaining-tokens: 5"), (b"429", b"Budget used up")):
        with talking(servers["hypercorn"], HANDSHAKE.format(user=user).encode(), text) as (_, heard):
            assert heard.split()[1] == status
    assert left(limiter, user) == 5


@pytest.mark.parametrize("name", SERVERS)
def test_answers_are_the_apps_own(servers, limiter, user, name):
    """What is refused is as ever, what fails is free, and an answer is whole, with our fields beside its own."""
    server, answers = servers[name], SERVERS[name][1]
    for number, path in enumerate(answers, start=1):
        answer = server.post(path, **asking(user))
        assert answer.status_code == 200, path
        assert left(limiter, user) == FULL - number * TAKES, path
        assert answer.headers["x-ratelimit-limit-tokens"] == str(FULL)
        assert answer.json()["text"] == "hello " * 200
    for path in ("/fastapi/fails",) if name != "gunicorn" else ("/django/fails",):
        assert server.post(path, **asking(user)).status_code == 503
        assert left(limiter, user) == FULL - len(answers) * TAKES
    with httpx.Client(base_url=server.url, verify=False, timeout=TIMEOUT_S) as client:
        for _ in range(2):  # of whom it is was not told, so that the body is not read
            answer = client.post(answers[0], content=b"x" * 30_000)
            assert answer.json()["error"]["param"] == "x-user-id"
        assert client.post(answers[0], **asking(user)).status_code == 200


@pytest.mark.parametrize("path", ["/django/file", "/flask/file"])
def test_files_are_sent_by_the_server(servers, limiter, user, path):
    """Whole, and charged."""
    answer = servers["gunicorn"].get(path, headers={"x-user-id": user})
    assert answer.content == (Path(__file__).parent / "guarded_apps.py").read_bytes()
    assert left(limiter, user) == FULL - COSTS


def test_workers_that_were_forked_share_what_was_there_before(folder, user):
    """With ``--preload`` the limiter is made before the workers are, and no table need be named."""
    with under_gunicorn(folder, f"{APPS}:wsgi_app", "--preload", PYTHONPATH=ROOT, **SETTINGS) as server:
        until(lambda: len(server.workers) == WORKERS, "they do not start")
        with clients_of_each(server) as clients:
            paths = dict.fromkeys(clients, WSGI_ANSWERS)
            statuses = Counter(all_at_once(clients, paths, asking(user, takes=COSTS)))
        assert statuses == {200: FULL // COSTS, 429: len(paths)}
        (bucket,) = server.post("/flask/answer", **asking(user)).json()["tokenguard"]["buckets"]
        assert bucket["level"] == FULL % COSTS


def test_proxy_under_hypercorn_shares_one_budget(tmp_path, upstream_url, fake, user):
    """Its app of ASGI and its app of WSGI, with two workers each."""
    settings = {"OPENAI_API_KEY": OUR_KEY, "OPENAI_BASE_URL": upstream_url, **FIXED}
    settings["TOKENGUARD_TABLE"] = tmp_path / "table"
    with (
        under_hypercorn(tmp_path, "asgi:tokenguard.asgi:create_app()", **settings) as asgi,
        under_hypercorn(tmp_path, "wsgi:tokenguard.wsgi:create_app()", **settings) as wsgi,
    ):
        for server in (asgi, wsgi):
            until(lambda server=server: len(server.workers) == WORKERS, "they do not start")
        asgi.set_budget("user", user, GRANT, level=GRANT)
        with clients_of_each(asgi) as some, clients_of_each(wsgi) as others:
            answers = crowd([*some, *others], user, calls=GRANT // TAKEN // 8)
        admitted = GRANT // TAKEN
        assert Counter(answer.status_code for answer in answers) == {200: admitted, 429: len(answers) - admitted}
        assert wsgi.level("user", user) == 0
