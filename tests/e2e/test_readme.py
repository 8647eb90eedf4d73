"""The README's commands do what it says they do."""

import re
import shlex

import pytest

from tests.e2e.conftest import running
from tests.e2e.pages import page, request

README = page("README.md")


def curls():
    """Return the README's curl commands, in their order, as lists of words; a loop's twice, as it runs."""
    text = "\n".join(re.findall(r"```console\n(.*?)```", README, re.DOTALL)).replace("\\\n", " ")
    commands = []
    for line in text.splitlines():
        if found := re.search(r"(curl .*?)(; done)?$", line):
            words = shlex.split(found[1], comments=True)
            commands += [words] * (2 if line.startswith("$ for call in 1 2") else 1)
    return commands


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """What the README's commands are answered, one after the other, by ``tokenguard demo``."""
    with running(tmp_path_factory.mktemp("readme"), "demo") as server:
        return [request(words, server.url) for words in curls()]


def test_all_commands_work_but_the_one_that_is_refused(answers):
    """Every command of the README is answered with 200, and bob's second call with 429."""
    assert len(answers) >= 9
    statuses = [answer.status_code for answer in answers]
    assert statuses == [200, 200, 200, 429, *[200] * (len(answers) - 4)]


def test_refusal_is_the_one_shown(answers):
    """The 429 of the README is the one that comes, but for the time that passed."""
    (refused,) = (answer for answer in answers if answer.status_code == 429)
    shown = re.search(r'"message":"(Rate limit.*?Please try again in )[\d.]+s(\. .*?)"', README)
    said = refused.json()["error"]["message"]
    assert said.startswith(shown[1])
    assert said.endswith(shown[2])
    for name in re.findall(r"^((?:retry|x-ratelimit)\S+): ", README, re.MULTILINE):
        assert name in refused.headers
    assert f'"{refused.json()["tokenguard"]["scope"]}"' in README


def test_budget_is_answered_as_shown(answers):
    """What setting bob's budget answers stands in the README to the letter."""
    assert answers[1].text.strip() in README
