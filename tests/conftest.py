"""The folder sets the mark: ``pytest -m unit`` and ``pytest tests/unit`` run the same tests."""

from pathlib import Path

import pytest

from tests.compiled import stale

TESTS = Path(__file__).parent


def pytest_sessionstart(session):
    """Refuse to test what is not what is compiled."""
    if old := stale():
        raise pytest.UsageError(f"{', '.join(old)} must be compiled (anew): run `make runtime`")


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.is_relative_to(TESTS):
            item.add_marker(item.path.relative_to(TESTS).parts[0])
