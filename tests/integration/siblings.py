"""Two processes of one parent that listen and guard, and a third that only listens: whom do the two suspect?

Run: python -m tests.integration.siblings HOW FOLDER
It prints, as JSON, for each of the two which of the three ``unshared`` returned to it, by number.
"""

import json
import os
import socket
import subprocess
import sys
from contextlib import suppress

from tokenguard._bucket import BucketTable
from tokenguard.backends import workers

BUCKETS = 64


def listening(how, folder):
    """Return a socket as one of them has it."""
    if how == "a socket file":
        listening = socket.socket(socket.AF_UNIX)
        listening.bind(f"{folder}/socket")
        listening.listen()
        return listening
    return socket.create_server(("127.0.0.1", 0))


def look(how, folder, inherited, given, tell, asked):
    """Serve, say so, and when asked say who is suspected."""
    if how == "sockets of their own":
        inherited.close()
        _own = listening(how, folder)
    table = given if how == "a table in common" else BucketTable(BUCKETS)
    workers.join(table)
    os.write(tell, b"!")
    os.read(asked, 1)
    os.write(tell, json.dumps(workers.unshared(table)).encode())
    os.read(asked, 1)


class Guard:
    """One of the two."""

    def __init__(self, *what):
        told, tell = os.pipe()
        asked, ask = os.pipe()
        self.told, self.ask = told, ask
        self.pid = os.fork()
        if not self.pid:
            with suppress(BaseException):
                look(*what, tell, asked)
            os._exit(0)
        os.close(tell)
        os.close(asked)

    def hear(self):
        return os.read(self.told, 1000)

    def say(self):
        os.write(self.ask, b"!")


def main(how, folder):
    """Start all three, and have the two say whom they suspect."""
    inherited, table = listening(how, folder), BucketTable(BUCKETS)
    with subprocess.Popen(["sleep", "60"], pass_fds=[inherited.fileno()]) as bystander:
        guards = [Guard(how, folder, inherited, table) for _ in range(2)]
        numbers = {guard.pid: number for number, guard in enumerate(guards)} | {bystander.pid: 2}
        for guard in guards:
            guard.hear()
        suspected = []
        for guard in guards:
            guard.say()
            suspected.append([numbers.get(pid, pid) for pid in json.loads(guard.hear())])
        for guard in guards:
            guard.say()
            os.waitpid(guard.pid, 0)
        bystander.kill()
    print(json.dumps(suspected))


if __name__ == "__main__":
    main(*sys.argv[1:])
