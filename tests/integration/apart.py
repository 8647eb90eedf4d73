"""Processes of one node that know each other only by what their settings say, and do what they are told.

Run: python -m tests.integration.apart
Settings are taken from the environment, as the server takes them. For each line of its standard input, a JSON list
of a name and arguments, it calls that method of ``Process`` and prints what it returned, as JSON.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from typing import Any

from tests.house import MODEL, grant, named
from tokenguard.backends.memory import MemoryBackend
from tokenguard.backends.node import open_node
from tokenguard.config import read_config
from tokenguard.errors import BudgetNotFound, InvalidSetting
from tokenguard.limiter import Limiter, Reservation
from tokenguard.model import Budget, Identity
from tokenguard.plan import Plans

DEFAULTS = {"user": grant(1000)}
LIMIT_S = 30


class Process:
    """What such a process does."""

    def __init__(self) -> None:
        config = read_config(os.environ)
        self._backend = MemoryBackend(*open_node(config.buckets, config.table, config.state))
        self._limiter = Limiter(self._backend, Plans(self._backend, DEFAULTS))

    def identity(self) -> str:
        return self._backend.table.identity.hex()

    def open(self) -> None:
        self._backend.open()

    def put(self, scope: str, capacity: int, level: int | None = None) -> None:
        self._backend.put(Budget(named(scope), grant(capacity)), level)

    def drop(self, scope: str) -> bool:
        try:
            self._backend.drop(named(scope), None)
        except BudgetNotFound:
            return False
        return True

    def budgets(self) -> dict[str, int]:
        return {str(budget.name.scope): budget.scale.capacity for budget in self._backend.budgets()}

    def reserve(self, user: str, tokens: int) -> bool:
        return isinstance(self._limiter.reserve(Identity(user), MODEL, 0, tokens), Reservation)

    def spend(self, user: str, tokens: int, times: int) -> int:
        """Reserve over and over; return how often it was allowed."""
        return sum(self.reserve(user, tokens) for _ in range(times))

    def level(self, user: str) -> int:
        return self._limiter.peek(Identity(user), MODEL)[0].level

    def close(self) -> None:
        self._backend.close()


class Apart:
    """Such a process, and what it is told; a context that kills it in the end.

    Args:
        **settings: Its environment, such as ``TOKENGUARD_TABLE``, beside this process's.
    """

    def __init__(self, **settings: object) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.integration.apart"],
            env={**os.environ, **{name: str(value) for name, value in settings.items()}},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.pid = self._process.pid

    def __enter__(self) -> Apart:
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: self.begin(name, *arguments).end()

    def begin(self, name: str, *arguments: object) -> Apart:
        """Tell it to do something."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([name, *arguments]) + "\n")
        self._process.stdin.flush()
        return self

    def end(self) -> Any:
        """Wait until it has done so, and return what came of it."""
        assert self._process.stdout is not None
        told = self._process.stdout.readline()
        assert told, f"it ended with status {self._process.wait(LIMIT_S)}: {self.said()}"
        return json.loads(told)

    def refusal(self) -> str:
        """Wait until it has refused to start, and return what it said."""
        assert self._process.wait(LIMIT_S) == 3
        return self.said()

    def said(self) -> str:
        """Return what is in its log, once it has ended."""
        assert self._process.stderr is not None
        return self._process.stderr.read()

    def stop(self) -> str:
        """Have it stop by itself; return its log."""
        self.close()
        assert self._process.stdin is not None
        self._process.stdin.close()
        assert self._process.wait(LIMIT_S) == 0
        return self.said()

    def kill(self) -> None:
        """Kill it, if it has not ended."""
        self._process.kill()
        self._process.wait(LIMIT_S)
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            assert pipe is not None
            pipe.close()


def main() -> None:
    logging.basicConfig(format="%(levelname)s %(message)s")
    try:
        process = Process()
    except InvalidSetting as error:
        print(error, file=sys.stderr)
        sys.exit(3)
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        print(json.dumps(getattr(process, name)(*arguments)), flush=True)


if __name__ == "__main__":
    main()
