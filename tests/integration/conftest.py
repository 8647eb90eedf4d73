"""Real parts beside the code: a Redis server of the tests' own."""

import shutil
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

START_SECONDS = 10


@dataclass(frozen=True)
class RedisServer:
    """A Redis server that listens on a socket file only, and keeps nothing on disk."""

    path: Path
    pid: int

    @property
    def url(self) -> str:
        """The address as ``REDIS_URL`` has it."""
        return f"unix://{self.path}"

    def connect(self) -> socket.socket:
        """Open a connection of its own, which gives up after a few seconds."""
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(START_SECONDS)
        try:
            connection.connect(str(self.path))
        except OSError:
            connection.close()
            raise
        return connection


def redis_command() -> str:
    """Find redis-server: beside this Python first, where ``tests/get-redis`` puts it, and then on PATH."""
    beside = Path(sys.executable).parent
    command = shutil.which("redis-server", path=beside) or shutil.which("redis-server")
    if command is None:
        pytest.fail("there is no redis-server: run make test, or tests/get-redis", pytrace=False)
    return command


@pytest.fixture(scope="session")
def redis_server():
    """Start a Redis server for the whole run, and stop it after the last test."""
    command = redis_command()
    # NOTE: not pytest's own folder; the path of a socket file may have no more than 107 bytes.
    with tempfile.TemporaryDirectory(prefix="redis-") as folder:
        path, log = Path(folder, "socket"), Path(folder, "log")
        call = [
            command,
            "--port",
            "0",
            "--unixsocket",
            path,
            "--save",
            "",
            "--appendonly",
            "no",
            "--dir",
            folder,
        ]
        with log.open("wb") as output, subprocess.Popen(call, stdout=output, stderr=output) as process:
            server = RedisServer(path, process.pid)
            try:
                wait_until_ready(server, process, log)
                yield server
            finally:
                process.terminate()
                process.wait(START_SECONDS)


def wait_until_ready(server, process, log):
    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        try:
            server.connect().close()
        except OSError:
            time.sleep(0.01)
        else:
            return
    pytest.fail(f"redis-server does not start:\n{log.read_text()}", pytrace=False)
