"""The command line: ``tokenguard serve``, ``tokenguard demo``."""

from __future__ import annotations

import logging
import math
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import click
import uvicorn

from tokenguard import __version__, logs
from tokenguard.asgi import create_app
from tokenguard.config import Config, read_config
from tokenguard.demo import DemoUpstream
from tokenguard.errors import TokenGuardError
from tokenguard.upstream import HttpxUpstream, Upstream
from tokenguard.wiring import buckets, environment, provider

_log = logging.getLogger("tokenguard")

KEEPALIVE_S = 75
"""How long a caller's idle connection is kept: longer than clients keep theirs, so that it is they who close."""


class Cli(click.Group):
    """Shows an error of ours as one line, not as a traceback."""

    def invoke(self, ctx: click.Context) -> object:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except TokenGuardError as error:
            raise click.ClickException(str(error)) from error


@click.group(cls=Cli, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="tokenguard", message="%(prog)s %(version)s")
def main() -> None:
    """Keep every team, role and user of a shared LLM account within its token budget."""


_host = click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on.")
_port = click.option(
    "--port",
    default=8000,
    show_default=True,
    type=click.IntRange(0, 65535),
    help="The port; 0 picks a free one.",
)


@main.command()
@_host
@_port
def serve(host: str, port: int) -> None:
    """Guard the real provider.

    OPENAI_BASE_URL names it, and OPENAI_API_KEY is its key. Settings come from the environment and from .env;
    docs/settings.md describes them all.
    """
    config = _config()
    _run(config, HttpxUpstream(provider(config)), host, port)


@main.command()
@_host
@_port
def demo(host: str, port: int) -> None:
    """Guard a built-in demo that needs no key."""
    _run(_config(), DemoUpstream(), host, port)


def _config() -> Config:
    return read_config(environment())


def _run(config: Config, upstream: Upstream, host: str, port: int) -> None:
    logging.basicConfig(handlers=[logs.handler(as_json=config.log_json)], level=logging.INFO)
    for noisy in ("httpx", "httpcore"):
        logging.getLogger(noisy).setLevel(logging.WARNING)  # they log URLs and headers
    # The app cuts a connection by not completing the answer, and says why itself.
    logging.getLogger("uvicorn.error").addFilter(lambda record: "without completing response" not in record.msg)
    listening = _listen(host, port, config.caller_timeout_s)
    backend = buckets(config)
    app = create_app(config, upstream, backend)
    settings = uvicorn.Config(
        app,
        loop="uvloop",
        http="httptools",
        ws="none",
        lifespan="on",
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=KEEPALIVE_S,
        timeout_graceful_shutdown=config.shutdown_timeout_s,
    )
    guards = " | ".join((backend.describe(), f"upstream {upstream.describe()}", *_limits(config)))
    Server(settings, guards, config.shutdown_timeout_s).run([listening])


def _listen(host: str, port: int, caller_timeout_s: float) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listening = socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        # create_server adds the address to its message, which we name already; a failed look-up has no errno
        said = error.strerror if isinstance(error, socket.gaierror) else os.strerror(error.errno or 0)
        raise click.ClickException(f"cannot listen on {host} port {port}: {said}") from error
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        # Who takes nothing is given up, but what was written keeps its connection open until this is over.
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, math.ceil(caller_timeout_s * 1000))
    return listening


class Server(uvicorn.Server):
    """uvicorn, which says in one line where it listens and what it guards."""

    def __init__(self, config: uvicorn.Config, guards: str, patience_s: int) -> None:
        super().__init__(config)
        self._guards = guards
        self._patience_s = patience_s

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Stop on a signal, and be done then: uvicorn would raise it anew and so exit with an error."""
        with super().capture_signals():
            yield
            self._captured_signals.clear()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen, then say so."""
        await super().startup(sockets)
        if self.started:
            listening = self.servers[0].sockets[0].getsockname()
            host = f"[{listening[0]}]" if ":" in listening[0] else listening[0]
            click.echo(f"tokenguard {__version__} on http://{host}:{listening[1]} | {self._guards}")

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let running calls end, and say that this is what the wait is for."""
        if running := len(self.server_state.tasks):
            _log.info("stopping: %d running calls have %d s to end", running, self._patience_s)
        await super().shutdown(sockets)


def _limits(config: Config) -> list[str]:
    return [f"{kind} {scale.capacity} tokens, {float(scale.rate):g}/s" for kind, scale in config.defaults.items()]
