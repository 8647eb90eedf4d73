"""Who serves the same socket with buckets of its own is found, and nobody else is."""

import json
import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("how", "suspected"),
    [
        ("one socket", [[1], [0]]),
        ("a socket file", [[1], [0]]),
        ("sockets of their own", [[], []]),
        ("a table in common", [[], []]),
    ],
)
def test_only_those_who_serve_the_same_apart_are_suspected(tmp_path, how, suspected):
    """Not a sibling on another port, nor one that shares the table, nor one that guards nothing."""
    command = [sys.executable, "-m", "tests.integration.siblings", how, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.stderr == ""
    assert json.loads(done.stdout) == suspected
