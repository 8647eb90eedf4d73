"""The folder sets the mark: ``pytest -m unit`` and ``pytest tests/unit`` run the same tests."""

from pathlib import Path

TESTS = Path(__file__).parent


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.is_relative_to(TESTS):
            item.add_marker(item.path.relative_to(TESTS).parts[0])
