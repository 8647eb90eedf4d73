"""The folder sets the mark: ``pytest -m unit`` and ``pytest tests/unit`` run the same tests."""

from pathlib import Path

import pytest

from tests.redis_servers import RedisServer

TESTS = Path(__file__).parent


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.is_relative_to(TESTS):
            item.add_marker(item.path.relative_to(TESTS).parts[0])


@pytest.fixture(scope="session")
def redis_server():
    """A server for the whole run, for tests that leave it as it is."""
    with RedisServer() as server:
        yield server
