"""Workers that other servers start: what they share, and what is said if they share nothing."""

from collections import Counter

import pytest

from tests.e2e.conftest import OUR_KEY, running_asgi, running_wsgi
from tests.e2e.test_observing import quiet
from tests.e2e.test_workers import FIXED, GRANT, TAKEN, ask, balance, clients_of_each, crowd
from tests.nodes import until

WORKERS = 2
TWO = ("--workers", str(WORKERS))
TWO_WITH_THREADS = (*TWO, "--threads", "8", "--keep-alive", "30")


@pytest.fixture
def settings(upstream_url, fake):
    """Fixed grants, and nothing that is shared."""
    return {"OPENAI_API_KEY": OUR_KEY, "OPENAI_BASE_URL": upstream_url, **FIXED}


def all_serve(server):
    """Wait until all workers do."""
    until(lambda: len(server.workers) == WORKERS, "they do not start")
    until(lambda: server.get("/").json()["workers"] >= WORKERS, "they do not join")


@pytest.mark.parametrize(
    ("start", "options", "table"),
    [
        pytest.param(running_asgi, TWO, "table", id="uvicorn"),
        pytest.param(running_wsgi, TWO_WITH_THREADS, "table", id="gunicorn"),
        pytest.param(running_wsgi, (*TWO_WITH_THREADS, "--preload"), None, id="gunicorn --preload"),
    ],
)
def test_workers_share_one_budget(tmp_path, settings, user, start, options, table):
    """Through a table in common, or one that was there before they were; what is in it they leave in a state."""
    settings["TOKENGUARD_STATE"] = tmp_path / "state"
    if table:
        settings["TOKENGUARD_TABLE"] = tmp_path / table
    with start(tmp_path, *options, **settings) as server:
        all_serve(server)
        for setter in server.workers:
            with server.only(setter):
                server.set_budget("user", user, TAKEN, level=0)
            for worker in server.workers:
                with server.only(worker):
                    assert ask(server, user).status_code == 429
        assert server.request("DELETE", f"/config/budget/user/{user}").status_code == 200
        server.set_budget("user", user, GRANT, level=GRANT)
        with clients_of_each(server) as clients:
            answers = crowd(clients, user, calls=GRANT // TAKEN // 4)
        admitted = GRANT // TAKEN
        assert Counter(answer.status_code for answer in answers) == {200: admitted, 429: len(answers) - admitted}
        assert balance(quiet(server)) == GRANT
        assert server.get("/").json()["status"] == "ok"
    assert list(tmp_path.glob("state.*")) == []
    with start(tmp_path, *options, **settings) as server:
        assert server.level("user", user) == 0
        assert server.get(f"/config/budget/user/{user}").json()["source"] == "explicit"


def test_workers_that_share_nothing_are_told_of(tmp_path, settings):
    """In the log, once by each, and to whoever asks how things are, with what to do."""
    with (
        running_asgi(tmp_path, *TWO, **settings) as asgi,
        running_wsgi(tmp_path, *TWO_WITH_THREADS, **settings) as wsgi,
    ):
        for server in (asgi, wsgi):
            until(lambda server=server: "set TOKENGUARD_TABLE" in trouble_of(server), "it is not noticed")
            assert "serve the same socket with buckets of their own" in server.log
            assert server.log.count("\n") <= WORKERS


def trouble_of(server):
    """Return what the worker that happens to answer says is wrong."""
    health = server.get("/").json()
    assert (health["status"] == "ok") == ("trouble" not in health)
    return health.get("trouble", "")
