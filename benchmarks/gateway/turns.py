"""A row's turn: wrk calls it for some seconds, and what all of that took is told."""

import json
import subprocess
import time
from pathlib import Path
from typing import NamedTuple

from benchmarks.gateway import machine
from benchmarks.gateway.calls import PATH
from benchmarks.gateway.programs import found
from benchmarks.gateway.report import Turn

PATIENCE_S = 30
"""How long wrk waits for an answer before it counts as an error."""


class Requests(NamedTuple):
    """A file of requests, which are of one size, in bytes."""

    place: Path
    size: int


def call(load, requests, port, seconds):
    """Let wrk call for some seconds from the core of the load; return what it tells."""
    wrk, environ = found("wrk")
    command = [wrk, "-t1", f"-c{load.connections}", f"-d{seconds}s", f"--timeout={PATIENCE_S}s"]
    command += ["-s", Path(__file__).with_name("load.lua"), f"http://127.0.0.1:{port}{PATH}"]
    told = subprocess.run(
        [*command, "--", requests.place, str(requests.size)],
        env=environ,
        preexec_fn=machine.on(machine.LOAD),
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    told = json.loads(told.strip().rpartition("\n")[2])
    wrong = told["statuses"] if load.users else told["requests"] - told["statuses"]
    return {**told, "errors": wrong + told["broken"]}


def measured(load, requests, server, others, seconds):
    """Give a row its turn; ``others`` lead the groups of processes that are ours too."""
    groups = {server.leader, *others}

    def clocks():
        ours_s = machine.own_cpu_s() + sum(map(machine.group_cpu_s, groups))
        return time.monotonic(), machine.group_cpu_s(server.leader), machine.machine_cpu_s() - ours_s

    before = clocks()
    told = call(load, requests, server.port, seconds)
    took_s, cpu_s, others_s = (after - before for before, after in zip(before, clocks(), strict=True))
    return Turn(
        told["requests"] / told["took_us"] * 1e6,
        told["requests"] / max(cpu_s, 1e-3),
        told["p50_us"],
        told["p99_us"],
        max(0, others_s) / took_s / len(machine.CORES),
        told["errors"],
    )
