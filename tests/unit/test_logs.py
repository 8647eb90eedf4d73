"""Log lines: one each, whatever is in them."""

import json
import logging

from hypothesis import given
from hypothesis import strategies as st

from tests.house import named
from tests.strategies import properties
from tokenguard.account import Account, Outcome
from tokenguard.logs import FIELDS, JsonFormatter, TextFormatter, fields_of
from tokenguard.model import Identity

anything = st.text(max_size=30) | st.sampled_from(["a\nb", "\r", "\x1b[31m", "\u2028", "\x85", '"', "=", "\ud800"])


def record(message, **fields):
    made = logging.LogRecord("tokenguard.calls", logging.INFO, "", 0, "%s", (message,), None)
    setattr(made, FIELDS, fields)
    return made


@given(anything, anything)
@properties
def test_text_line_is_one_line(message, value):
    """Nothing that a caller sends begins a line of its own, or hides what stands before it."""
    line = TextFormatter().format(record(message, user=value))
    assert line.isprintable()
    assert len(line.splitlines()) == 1
    line.encode()


@given(anything, anything)
@properties
def test_json_line_is_one_object(message, value):
    """A JSON line tells all as it was, in one line of ASCII."""
    line = JsonFormatter().format(record(message, user=value))
    assert line.isascii()
    assert "\n" not in line
    told = json.loads(line)
    assert (told["message"], told["user"], told["level"]) == (message, value, "info")


def test_traceback_is_part_of_a_json_line():
    """What should not have happened is one line too."""
    made = record("failed")
    try:
        raise ValueError("odd")
    except ValueError as error:
        made.exc_info = (type(error), error, error.__traceback__)
    assert "ValueError: odd" in json.loads(JsonFormatter().format(made))["traceback"]


def test_call_is_told_by_what_there_is():
    """Fields that a call does not have are left out."""
    account = Account("req-1")
    assert fields_of(account) == {"request_id": "req-1", "ms": 0.0}
    account.identity = Identity("alice", team="red")
    account.model, account.stream, account.estimate, account.admitted = "m", True, 263, True
    account.outcome, account.charged, account.forgiven = Outcome.SETTLED, 30, 2
    account.status, account.upstream_status, account.upstream_s, account.seconds = 200, 200, 0.0123, 0.02
    account.refused_by = named("user:alice")
    assert fields_of(account) == {
        "request_id": "req-1",
        "status": 200,
        "user": "alice",
        "team": "red",
        "model": "m",
        "stream": True,
        "refused_by": "user:alice on tokens",
        "estimate": 263,
        "outcome": "settled",
        "charged": 30,
        "forgiven": 2,
        "upstream_status": 200,
        "upstream_ms": 12.3,
        "ms": 20.0,
    }
