"""One worker and two, with and without a table in common: requests a second through the whole server.

Run, with wrk on PATH: python -m benchmarks.workers [seconds]

The servers are uvicorn with the ASGI app and the built-in upstream that answers at once, so that all of it
is ours; wrk has 64 connections, and takes a good part of a processor itself.
"""

import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

from tokenguard.asgi import create_app
from tokenguard.demo import DemoUpstream

ROUNDS = 5
CALL = """
wrk.method = "POST"
wrk.body = '{"model":"gpt-4o-mini","messages":[{"role":"user","content":"' .. ("Hello "):rep(90) .. '"}]}'
local n = 0
request = function()
  n = (n * 1103515245 + 12345) % 1000
  wrk.headers["x-user-id"] = "user-" .. n
  wrk.headers["x-team-id"] = "team-" .. n % 10
  wrk.headers["x-role"] = "role-" .. n % 5
  wrk.headers["x-llm-rolegroup"] = "group-" .. n % 2
  return wrk.format()
end
"""


def app():
    """Return the app as every worker runs it."""
    return create_app(upstream=DemoUpstream())


@contextmanager
def serving(workers, table, folder):
    """Run uvicorn; yield its port."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    limits = {f"{kind}_{scope}": "1000000000" for kind in ("CAP", "RATE")
              for scope in ("GLOBAL", "TEAM", "ROLEGROUP", "ROLE", "USER")}  # fmt: skip
    shared = {"TOKENGUARD_TABLE": str(table)} if table else {}
    command = [sys.executable, "-m", "uvicorn", "--factory", "benchmarks.workers:app", "--port", str(port)]
    command += ["--workers", str(workers), "--loop", "uvloop", "--log-level", "critical", "--no-access-log"]
    environ = {"PATH": os.environ["PATH"], "PYTHONPATH": str(Path(__file__).parents[1]), **limits, **shared}
    with subprocess.Popen(command, cwd=folder, env=environ, stderr=subprocess.DEVNULL) as process:
        try:
            for _ in range(200):
                with socket.socket() as asking:
                    if asking.connect_ex(("127.0.0.1", port)) == 0:
                        break
                time.sleep(0.05)
            yield port
        finally:
            process.terminate()


def measured(port, script, seconds):
    """Return requests a second, and the slowest in a hundred in ms."""
    command = ["wrk", "-t1", "-c64", f"-d{seconds}s", "--latency", "-s", script]
    said = subprocess.run(
        [*command, f"http://127.0.0.1:{port}/v1/chat/completions"], capture_output=True, text=True, check=True
    ).stdout
    assert "Non-2xx" not in said, said
    number, unit = re.search(r"99%\s+([\d.]+)(\w+)", said).groups()
    return float(re.search(r"Requests/sec:\s+([\d.]+)", said)[1]), float(number) * {"us": 1e-3, "ms": 1, "s": 1e3}[
        unit
    ]


def main(seconds):
    """Measure all rows in turns, and print the medians."""
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory(dir="/dev/shm") as memory:
        script = Path(folder, "call.lua")
        script.write_text(CALL)
        rows = {
            "one worker": (1, None),
            "two workers, one table": (2, Path(memory, "table")),
            "two workers, a table each": (2, None),
        }
        seen = {row: [] for row in rows}
        for _ in range(ROUNDS):
            for row, (workers, table) in rows.items():
                with serving(workers, table, folder) as port:
                    measured(port, script, 1)  # whoever comes first builds what all use
                    seen[row].append(measured(port, script, seconds))
    one = statistics.median(rate for rate, _ in seen["one worker"])
    print(f"{'':28}{'requests/s':>12}{'p99 ms':>9}{'to one worker':>15}")
    for row, results in seen.items():
        rate, p99_ms = (statistics.median(values) for values in zip(*results, strict=True))
        print(f"{row:28}{rate:12,.0f}{p99_ms:9.1f}{rate / one:15.2f}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
