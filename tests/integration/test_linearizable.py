"""Many callers at once on one table: what came of every call is what one after the other would have found."""

import pickle
import subprocess
from itertools import pairwise

import pytest

from tests.history import STALE, check
from tests.variants import ROOT, command


def history_of(core, place, seed, folder):
    """Let the callers call; return what they did."""
    told = folder / "history"
    subprocess.run(command(core, "tests.integration.callers", told, place, seed), cwd=ROOT, check=True, timeout=60)
    return pickle.loads(told.read_bytes())


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("place", ["file", "fork"])
def test_every_call_has_one_moment(test_core, place, seed, tmp_path):
    """The oracle, asked in the order of the turns, says the same, and no clock contradicts that order."""
    history = history_of(test_core, place, seed, tmp_path)

    check(history)
    in_order = sorted((event for event in history if event.turn), key=lambda event: event.turn)
    assert sum(one.caller[0] != next_one.caller[0] for one, next_one in pairwise(in_order)) > 10, "no crowd"
    results = [event.result for event in history if event.kind == "reserve"]
    assert {result == STALE or result.allowed for result in results} == {True, False}
    assert STALE in results
