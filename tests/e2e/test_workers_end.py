"""How workers and their supervisor end, and that nobody and nothing is left."""

import asyncio
import os
import signal
import socket
from contextlib import suppress

import httpx
import openai
import pytest

from tests.e2e.conftest import OUR_KEY, running, running_workers
from tests.e2e.fake_openai import DONE, EVENTS, delta, event, usage_of
from tests.e2e.test_server import tokenguard
from tests.nodes import until
from tests.processes import group_of, until_gone

WORKERS = 2
GRANT = 1000
MESSAGES = [{"role": "user", "content": "Say hello"}]
PROMPT = 9
TAKEN = 30


@pytest.fixture
def settings(tmp_path, upstream_url):
    """Fixed grants, and a state that outlives the server."""
    return {
        "OPENAI_API_KEY": OUR_KEY,
        "OPENAI_BASE_URL": upstream_url,
        "CAP_USER": GRANT,
        "RATE_USER": 0,
        "TOKENGUARD_STATE": tmp_path / "state",
    }


@pytest.fixture
def go_on(fake, upstream_loop):
    """Makes the provider stream a word, and another once this is called; the usage comes at the end."""
    goes_on = asyncio.Event()

    async def script(reply):
        await reply.head(headers=EVENTS)
        await reply.piece(event(reply.received, delta("one")))
        await goes_on.wait()
        await reply.piece(event(reply.received, delta("two")))
        await reply.piece(event(reply.received, [], usage_of(PROMPT, TAKEN - PROMPT)) + DONE)
        await reply.end()

    fake.script = script
    yield lambda: upstream_loop.call_soon_threadsafe(goes_on.set)
    upstream_loop.call_soon_threadsafe(goes_on.set)


def stream_of_each(server, user):
    """Begin a stream through each worker."""
    streams = []
    for worker in server.workers:
        with server.only(worker):
            stream = server.client(user).chat.completions.create(model="m", messages=MESSAGES, stream=True)
            assert next(stream).choices[0].delta.content == "one"
            streams.append(stream)
    assert len(streams) == WORKERS
    return streams


def until_they_stop(server):
    """Wait until each worker has said that it waits for its stream."""
    said = "stopping: 1 running calls"
    until(lambda: server.log.count(said) == WORKERS or not server.workers, "they do not stop")
    assert server.log.count(said) == WORKERS


def rest(stream):
    return [choice.delta.content for chunk in stream for choice in chunk.choices]


def gives_its_port_up(server):
    """Return whether somebody else could listen where it did."""
    with suppress(OSError), socket.create_server(("127.0.0.1", httpx.URL(server.url).port)):
        return True
    return False


def refuses(server):
    """Return whether a new connection is refused. One that is neither that nor answered fails the test."""
    try:
        httpx.get(server.url, timeout=3, verify=False)
    except httpx.ConnectError:
        return True
    except (httpx.ReadError, httpx.RemoteProtocolError):  # it came just before the end
        pass
    return False


def level_after_a_restart(folder, settings, user):
    with running_workers(folder, WORKERS, **settings) as server:
        return server.level("user", user)


@pytest.mark.parametrize(
    ("send", "number"),
    [
        (os.kill, signal.SIGTERM),
        (os.killpg, signal.SIGTERM),
        pytest.param(os.killpg, signal.SIGINT, id="Ctrl-C"),
        pytest.param(os.killpg, signal.SIGHUP, id="the terminal is gone"),
    ],
)
def test_stopping_lets_the_streams_of_all_workers_end(tmp_path, settings, go_on, user, send, number):
    """They are delivered whole and settled, the exit code is 0, and neither process nor lock nor port is left."""
    with running_workers(tmp_path, WORKERS, **settings) as server:
        streams = stream_of_each(server, user)
        send(server.process.pid, number)
        until_they_stop(server)
        go_on()
        assert [rest(stream) for stream in streams] == [["two"]] * WORKERS
        assert server.process.wait(20) == 0
        assert gives_its_port_up(server)
        assert group_of(server.process.pid) == []
        assert list(tmp_path.glob("state.*")) == []
    assert level_after_a_restart(tmp_path, settings, user) == GRANT - WORKERS * TAKEN


def test_nobody_is_let_in_while_it_stops(tmp_path, settings, go_on, user):
    """A new connection is refused, rather than left waiting for a worker that never comes."""
    with running_workers(tmp_path, WORKERS, **settings) as server:
        streams = stream_of_each(server, user)
        server.process.terminate()
        until_they_stop(server)
        until(lambda: refuses(server), "somebody listens")
        go_on()
        for stream in streams:
            rest(stream)


def test_streams_that_do_not_end_in_time_are_cut_and_settled(tmp_path, settings, go_on, user):
    """When patience is over each is charged for what came of it, and the exit code is 0."""
    with running_workers(tmp_path, WORKERS, **settings, TOKENGUARD_SHUTDOWN_TIMEOUT_S=1) as server:
        streams = stream_of_each(server, user)
        assert server.stop() == 0
        for stream in streams:
            with pytest.raises((openai.APIConnectionError, httpx.RemoteProtocolError)):
                rest(stream)
        assert server.log.count("stopping: 1 running calls have 1 s to end") == WORKERS
    assert level_after_a_restart(tmp_path, settings, user) == GRANT - WORKERS * (PROMPT + 1)


@pytest.mark.parametrize("send", [os.kill, os.killpg])
def test_second_interrupt_waits_for_nobody(tmp_path, settings, go_on, user, send):
    """Who presses Ctrl-C again has the server end at once: streams are cut, and settled for what came of them."""
    with running_workers(tmp_path, WORKERS, **settings) as server:
        streams = stream_of_each(server, user)
        send(server.process.pid, signal.SIGINT)
        until_they_stop(server)
        send(server.process.pid, signal.SIGINT)
        assert server.process.wait(20) == 0
        for stream in streams:
            with pytest.raises((openai.APIConnectionError, httpx.RemoteProtocolError)):
                rest(stream)
        assert server.log.count("\n") == WORKERS
    assert level_after_a_restart(tmp_path, settings, user) == GRANT - WORKERS * (PROMPT + 1)


def test_workers_end_without_their_supervisor(tmp_path, settings, go_on, user):
    """When it is killed they stop as if told to: streams end, are settled and saved; then another may start."""
    with running_workers(tmp_path, WORKERS, **settings) as server:
        streams, workers = stream_of_each(server, user), server.workers
        server.process.kill()
        until(lambda: gives_its_port_up(server), "somebody listens")
        go_on()
        assert [rest(stream) for stream in streams] == [["two"]] * WORKERS
        until_gone(workers)
    assert level_after_a_restart(tmp_path, settings, user) == GRANT - WORKERS * TAKEN


def test_killed_worker_goes_on_from_the_last_settlement(tmp_path, settings, fake, user):
    """What is there when all workers die at once is there in those that take their places, and after a restart."""
    with running_workers(tmp_path, WORKERS, **settings) as server:
        server.client(user).chat.completions.create(model="m", messages=MESSAGES)
        server.set_budget("team", user, 77)
        before = server.workers
        for worker in before:
            os.kill(worker, signal.SIGKILL)
        until(lambda: len(set(server.workers) - set(before)) == WORKERS, "they are not replaced")
        assert server.level("user", user) == GRANT - TAKEN
        assert server.level("team", user) == 77
    assert level_after_a_restart(tmp_path, settings, user) == GRANT - TAKEN


def taken_port(folder):
    with running(folder, "demo", "--workers", "2") as server:
        yield ["--port", str(httpx.URL(server.url).port)], {}, "cannot listen on 127.0.0.1 port"


def foreign_state(folder):
    (folder / "state").write_text("my diary")
    yield [], {"TOKENGUARD_STATE": folder / "state"}, "no state of TokenGuard's"


def state_of_another(folder):
    state = {"TOKENGUARD_STATE": folder / "state"}
    with running(folder, "demo", "--workers", "2", **state):
        yield [], state, "another server"


def no_folder(folder):
    yield [], {"TOKENGUARD_STATE": folder / "nowhere" / "state"}, "there is no folder"


def foreign_table(folder):
    (folder / "table").write_text("my diary")
    yield [], {"TOKENGUARD_TABLE": folder / "table"}, "is no table"


def no_key(folder):
    yield [], {"OPENAI_API_KEY": ""}, "OPENAI_API_KEY is not set"


@pytest.mark.parametrize("bad", [taken_port, foreign_state, state_of_another, no_folder, foreign_table, no_key])
def test_bad_start_is_one_line_and_leaves_nobody(tmp_path, bad):
    """What is wrong is said once, not by each worker."""
    for options, settings, said in bad(tmp_path):
        settings = {"OPENAI_API_KEY": OUR_KEY, **settings}
        # Returns once nobody has the pipes of its output any more.
        done = tokenguard(tmp_path, "serve", "--workers", "2", *(options or ["--port", "0"]), **settings)
        assert done.returncode == 1
        assert done.stdout == ""
        assert said in done.stderr
        assert done.stderr.startswith("Error: ")
        assert done.stderr.count("\n") == 1
