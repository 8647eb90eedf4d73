"""Budgets over HTTP: set, list, show and remove, and who may."""

import socket

import httpx
import openai
import pytest

from tests.e2e.conftest import OUR_KEY, running

MESSAGES = [{"role": "user", "content": "Say hello"}]
FORM = {"content-type": "application/x-www-form-urlencoded"}


def error_of(answer):
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def test_budget_is_set_as_the_specification_says(server, user):
    """Four fields are enough, whatever Content-Type curl -d sends, and the answer shows the live budget."""
    body = f'{{"scope":"team","id":"{user}","capacity":8000,"refillPerSec":16.6667}}'
    answer = server.post("/config/budget", content=body, headers=FORM)
    assert answer.status_code == 200
    assert answer.json() == {
        "scope": "team",
        "id": user,
        "meter": "tokens",
        "model": None,
        "capacity": 8000,
        "refillPerSec": 16.6667,
        "maxDebt": 80_000,
        "level": 8000,
        "source": "explicit",
    }


def test_change_binds_the_next_call(server, fake, user):
    """A lowered budget refuses the very next call, and a raised one lets it pass."""
    client = server.client(user)
    ask = {"model": "m", "messages": MESSAGES, "max_tokens": 50}
    client.chat.completions.create(**ask)
    server.set_budget("user", user, 20, level=0)
    with pytest.raises(openai.RateLimitError):
        client.chat.completions.create(**ask)
    server.set_budget("user", user, 1000)
    client.chat.completions.create(**ask)
    assert server.level("user", user) == 1000 - 20 - 30


def test_lowering_below_what_was_used_starts_in_debt(server, fake, user):
    """What was used stays used when a budget changes."""
    server.set_budget("user", user, 500)
    server.client(user).chat.completions.create(model="m", messages=MESSAGES)
    assert server.set_budget("user", user, 10)["level"] == 10 - 30


def test_deleted_budget_gives_way_to_the_default(server, user):
    """Removing a budget tells the default that holds now; removing it again is a 404."""
    url = f"{server.url}/config/budget/user/{user}"
    server.set_budget("user", user, 5)
    assert httpx.get(url).json()["source"] == "explicit"
    answer = httpx.delete(url)
    assert answer.json() == {"deleted": True, "default": httpx.get(url).json()}
    assert answer.json()["default"]["capacity"] == 10**6
    again = httpx.delete(url)
    assert (again.status_code, error_of(again)["code"]) == (404, "budget_not_found")


def test_unlimited_scope_has_no_budget_to_show(server, user):
    """A scope with neither a budget nor a default is a 404 that says it is unlimited."""
    answer = httpx.get(f"{server.url}/config/budget/role/{user}")
    assert answer.status_code == 404
    assert "unlimited" in error_of(answer)["message"]


def test_list_comes_in_pages_and_misses_none(server, user):
    """Following ``after`` shows every budget once, with its meter and model."""
    for number in range(5):
        server.set_budget("role", f"{user}/{number}", 10 + number)
    server.set_budget("role", f"{user}/4", 3, meter="requests", model="m")
    seen, after = [], ""
    for _ in range(1000):
        page = httpx.get(f"{server.url}/config/budget", params={"limit": 2, "after": after}).json()
        seen += page["data"]
        after = page["after"]
        if not page["has_more"]:
            break
    ours = [(item["id"], item["meter"], item["model"], item["capacity"]) for item in seen if user in item["id"]]
    assert sorted(ours, key=str) == sorted(
        [(f"{user}/{number}", "tokens", None, 10 + number) for number in range(5)]
        + [(f"{user}/4", "requests", "m", 3)],
        key=str,
    )


@pytest.mark.parametrize(
    ("change", "field", "shown"),
    [
        ({"scope": "planet"}, "scope", "'planet'"),
        ({"id": None}, "id", "None"),
        ({"id": ""}, "id", "0"),
        ({"id": "a\x1fb"}, "id", "a\\x1fb"),
        ({"capacity": 0}, "capacity", "0"),
        ({"capacity": 1.5}, "capacity", "1.5"),
        ({"capacity": True}, "capacity", "True"),
        ({"capacity": "100"}, "capacity", "'100'"),
        ({"capacity": 10**12 + 1}, "capacity", "1000000000001"),
        ({"refillPerSec": -1}, "refillPerSec", "-1"),
        ({"refillPerSec": "5"}, "refillPerSec", "'5'"),
        ({"refillPerSec": 10**13}, "refillPerSec", "10000000000000"),
        ({"meter": "usd"}, "meter", "'usd'"),
        ({"model": 5}, "model", "5"),
        ({"maxDebt": -1}, "maxDebt", "-1"),
        ({"level": 101}, "level", "101"),
        ({"refill_per_sec": 5}, "refill_per_sec", "refill_per_sec"),
    ],
)
def test_bad_budget_is_refused_and_changes_nothing(server, user, change, field, shown):
    """Each bad field is a 400 that names it and what was given, and the budget stays as it was."""
    before = server.set_budget("user", user, 100, refill=0)
    answer = server.post(
        "/config/budget", json={"scope": "user", "id": user, "capacity": 100, "refillPerSec": 5, **change}
    )
    assert answer.status_code == 400
    error = error_of(answer)
    assert error["param"] == field
    assert shown in error["message"]
    assert httpx.get(f"{server.url}/config/budget/user/{user}").json() == before


@pytest.mark.parametrize("path", ["/config/budget/user/{}?metre=requests", "/config/budget?scope=user"])
def test_misspelled_parameter_touches_no_budget(server, user, path):
    """A parameter that is not one is refused, and no other budget is shown or removed in its stead."""
    server.set_budget("user", user, 5)
    answer = httpx.delete(server.url + path.format(user))
    assert answer.status_code in (400, 405)
    answer = httpx.get(server.url + path.format(user))
    assert answer.status_code == 400
    assert "is not a parameter; allowed are" in error_of(answer)["message"]
    assert server.level("user", user) == 5


def test_global_scope_needs_no_id_in_the_path_either(server):
    """``/config/budget/global`` is the global scope; any other kind needs an id."""
    assert httpx.get(f"{server.url}/config/budget/global").json()["capacity"] == 10**9
    assert httpx.get(f"{server.url}/config/budget/team").status_code == 400


def test_missing_fields_are_named(server):
    """A budget without a capacity says that it is the capacity that is missing."""
    answer = server.post("/config/budget", json={"scope": "user", "id": "x", "refillPerSec": 1})
    assert "capacity" in error_of(answer)["message"]
    assert "got nothing" in error_of(answer)["message"]


@pytest.mark.parametrize(
    "headers",
    [
        {"x-forwarded-for": "127.0.0.1"},
        {"forwarded": "for=127.0.0.1"},
        {"host": "tokenguard.example.com"},
        {"origin": "https://evil.example.com"},
    ],
)
def test_without_a_token_only_peers_nearby_may_speak_for_themselves(server, headers):
    """A forwarded request, a foreign Host and a page of another site are refused, and told what to do."""
    answer = httpx.get(f"{server.url}/config/budget", headers=headers)
    assert answer.status_code == 403
    assert "TOKENGUARD_ADMIN_TOKEN" in error_of(answer)["message"]


def test_proxy_that_says_nothing_of_itself_is_not_this_machine(server):
    """A bare reverse proxy forwards as HTTP/1.0 from the loopback: its callers are strangers."""
    with socket.create_connection(httpx.URL(server.url).netloc.decode().split(":")) as connection:
        connection.sendall(b"GET /config/budget HTTP/1.0\r\nhost: 127.0.0.1\r\n\r\n")
        assert b" 403 " in connection.makefile("rb").readline()


@pytest.mark.parametrize("path", ["//config/budget", "/config/budget/", "/%63onfig/budget", "/config//budget"])
def test_no_way_of_writing_the_path_evades_the_rule(server, path):
    """A stranger is refused, or finds nothing, however the path is written."""
    answer = httpx.get(server.url + path, headers={"x-forwarded-for": "127.0.0.1"})
    assert answer.status_code in (403, 404)


def test_with_a_token_only_its_holder_may(upstream_url, tmp_path):
    """With a token set, its holder may from anywhere and nobody else may, and no log or error shows it."""
    token = "the-admins-secret"
    with running(
        tmp_path, "serve", OPENAI_API_KEY=OUR_KEY, OPENAI_BASE_URL=upstream_url, TOKENGUARD_ADMIN_TOKEN=token
    ) as server:
        url = f"{server.url}/config/budget"
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": token}):
            answer = httpx.get(url, headers=headers)
            assert answer.status_code == 401
            assert answer.headers["www-authenticate"] == "Bearer"
            assert token not in answer.text
        trusted = {"authorization": f"Bearer {token}", "x-forwarded-for": "10.0.0.1"}
        assert httpx.get(url, headers=trusted).status_code == 200
        assert token not in server.log
