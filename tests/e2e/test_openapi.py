"""The description of the API and the API say the same: what one allows the other accepts, and no more."""

import copy
import json
import re
from pathlib import Path

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode

from tests.e2e.conftest import running

ROOT = Path(__file__).parents[2]
DESCRIPTION = json.loads((ROOT / "tokenguard/api/openapi.json").read_text())

AMPLE = {f"{what}_{scope}": 10**12 for what in ("CAP", "RATE") for scope in ("GLOBAL", "TEAM", "USER")}


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A server that needs no key, whose budgets are far away."""
    with running(tmp_path_factory.mktemp("demo"), "demo", **AMPLE) as server:
        yield server


def with_any_ids():
    """Return the description without the identity headers' pattern.

    It tells which ids every client can send. The server takes any UTF-8, so that breaking it is no mistake.
    """
    loose = copy.deepcopy(DESCRIPTION)
    for parameter in loose["paths"]["/v1/chat/completions"]["post"]["parameters"]:
        del parameter["schema"]["pattern"]
    return loose


SCHEMAS = {GenerationMode.POSITIVE: DESCRIPTION, GenerationMode.NEGATIVE: with_any_ids()}
RELATED = ("level", "maxDebt", "refillPerSec", "probe")
"""Fields whose bounds depend on another's, or on a setting, which a schema cannot tell."""

OPERATIONS = {
    (found.ok().label, mode): found.ok()
    for mode, description in SCHEMAS.items()
    for found in schemathesis.openapi.from_dict(description).get_all_operations()
}


@pytest.mark.parametrize(("label", "mode"), OPERATIONS)
def test_server_keeps_to_its_description(demo, label, mode):
    """Whatever is sent, valid or not, the status, the fields and the body are among those described."""

    @given(case=OPERATIONS[label, mode].as_strategy(generation_mode=mode))
    @settings(
        max_examples=40, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )
    def check(case):
        response = case.call(base_url=demo.url, timeout=10)
        if response.status_code != 400 or response.json()["error"]["param"] not in RELATED:
            case.validate_response(response)

    try:
        check()
    except Unsatisfiable:
        assert mode is GenerationMode.NEGATIVE  # nothing about it can be wrong
    assert "Traceback" not in demo.log


def test_description_is_served_with_the_version(demo):
    """What is served is the file, with the version that runs."""
    served = httpx.get(f"{demo.url}/openapi.json").json()
    assert served["info"]["version"] == httpx.get(demo.url).json()["version"]
    assert {**served, "info": None} == {**DESCRIPTION, "info": None}


def test_every_path_is_in_the_api_page():
    """What is described stands in docs/api.md too, and the codes of its errors are those that are answered."""
    page = (ROOT / "docs/api.md").read_text()
    for path in DESCRIPTION["paths"]:
        pattern = re.escape(re.sub(r"{model}", "{id}", path)).replace(re.escape("/{scope}"), ".*")
        assert re.search(pattern, page), path
    statuses = set(re.findall(r"^\| (\d{3}) \|", page, re.MULTILINE))
    assert statuses <= DESCRIPTION["paths"]["/v1/chat/completions"]["post"]["responses"].keys()
