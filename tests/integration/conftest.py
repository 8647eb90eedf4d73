"""Real parts beside the code: Redis servers of the tests' own, and cores that can be killed at every store."""

import asyncio
import gc
import inspect

import pytest
import trustme
import uvloop

from tests.nodes import HastyNode
from tests.provider import server_context
from tests.proxy import Road
from tests.redis_servers import RedisServer, valkey_command
from tests.variants import variant


@pytest.fixture(scope="session")
def authority():
    """Whose certificates nobody else vouches for."""
    return trustme.CA()


@pytest.fixture
def tls(authority):
    """What a server needs that is this host."""
    return server_context(authority, "localhost", "127.0.0.1")


@pytest.fixture(scope="session")
def redis_server():
    """A server for the whole run, for tests that leave it as it is."""
    with RedisServer() as server:
        yield server


@pytest.fixture(scope="session")
def valkey_server():
    """A Valkey for the whole run, likewise."""
    with RedisServer(command=valkey_command()) as server:
        yield server


@pytest.fixture(params=["redis", "valkey"])
def shared(request):
    """A server of each kind, emptied."""
    server = request.getfixturevalue(f"{request.param}_server")
    with server.client() as client:
        client.flushall()
    return server


@pytest.fixture
def redis():
    """A server of the test's own, which it may torture."""
    with RedisServer("--enable-debug-command", "yes") as server:
        yield server


@pytest.fixture
def node(redis):
    """A node on it, which is closed to callers when Redis is lost."""
    with HastyNode(redis.url) as node:
        yield node


@pytest.fixture
def road(redis):
    """A road to the test's own server."""
    with Road(redis.port) as road:
        yield road


@pytest.fixture(scope="session")
def variants(tmp_path_factory):
    """The folder in which variants of the core are built."""
    return tmp_path_factory.mktemp("variants")


@pytest.fixture(scope="session")
def test_core(variants):
    """The core as a test can kill it, and ask it for its turns."""
    return variant(variants, "TOKENGUARD_TEST_BUILD")


@pytest.fixture(scope="session")
def test_core_with_pid_lock(variants):
    """The same with the lock of systems that have no robust mutexes."""
    return variant(variants, "TOKENGUARD_TEST_BUILD", "TOKENGUARD_PID_LOCK")


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def runner(request):
    """Runs a test that is a coroutine, on a loop of each kind; what goes wrong in a callback fails the test."""
    troubles = []
    with asyncio.Runner(loop_factory=request.param) as runner:
        runner.get_loop().set_exception_handler(lambda _, context: troubles.append(context))
        yield runner
        gc.collect()  # a task whose error nobody took tells of it when it goes
    assert not troubles


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    """Run a test that is a coroutine."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    given = {name: pyfuncitem.funcargs[name] for name in inspect.signature(pyfuncitem.obj).parameters}
    pyfuncitem.funcargs["runner"].run(asyncio.wait_for(pyfuncitem.obj(**given), 30))
    return True
