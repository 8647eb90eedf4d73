"""The programs that are not ours: found, fetched, or made of the C in this folder."""

import os
import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path

from benchmarks.gateway.machine import LOAD, on

_HERE = Path(__file__).parent
_ROOT = _HERE.parents[1]
_UNPACKED = _ROOT / ".cache" / "gateway"
_PLACES = {"wrk": "usr/bin/wrk", "nginx": "usr/sbin/nginx"}


class NotToBeHad(Exception):
    """A program, or a server, that this machine cannot run; the message says why."""


def found(name):
    """Return the command of wrk or nginx, and the environment that it runs in.

    Raises:
        NotToBeHad: It is not on PATH, and could not be fetched.
    """
    if place := shutil.which(name):
        return place, dict(os.environ)
    place = _UNPACKED / _PLACES[name]
    if not place.exists():
        _UNPACKED.parent.mkdir(exist_ok=True)
        print("Fetching wrk and nginx, to be unpacked below .cache", flush=True)
        if subprocess.run([_ROOT / "tools" / "debs", _UNPACKED, "wrk", "nginx-light"], check=False).returncode:
            raise NotToBeHad(f"{name} is not on PATH, and apt could not fetch it (see above)")
    libraries = [str(folder) for lib in ("lib", "usr/lib") for folder in (_UNPACKED / lib).glob("*-linux-*")]
    given = os.getenv("LD_LIBRARY_PATH")
    return str(place), {**os.environ, "LD_LIBRARY_PATH": ":".join(libraries + ([given] if given else []))}


def compiled(name, folder):
    """Return the program that ``name``.c is made into.

    Raises:
        NotToBeHad: There is no C compiler.
    """
    compiler = os.environ.get("CC", "cc").split()
    if shutil.which(compiler[0]) is None:
        raise NotToBeHad(f"there is no C compiler {compiler[0]!r}")
    program = Path(folder, name)
    subprocess.run([*compiler, "-O2", "-o", program, _HERE / f"{name}.c"], check=True)
    return program


@contextmanager
def upstream(folder):
    """Run the provider on the core of the load; yield its port and its process id."""
    with subprocess.Popen(
        [compiled("mock", folder)],
        stdout=subprocess.PIPE,
        text=True,
        process_group=0,
        preexec_fn=on(LOAD),
    ) as process:
        try:
            yield int(process.stdout.readline()), process.pid
        finally:
            process.kill()
