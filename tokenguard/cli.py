"""The command line: ``tokenguard serve``, ``tokenguard demo``."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

import click

from tokenguard import __version__, logs
from tokenguard._bucket import MAX_ROWS
from tokenguard.asgi import create_app
from tokenguard.backends import Backend
from tokenguard.config import Config, read_config
from tokenguard.demo import DemoUpstream
from tokenguard.engine import buckets, environment, node_of
from tokenguard.errors import TokenGuardError
from tokenguard.lane._lane import Lane
from tokenguard.server import listen, run, tell
from tokenguard.supervisor import Supervisor, Worker
from tokenguard.upstream import Upstream
from tokenguard.upstream._pool import PooledUpstream
from tokenguard.wiring import upstream_of


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

_workers = click.option(
    "--workers",
    type=click.IntRange(1, MAX_ROWS),
    help="How many processes serve; they share every bucket and every budget. [default: TOKENGUARD_WORKERS, or 1]",
)


@main.command()
@_host
@_port
@_workers
def serve(host: str, port: int, workers: int | None) -> None:
    """Guard the real provider.

    OPENAI_BASE_URL names it, and OPENAI_API_KEY is its key. Settings come from the environment and from .env;
    docs/settings.md describes them all.
    """
    config = _config()
    _run(config, upstream_of(config), host, port, workers)


@main.command()
@_host
@_port
@_workers
def demo(host: str, port: int, workers: int | None) -> None:
    """Guard a built-in demo that needs no key."""
    alone = replace(_config(), openai_api_key=None, openai_admin_key=None)  # no key of anybody's is used
    _run(alone, DemoUpstream(), host, port, workers)


def _config() -> Config:
    return read_config(environment())


def _run(config: Config, upstream: Upstream, host: str, port: int, workers: int | None) -> None:
    workers = workers or config.workers
    logging.basicConfig(handlers=[logs.handler(as_json=config.log_json)], level=logging.INFO)
    for noisy in ("httpx", "httpcore"):
        logging.getLogger(noisy).setLevel(logging.WARNING)  # they log URLs and headers
    listening = listen(host, port, config.caller_timeout_s)
    node = node_of(config)
    backend = buckets(config, node)
    crew = [f"{workers} workers"] if workers > 1 else []
    guards = " | ".join((*crew, backend.describe(), f"upstream {upstream.describe()}", *_limits(config)))

    def serve(backend: Backend, ready: Callable[[], None], lifeline: int | None = None) -> None:
        app = create_app(config, upstream, backend)
        run(
            app,
            listening,
            ready,
            caller_timeout_s=config.caller_timeout_s,
            patience_s=config.shutdown_timeout_s,
            lifeline=lifeline,
            lane=Lane(app.guard, upstream) if config.fast_lane and isinstance(upstream, PooledUpstream) else None,
        )

    def say() -> None:
        tell(listening, guards)

    def work(worker: Worker) -> None:
        serve(buckets(config, node), worker.ready, worker.lifeline)

    if workers == 1:
        serve(backend, say)
        return
    started = Supervisor(workers, work, say, listening.close, config.shutdown_timeout_s).run()
    backend.close()  # what the last worker settled is saved too
    if not started:
        raise SystemExit(1)


def _limits(config: Config) -> list[str]:
    return [f"{kind} {scale.capacity} tokens, {float(scale.rate):g}/s" for kind, scale in config.defaults.items()]
