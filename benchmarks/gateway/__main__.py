"""Candidates in front of one and the same provider, in turns: what each answers, and what it takes of its core.

README.md of the folder above says what the rows mean. It exits with 1 if an answer was not what it should be.

Run: python -m benchmarks.gateway [ROW…] [--load LOAD]… [--rounds N] [--seconds S] [--urgent]
"""

import argparse
import platform
import subprocess
import sys
import tempfile
from contextlib import ExitStack, nullcontext
from pathlib import Path

from benchmarks.gateway import machine
from benchmarks.gateway.books import check, quiet
from benchmarks.gateway.calls import body, write_requests
from benchmarks.gateway.loads import LOADS
from benchmarks.gateway.programs import NotToBeHad, compiled, found, upstream
from benchmarks.gateway.report import memory_table, table
from benchmarks.gateway.rows import ROWS, TOKENGUARDS
from benchmarks.gateway.turns import Requests, call, measured

COLD_S, WARM_S = 3, 1
"""How long a row is called before its first turn, and before each other."""


def started(rows, load, folder, provider, stack):
    """Start candidates, and look at one call of each; return those that there are, by name."""
    servers = {}
    for row in rows:
        try:
            servers[row] = stack.enter_context(ROWS[row](tempfile.mkdtemp(dir=folder), provider))
        except NotToBeHad as error:
            print(f"\n{row} is left out: {error}", flush=True)
            continue
        check(row, load, servers[row], provider[0])
    return servers


def compare(load, requests, servers, provider, rounds, seconds):
    """Let all have a turn in every round, and print the table; return how many errors there were."""
    seen = {row: [] for row in servers}
    order = list(servers)
    with machine.awake() if load.awake else nullcontext([]) as loops:
        for number in range(rounds):
            for row in order[number % len(order) :] + order[: number % len(order)]:
                call(load, requests, servers[row].port, WARM_S if number else COLD_S)
                seen[row].append(measured(load, requests, servers[row], {provider[1], *loops}, seconds))
    references = [row for row in load.references if row in seen]
    print(table(seen, references, added=load.connections == 1 and "direct" in seen), flush=True)
    return sum(turn.errors for turns in seen.values() for turn in turns)


def weigh(load, requests, servers, folder):
    """Print what memory each has to itself before and after a call of each user."""
    caller, seen = compiled("caller", folder), {}
    for row, server in servers.items():
        before = machine.private_mib(server.leader)
        given = [caller, *map(str, (server.port, load.connections, load.users, requests.size))]
        with requests.place.open("rb") as whole:
            subprocess.run(given, stdin=whole, check=True, preexec_fn=machine.on(machine.LOAD))
        seen[row] = before, machine.private_mib(server.leader)
    print(memory_table(seen), flush=True)


def main(rows, loads, rounds, seconds):
    """Measure all loads; return what was wrong, or None."""
    print(f"Python {platform.python_version()}, {len(machine.CORES)} cores, {rounds} rounds of {seconds} s")
    if len(machine.CORES) == 1:
        print("There is one core only: the load takes from the candidates, and nothing here can be relied on.")
    found("wrk")  # without it there is nothing to begin with
    errors = 0
    with tempfile.TemporaryDirectory() as folder, upstream(folder) as provider:
        for name in loads:
            load = LOADS[name]
            place = Path(folder, "requests")
            requests = Requests(place, write_requests(place, load.users, body(load.model, load.stream)))
            with ExitStack() as stack:
                wanted = [row for row in load.rows if not rows or row in rows]
                servers = started(wanted, load, folder, provider, stack)
                if not servers:
                    continue
                print(f"\n### {name}: {load.what}; connections: {load.connections}\n", flush=True)
                if name == "rss":
                    weigh(load, requests, servers, folder)
                else:
                    errors += compare(load, requests, servers, provider, rounds, seconds)
                for row in servers.keys() & TOKENGUARDS:
                    quiet(row, servers[row])
    return f"{errors} answers were not what they should be" if errors else None


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gateway", description=__doc__.partition("\n")[0])
    parser.add_argument("rows", nargs="*", metavar="row", help=f"of {', '.join(ROWS)}; all of a load unless told")
    parser.add_argument(
        "--load", action="append", choices=LOADS, help="may be given several times; all unless told"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=5, help="how long a row's turn is")
    parser.add_argument("--urgent", action="store_true", help="go before all that the machine does else (root)")
    given = parser.parse_args()
    if unknown := set(given.rows) - ROWS.keys():
        parser.error(f"no row is named {' or '.join(sorted(unknown))}")
    try:
        with machine.urgently() if given.urgent else nullcontext():
            wrong = main(given.rows, given.load or list(LOADS), given.rounds, given.seconds)
    except NotToBeHad as error:
        wrong = str(error)
    sys.exit(wrong)
