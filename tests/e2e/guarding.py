"""Calls to a server that guards a provider with limits, and what it tells of them."""

from __future__ import annotations

from itertools import count

from tests.nodes import until

FROM_HEADERS = (("requests", "headers"), ("tokens", "headers"))
FROM_ADMIN = (("requests", "admin"), ("tokens", "admin"))
LONG_S = 40
"""A wait that no test outlasts."""

other_models = map("other-model-{}".format, count())
"""Models that no other test knows."""


def ask(server, model, user="alice", **more):
    """Make a small call, on a connection of its own."""
    body = {"model": model, "messages": [{"role": "user", "content": "Say hello"}], "max_tokens": 20, **more}
    return server.post("/v1/chat/completions", json=body, headers={"x-user-id": user})


def budgets(server):
    """Return all budgets that are listed, page by page."""
    seen, after = [], ""
    while True:
        page = server.get("/config/budget", params={"limit": 1000, "after": after}).json()
        seen += page["data"]
        if not page["has_more"]:
            return seen
        after = page["after"]


def of_model(server, model):
    """Return the budgets of a model, by meter and source."""
    return {(one["meter"], one["source"]): one for one in budgets(server) if one["model"] == model}


def learned(server, model, *names):
    """Wait until a model has just these budgets, by meter and source; return them."""
    until(lambda: of_model(server, model).keys() == set(names), f"not learned: {names}")
    return of_model(server, model)


def terms(budget):
    return budget["scope"], budget["id"], budget["capacity"], budget["refillPerSec"]


def sync(server, method="GET", **query):
    """Synchronise; return the answer and its models by name."""
    answer = server.request(method, "/sync/openai-limits", params=query)
    assert answer.status_code == 200, answer.text
    return answer.json(), {one["model"]: one for one in answer.json()["data"]}


def health(server):
    return server.get("/").json()


def refused_by_us(answer):
    """Return whether a call was refused before it reached the provider."""
    return answer.status_code == 429 and "x-upstream-request-id" not in answer.headers


def nothing_told(told):
    """Leave all fields out that tell limits."""
    return {}
