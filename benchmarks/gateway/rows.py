"""The candidates: what each of them is, and how it is started and looked after."""

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

from benchmarks.gateway.calls import DRAINED, identity
from benchmarks.gateway.machine import CANDIDATE, on
from benchmarks.gateway.programs import NotToBeHad, found
from tokenguard.config import SETTINGS

FAR = 10**9
"""A budget that nobody comes near, in tokens and in tokens per second."""
FEW = 10
"""How many users there are where budgets are set one by one."""
START_S = 20
_ROOT = Path(__file__).parents[2]
_SCOPES = ("GLOBAL", "TEAM", "ROLEGROUP", "ROLE", "USER")
_FALCON = {"TOKENGUARD_FASTLANE": "off"}


class Server(NamedTuple):
    """A candidate that runs: its port, and the leader of the group of its processes."""

    port: int
    leader: int


@contextmanager
def _running(command, folder, environ, **more):
    """Run a server on the core of candidates, in a group of its own; yield the process."""
    log = Path(folder, "log")
    with (
        log.open("w") as errors,
        subprocess.Popen(
            command,
            cwd=folder,
            env=environ,
            stderr=errors,
            text=True,
            process_group=0,
            preexec_fn=on(CANDIDATE),
            **more,
        ) as process,
    ):
        try:
            yield process
        except NotToBeHad as error:
            process.terminate()
            process.wait()
            raise NotToBeHad(f"{error}: {log.read_text().strip()}") from None
        finally:
            process.terminate()


def _python(**more):
    return {"PATH": os.environ["PATH"], "PYTHONPATH": str(_ROOT), **more}


@contextmanager
def direct(_folder, upstream):
    """There is nothing in between: what is measured is the provider."""
    yield Server(*upstream)


@contextmanager
def nginx(folder, upstream, limits=(), buffering="on"):
    """A reverse proxy in C; ``limits`` are what its zones go by, each with a rate."""
    command, environ = found("nginx")
    port = _free_port()
    zones = [f"limit_req_zone {key} zone={name}:10m rate={rate};" for name, key, rate in limits]
    if any(key == "$drained" for _, key, _ in limits):
        zones.insert(0, f'map $http_x_user_id $drained {{ default ""; {DRAINED} $http_x_user_id; }}')
    template = Path(__file__).with_name("nginx.conf").read_text()
    conf = Path(folder, "nginx.conf")
    conf.write_text(
        template.format(
            folder=folder,
            user="user root;" if os.getuid() == 0 else "",
            port=port,
            upstream=upstream[0],
            zones="\n".join(zones),
            limits="\n".join(f"limit_req zone={name} {_burst(rate)};" for name, _, rate in limits),
            buffering=buffering,
        )
    )
    with _running([command, "-p", folder, "-c", conf, "-e", "stderr"], folder, environ) as process:
        _until_it_listens(process, port)
        yield Server(port, process.pid)


def _burst(rate):
    # nginx reckons in whole ms: without a burst, two requests within one would be one too many at any rate.
    return "burst=1000000 nodelay" if rate.endswith("r/s") else ""


_FIVE = tuple(
    (name, key, "1000000r/s")
    for name, key in (
        ("user", "$http_x_user_id"),
        ("team", "$http_x_team_id"),
        ("role", "$http_x_role"),
        ("uri", "$uri"),
        ("server", "$server_name$server_port"),
    )
)


@contextmanager
def tokenguard(folder, upstream, settings=None, budgets=()):
    """``tokenguard serve`` with a budget on each scope, and whatever else is set."""
    limits = {f"{kind}_{scope}": str(FAR) for kind in ("CAP", "RATE") for scope in _SCOPES}
    # A TokenGuard that does not know of a second path has only the one.
    known = {name: value for name, value in (settings or {}).items() if name in SETTINGS}
    environ = _python(
        OPENAI_API_KEY="sk-ours",
        OPENAI_BASE_URL=f"http://127.0.0.1:{upstream[0]}/v1",
        TOKENGUARD_MAX_CONNECTIONS="1024",
        **limits,
        **known,
    )
    command = [sys.executable, "-m", "tokenguard", "serve", "--port", "0"]
    with _running(command, folder, environ, stdout=subprocess.PIPE) as process:
        told = re.search(r":(\d+) ", process.stdout.readline())
        if told is None:
            raise NotToBeHad("it did not start")
        server = Server(int(told[1]), process.pid)
        for budget in (*budgets, {"scope": "user", "id": DRAINED, "capacity": 1, "refillPerSec": 0, "level": 0}):
            _set_budget(server, budget)
        yield server


def _set_budget(server, budget):
    urllib.request.urlopen(f"http://127.0.0.1:{server.port}/config/budget", json.dumps(budget).encode()).close()


def metrics(server):
    """Return what TokenGuard counted that has no labels, by name."""
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    return {
        name: float(value)
        for name, value in (line.split(" ")[:2] for line in lines if line[0] != "#")
        if "{" not in name
    }


def _twenty_buckets():
    """Return what makes a plan of twenty: both meters, for a model and for all, on the scopes of a few users."""
    few = [identity(number) for number in range(FEW)]
    scopes = {("global", "*")}
    for who in few:
        scopes |= {("team", who.team), ("rolegroup", who.rolegroup), ("role", who.role), ("user", who.user)}
    far = {"capacity": FAR, "refillPerSec": FAR}
    kinds = ({}, {"model": "gpt-4o-mini"}, {"meter": "requests"}, {"meter": "requests", "model": "gpt-4o-mini"})
    return [{"scope": scope, "id": name, **kind, **far} for scope, name in sorted(scopes) for kind in kinds]


@contextmanager
def _on_a_port(folder, options, **settings):
    """Run a Python server that is told its port, ``{port}`` in its options."""
    port = _free_port()
    command = [sys.executable, "-m", *(option.format(port=port) for option in options)]
    with _running(command, folder, _python(**settings)) as process:
        _until_it_listens(process, port)
        yield Server(port, process.pid)


def uvicorn(folder, factory, **settings):
    """Run the app that a factory makes under one worker of uvicorn."""
    options = ["uvicorn", "--factory", factory, "--port", "{port}", "--loop", "uvloop", "--http", "httptools"]
    options += ["--no-access-log", "--no-proxy-headers", "--log-level", "warning"]
    return _on_a_port(folder, options, **settings)


def first(folder, upstream):
    """Falcon and httpx, as the gateway was first built: see first.py."""
    url = f"http://127.0.0.1:{upstream[0]}"
    return uvicorn(folder, "benchmarks.gateway.first:create_app", UPSTREAM=url)


def splice(folder, upstream):
    """The least that a proxy in Python does: see splice.py."""
    return _on_a_port(folder, ["benchmarks.gateway.splice", "{port}", str(upstream[0])])


def _free_port():
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


def _until_it_listens(process, port):
    until_s = time.monotonic() + START_S
    while time.monotonic() < until_s and process.poll() is None:
        with socket.socket() as asking:
            if asking.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise NotToBeHad("it did not start")


ROWS = {
    "direct": direct,
    "nginx": nginx,
    "nginx-limits": partial(nginx, limits=_FIVE),
    "nginx-unbuffered": partial(nginx, buffering="off"),
    "nginx-refusing": partial(nginx, limits=(*_FIVE, ("drained", "$drained", "1r/m"))),
    "lane": tokenguard,
    "lane-20": partial(tokenguard, budgets=_twenty_buckets()),
    "falcon": partial(tokenguard, settings=_FALCON),
    "first": first,
    "splice": splice,
}
"""How each candidate is started: given a folder, and the provider's port and process id."""
TOKENGUARDS = ("lane", "lane-20", "falcon")
