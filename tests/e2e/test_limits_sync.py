"""The provider's own limits are read from its admin API: when an administrator asks, and all the time."""

import subprocess
import sys

import httpx
import pytest

from tests.e2e.conftest import OUR_KEY, environment, running, running_workers
from tests.e2e.guarding import (
    FROM_ADMIN,
    FROM_HEADERS,
    ask,
    budgets,
    learned,
    of_model,
    other_models,
    refused_by_us,
    sync,
    terms,
)
from tests.e2e.limited_openai import ADMIN_KEY, admin_row, answering, cut, error, failing, forbidden, silent
from tests.e2e.test_budgets import error_of
from tests.nodes import until
from tests.provider_limit import Limit, Limits

BEYOND_A_PAGE = 120
"""More models than anybody asks for at once."""

# --- the admin API -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_sync_applies_what_the_admin_api_tells(guard, provider, model, method):
    """It tells limit, rate, source, age and what changed, and a second time that nothing did."""
    other = next(other_models)
    provider.rows = [admin_row(model, 600, 30_000), admin_row(other, 60, 6_000, max_requests_per_1_day=200)]
    answer, models = sync(guard, method)
    assert (answer["object"], answer["dryRun"]) == ("provider_limits", False)
    assert models[model]["requestsPerMinute"] == 600
    assert models[model]["tokensPerMinute"] == 30_000
    assert models[other]["requestsPerMinute"] == pytest.approx(200 / 1440, rel=1e-4)
    limits = {limit["meter"]: limit for limit in models[model]["limits"]}
    assert limits["tokens"] == {
        "meter": "tokens",
        "source": "admin",
        "limit": 30_000,
        "windowS": 60,
        "refillPerSec": 500,
        "level": 30_000,
        "ageS": limits["tokens"]["ageS"],
        "changed": {"from": None, "to": limits["tokens"]["changed"]["to"]},
    }
    assert limits["tokens"]["ageS"] >= 0
    assert limits["tokens"]["changed"]["to"].items() >= {"limit": 30_000, "refillPerSec": 500}.items()
    assert terms(of_model(guard, model)[FROM_ADMIN[1]]) == ("global", "*", 30_000, 500)

    _, models = sync(guard, method)
    assert [limit["changed"] for limit in models[model]["limits"]] == [None, None]

    provider.rows[0] = admin_row(model, 600, 12_000)
    _, models = sync(guard, method)
    changed = {limit["meter"]: limit["changed"] for limit in models[model]["limits"]}
    assert changed["requests"] is None
    assert changed["tokens"]["from"].items() >= {"limit": 30_000, "refillPerSec": 500}.items()
    assert changed["tokens"]["to"].items() >= {"limit": 12_000, "refillPerSec": 200}.items()


def test_admin_limit_binds_the_next_call(guard, provider, model):
    """What sync applied refuses on every worker and node, without any header field."""
    provider.rows = [admin_row(model, 2, 30_000)]
    sync(guard)
    answers = [ask(guard, model) for _ in range(5)]
    assert [answer.status_code for answer in answers[:2]] == [200, 200]
    assert refused_by_us(answers[-1])
    assert provider.count(model) < 5


def test_sync_lowers_what_is_left_and_never_raises_it(guard, provider, model):
    """To synchronise again gives nobody anything, nor does a limit that was raised and lowered."""
    provider.rows = [admin_row(model, 1, 30_000)]
    sync(guard)
    assert ask(guard, model).status_code == 200
    for limit in (1, 2, 1):
        provider.rows = [admin_row(model, limit, 30_000)]
        sync(guard)
    assert of_model(guard, model)[FROM_ADMIN[0]]["level"] <= 0
    assert refused_by_us(ask(guard, model))


def test_dry_run_changes_nothing(guard, provider, model):
    """It tells what would change."""
    provider.rows = [admin_row(model, 600, 30_000)]
    answer, models = sync(guard, dry_run=1)
    assert answer["dryRun"] is True
    changed = {limit["meter"]: limit["changed"] for limit in models[model]["limits"]}
    assert changed["tokens"]["from"] is None
    assert changed["tokens"]["to"]["limit"] == 30_000
    assert of_model(guard, model) == {}


def test_all_pages_are_read(guard, provider):
    """Models beyond the first page are models too."""
    names = [next(other_models) for _ in range(BEYOND_A_PAGE)]
    provider.rows = [admin_row(name, 10, 1000) for name in names]
    _, models = sync(guard)
    assert models.keys() >= set(names)
    assert {one["model"] for one in budgets(guard)} >= set(names)


def test_minimum_counts_where_sources_disagree(guard, provider, model):
    """Both are told, both bind, and the tighter is what may be had."""
    provider.limits[model] = Limits(Limit(600), Limit(30_000))
    provider.rows = [admin_row(model, 700, 20_000)]
    ask(guard, model)
    learned(guard, model, *FROM_HEADERS)
    _, models = sync(guard)
    assert (models[model]["requestsPerMinute"], models[model]["tokensPerMinute"]) == (600, 20_000)
    told = {(limit["meter"], limit["source"]): limit["limit"] for limit in models[model]["limits"]}
    assert told == {
        ("requests", "headers"): 600,
        ("tokens", "headers"): 30_000,
        ("requests", "admin"): 700,
        ("tokens", "admin"): 20_000,
    }
    assert of_model(guard, model).keys() == told.keys()


NO_LIST = answering(200, b"<html>Sign in</html>")
ODD_LIST = answering(200, b'{"object":"list","data":[{"model":5}],"has_more":false}')
NO_END = answering(200, b'{"object":"list","data":[],"has_more":true,"last_id":null}')
FAILURES = {
    "forbidden": ({1: forbidden}, "insufficient permissions"),
    "an error": ({1: failing}, "had an error"),
    "cut off": ({1: cut}, ""),
    "no list": ({1: NO_LIST}, ""),
    "an odd list": ({1: ODD_LIST}, ""),
    "a list without an end": ({1: NO_END}, ""),
    "an error on the second page": ({2: failing}, "had an error"),
    "cut off on the second page": ({2: cut}, ""),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_error_of_the_admin_api_changes_nothing(guard, provider, model, failure):
    """It is a 502 with the provider's own message, and every budget is as before."""
    provider.rows = [admin_row(model, 600, 30_000)]
    sync(guard)
    before = lasting_budgets(guard)
    provider.rows = [admin_row(next(other_models), 1, 1) for _ in range(BEYOND_A_PAGE)]
    provider.rows[0] = admin_row(model, 1, 1)
    provider.admin_scripts, message = FAILURES[failure]
    answer = guard.get("/sync/openai-limits")
    assert_provider_error(answer, message)
    assert lasting_budgets(guard) == before


def lasting_budgets(guard):
    """Return all budgets but gates, which go when their time has come."""
    return [
        (one["id"], one["meter"], one["model"], terms(one)) for one in budgets(guard) if one["meter"] != "gate"
    ]


def assert_provider_error(answer, message):
    assert answer.status_code == 502, answer.text
    error = error_of(answer)
    assert (error["type"], error["code"]) == ("upstream_error", "provider_error")
    assert message in error["message"]
    assert ADMIN_KEY not in answer.text


def test_silence_of_the_admin_api_ends(provider, administered, tmp_path):
    """A provider that does not answer is a 502 within the time that it is given."""
    provider.admin_scripts[1] = silent
    times = {"TOKENGUARD_READ_TIMEOUT_S": 0.5, "TOKENGUARD_TOTAL_TIMEOUT_S": 1}
    with running(tmp_path, "serve", **administered, **times) as server:
        answer = httpx.get(f"{server.url}/sync/openai-limits", timeout=30)
        assert_provider_error(answer, "did not answer")


def test_provider_that_is_not_there_is_told(provider, administered, tmp_path):
    """No connection is a 502 too."""
    nowhere = {**administered, "OPENAI_BASE_URL": "http://127.0.0.1:9/v1"}
    with running(tmp_path, "serve", **nowhere) as server:
        assert_provider_error(server.get("/sync/openai-limits"), "")


def test_project_that_is_not_there_is_told(provider, administered, tmp_path):
    """The admin API's flat error is read as well."""
    with running(tmp_path, "serve", **{**administered, "OPENAI_PROJECT_ID": "proj_elsewhere"}) as server:
        assert_provider_error(server.get("/sync/openai-limits"), "The project proj_elsewhere was not found")


@pytest.mark.parametrize("masks", [True, False])
def test_keys_are_never_shown(provider, administered, tmp_path, masks):
    """A wrong admin key is a 502 with the provider's message, without the key, even if the provider shows it."""
    provider.masks = masks
    key = "sk-admin-but-not-the-right-one"
    with running(tmp_path, "serve", **{**administered, "OPENAI_ADMIN_KEY": key}) as server:
        answer = server.get("/sync/openai-limits")
        assert_provider_error(answer, "Incorrect API key provided")
        assert key not in answer.text + server.get("/").text + server.log + server.start_line
        assert budgets(server) == []


def test_each_key_goes_where_it_belongs(guard, provider, model):
    """The admin key never reaches completions, nor the ordinary key the admin API."""
    provider.rows = [admin_row(model, 600, 30_000)]
    ask(guard, model)
    ask(guard, model, stream=True)
    probed = next(other_models)
    provider.limits[probed] = Limits(Limit(600), Limit(30_000))
    sync(guard, probe=probed)
    guard.get("/v1/models")
    assert provider.credentials("/v1/organization") == {f"Bearer {ADMIN_KEY}"}
    assert provider.credentials("/v1/chat") == provider.credentials("/v1/models") == {f"Bearer {OUR_KEY}"}


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_only_administrators_may_synchronise(guard, provider, method):
    """The rules are those of the budgets."""
    answer = guard.request(method, "/sync/openai-limits", headers={"x-forwarded-for": "10.0.0.1"})
    assert answer.status_code == 403
    assert "TOKENGUARD_ADMIN_TOKEN" in error_of(answer)["message"]
    assert provider.received == []


@pytest.mark.parametrize(
    "query",
    [{"dryrun": 1}, {"dry_run": "perhaps"}, {"dry_run": ["1", "0"]}, {"probe": ""}, {"probe": "a\x1fb"}],
    ids=str,
)
def test_odd_parameter_is_refused(guard, provider, query):
    """A misspelled dry run must not be a real one."""
    answer = guard.get("/sync/openai-limits", params=query)
    assert answer.status_code == 400
    assert provider.received == []


def test_body_is_refused(guard, provider):
    """Whoever puts ``dry_run`` into a body must not change anything by that."""
    answer = guard.request("POST", "/sync/openai-limits", json={"dry_run": True})
    assert answer.status_code == 400
    assert "dry_run and probe go into the query" in error_of(answer)["message"]
    assert provider.received == []


def test_without_an_admin_key_header_fields_are_the_source(provider, behind_limits, tmp_path, model):
    """The admin API is left alone, and what was seen on real traffic is told."""
    provider.limits[model] = Limits(Limit(600), Limit(30_000))
    with running(tmp_path, "serve", **behind_limits) as server:
        assert sync(server)[0]["data"] == []
        ask(server, model)
        learned(server, model, *FROM_HEADERS)
        _, models = sync(server)
        assert (models[model]["requestsPerMinute"], models[model]["tokensPerMinute"]) == (600, 30_000)
        assert {limit["source"] for limit in models[model]["limits"]} == {"headers"}
    assert provider.credentials("/v1/organization") == set()
    assert provider.count(model) == 1


def test_probe_is_one_smallest_completion(guard, provider, model):
    """Only if it is asked for, and what it tells is learned at once."""
    provider.limits[model] = Limits(Limit(600), Limit(30_000))
    sync(guard)
    assert provider.calls == []
    _, models = sync(guard, probe=model)
    assert provider.count(model) == len(provider.calls) == 1
    (probe,) = (one for one in provider.received if one.path.endswith("/chat/completions"))
    assert 1 in (probe.json.get("max_tokens"), probe.json.get("max_completion_tokens"))
    assert not probe.json.get("stream")
    assert (models[model]["requestsPerMinute"], models[model]["tokensPerMinute"]) == (600, 30_000)
    assert of_model(guard, model).keys() == set(FROM_HEADERS)


def test_probe_that_fails_is_told(guard, provider, model):
    """The provider's word is passed on, and nothing changes."""
    provider.scripts[model].append(
        answering(404, error("The model does not exist", "invalid_request_error", None))
    )
    assert_provider_error(guard.get("/sync/openai-limits", params={"probe": model}), "The model does not exist")
    assert of_model(guard, model) == {}


def test_admin_key_needs_a_project(tmp_path, behind_limits):
    """Limits are a project's: without one the server does not start, and says what to set."""
    done = subprocess.run(
        [sys.executable, "-m", "tokenguard", "serve", "--port", "0"],
        cwd=tmp_path,
        env=environment(**behind_limits, OPENAI_ADMIN_KEY=ADMIN_KEY),
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert done.returncode == 1
    assert "OPENAI_PROJECT_ID" in done.stderr
    assert ADMIN_KEY not in done.stderr


def test_page_of_the_api_is_in_step(guard):
    """The description of the API names the path."""
    paths = guard.get("/openapi.json").json()["paths"]
    assert {"get", "post"} <= paths["/sync/openai-limits"].keys()


# --- in the background -------------------------------------------------------------------------------------------


def test_admin_api_is_asked_again_and_again(provider, administered, tmp_path, model):
    """Without anybody asking, limits are applied and changes followed, and a failure in between does no harm."""
    provider.rows = [admin_row(model, 600, 30_000)]
    with running(tmp_path, "serve", **{**administered, "TOKENGUARD_SYNC_INTERVAL_S": 0.1}) as server:
        learned(server, model, *FROM_ADMIN)
        provider.admin_scripts[1] = failing
        count = len(provider.admin_at_s)
        until(lambda: len(provider.admin_at_s) >= count + 3, "it gives up")
        assert terms(of_model(server, model)[FROM_ADMIN[1]])[2] == 30_000
        provider.rows = [admin_row(model, 600, 12_000)]
        provider.admin_scripts.clear()
        until(lambda: terms(of_model(server, model)[FROM_ADMIN[1]])[2] == 12_000, "the change is not followed")
        assert ADMIN_KEY not in server.log


def test_one_process_of_a_node_asks(provider, administered, tmp_path, model):
    """Four workers ask no more often than one would."""
    provider.rows = [admin_row(model, 600, 30_000)]
    with running_workers(tmp_path, 4, **{**administered, "TOKENGUARD_SYNC_INTERVAL_S": 3}) as server:
        learned(server, model, *FROM_ADMIN)
        until(lambda: len(provider.admin_at_s) >= 3, "it gives up")
    assert provider.admin_at_s[2] - provider.admin_at_s[0] >= 2  # four that ask: one; a slow machine takes longer


def test_one_node_of_a_realm_asks(provider, administered, redis_server, tmp_path, model):
    """Nodes on one Redis ask no more often than one would, and all of them know."""
    provider.rows = [admin_row(model, 600, 30_000)]
    shared = {"REDIS_URL": redis_server.url, "TOKENGUARD_REALM": model, "TOKENGUARD_REDIS_TIMEOUT_S": 10}
    settings = {**administered, **shared, "TOKENGUARD_SYNC_INTERVAL_S": 3}
    with running(tmp_path, "serve", **settings) as a, running(tmp_path, "serve", **settings) as b:
        for node in (a, b):
            learned(node, model, *FROM_ADMIN)
        until(lambda: len(provider.admin_at_s) >= 3, "they give up")
    assert provider.admin_at_s[2] - provider.admin_at_s[0] >= 4  # two that ask: three, likewise
