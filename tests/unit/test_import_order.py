"""Imports only point down, and what belongs to one room stays in it."""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "tokenguard"

FLOORS = [
    {"cli", "asgi", "wsgi", "routes", "wiring", "engine", "library", "middleware", "__main__", ""},
    {"api", "server", "supervisor", "lane"},
    {"exchange", "provider_limits", "upstream", "config", "demo"},
    {"limiter", "budgets", "estimate", "providers", "refusal", "_refusal", "metrics", "logs", "_heads"},
    {"plan", "backends"},
    {"_bucket", "_limit_fields", "arithmetic", "headroom", "drift"},
    {"model", "errors", "jsontext", "sizing", "account", "_fields", "_version"},
]
"""The rooms of DESIGN section 3, from the roof down; "" is the package itself: its public names."""

APART = {"exchange", "upstream", "provider_limits", "config", "demo"}
"""Rooms of one floor that do not know each other: the floors above bring them together."""

ROOTS = {"cli", "asgi", "wsgi", "routes", "wiring", "engine", "library", "middleware"}
HOMES = {
    "falcon": {"api", "asgi", "wsgi", "routes"},
    "uvicorn": {"server"},
    "click": {"cli"},
    "httpx": {"upstream", "provider_limits", "library", "cli"},
    "httpx2": {"library"},
    "redis": {"backends.link"},
    "hiredis": {"backends.link"},
    "dotenv": ROOTS,
    "prometheus_client": {"metrics"},
}
"""Where a library may be imported."""


def name_of(path):
    """Return a module's name below the package: ``api.proxy``; the package itself is ``""``."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}
COMPILED = {name_of(path): path for path in sorted(PACKAGE.rglob("*.pyx"))}
MODULES = {*SOURCES, *COMPILED}


def imports_of(tree):
    """Yield the full names that a module imports, wherever in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imports_of_cython(text):
    """Yield the full names that a compiled module imports, from Python or from C."""
    yield from re.findall(r"^ *c?import ([\w.]+)", text, re.MULTILINE)
    for module, names in re.findall(r"^ *from ([\w.]+) c?import (\([^)]*\)|.*)", text, re.MULTILINE):
        yield from (f"{module}.{name}" for name in re.findall(r"(\w+)(?: as \w+)?", names.partition("#")[0]))


TREES = {name: ast.parse(path.read_text(), str(path)) for name, path in SOURCES.items()}
IMPORTS = {name: set(imports_of(tree)) for name, tree in TREES.items()} | {
    name: set(imports_of_cython(path.read_text())) for name, path in COMPILED.items()
}


def ours(imported):
    """Return the module of ours that an imported name is, or is in; None if it is somebody else's."""
    package, _, rest = imported.partition(".")
    if package != "tokenguard":
        return None
    return rest if rest in MODULES else rest.rpartition(".")[0]


EDGES = {name: {ours(imported) for imported in names} - {None} for name, names in IMPORTS.items()}
ROOM = {name: name.partition(".")[0] for name in MODULES}


def floor(name):
    """Return how far below the roof a module is."""
    return next(number for number, rooms in enumerate(FLOORS) if ROOM[name] in rooms)


each_module = pytest.mark.parametrize("name", sorted(MODULES), ids=lambda name: name or "tokenguard")
each_source = pytest.mark.parametrize("name", sorted(SOURCES), ids=lambda name: name or "tokenguard")


@each_module
def test_module_is_on_a_floor(name):
    """Every module of the package has its place in the house; a new room is to be put on a floor here."""
    assert sum(ROOM[name] in rooms for rooms in FLOORS) == 1, f"{name} is on no floor: see DESIGN section 3"


def test_every_import_of_ours_is_a_module():
    """What is imported of the package is there to be checked."""
    assert {target for targets in EDGES.values() for target in targets} <= MODULES


@each_module
def test_imports_point_down(name):
    """A module imports from its own floor or from below, never from above."""
    upwards = {target for target in EDGES[name] if floor(target) < floor(name)}

    assert not upwards, f"{name} imports upwards: {', '.join(sorted(upwards))}"


@each_module
def test_rooms_that_stand_beside_each_other_do_not_meet(name):
    """The exchange does not know the hop to the provider, nor either of them the configuration."""
    if ROOM[name] in APART:
        assert not {target for target in EDGES[name] if ROOM[target] in APART - {ROOM[name]}}


def test_roots_are_imported_by_roots_alone():
    """A composition root is where a process begins: nothing below builds on it."""
    roots = ROOTS | {"__main__", ""}
    importers = {name for name, targets in EDGES.items() if {ROOM[target] for target in targets} & roots}

    assert {ROOM[name] for name in importers} <= roots


def test_compiled_modules_are_known_with_what_they_import():
    """What a compiled module imports counts, as it does for any other."""
    assert {"_bucket", "upstream._http", "upstream._pool", "lane._lane"} <= EDGES.keys()
    assert {"upstream._http", "upstream", "errors"} <= EDGES["upstream._pool"]
    assert {"api.call", "upstream._pool"} <= EDGES["lane._lane"]


def test_imports_have_no_cycles():
    """Each module can be understood after those that it imports."""
    TopologicalSorter(EDGES).prepare()


@each_module
@pytest.mark.parametrize("library", HOMES)
def test_library_stays_in_its_room(name, library):
    """Each library that does I/O is known to one room, so that it can be exchanged there."""
    if any(imported.partition(".")[0] == library for imported in IMPORTS[name]):
        assert {name, ROOM[name]} & HOMES[library], f"{name} imports {library}"


def attributes_of(tree):
    """Return every dotted name of two parts that a module uses, such as os.environ."""
    nodes = [
        node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    ]
    return {f"{node.value.id}.{node.attr}" for node in nodes}


@each_source
def test_environment_is_read_by_roots_alone(name):
    """Nothing below the composition roots asks the environment; config is given what it reads."""
    asked = (attributes_of(TREES[name]) | IMPORTS[name]) & {"os.environ", "os.environb", "os.getenv", "os.getenvb"}

    assert not asked or ROOM[name] in ROOTS, f"{name} reads {asked}"


BY_THE_CLOCK = {
    "demo",
    "backends.keeper",
    "provider_limits",
    "provider_limits.background",
    "provider_limits.source",
    "upstream.httpx_hop",
}
"""Lower rooms that do something now and then, or wait, on their own; they decide upon no bucket."""

CLOCKS = {"time.time", "time.time_ns", "time.monotonic", "time.monotonic_ns", "datetime.now", "datetime.utcnow"}


@each_source
def test_clock_is_read_at_the_edge_alone(name):
    """Below the drivers time is an argument, or is read inside the lock."""
    read = (attributes_of(TREES[name]) | IMPORTS[name]) & CLOCKS

    assert not read or floor(name) <= 1 or name in BY_THE_CLOCK, f"{name} reads {read}"
