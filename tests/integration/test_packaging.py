"""The archives that are published: what they hold, and that the wheel works in an environment of its own."""

import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def all_of(*suffixes):
    """Return the paths of the package's files that end so."""
    return {
        path.relative_to(ROOT).as_posix() for suffix in suffixes for path in ROOT.glob(f"tokenguard/**/*{suffix}")
    }


def run(*command):
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """The folder that ``DIST`` names, as in ``make build``; or else one that is built here."""
    if "DIST" in os.environ:
        return ROOT / os.environ["DIST"]
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT)
    return folder


@pytest.fixture(scope="module")
def wheel(dist):
    (path,) = dist.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def sdist(dist):
    (path,) = dist.glob("*.tar.gz")
    return path


def test_sdist_holds_the_source_of_the_core_and_no_c(sdist):
    """Whoever builds from the sdist makes the C anew, with their own Cython."""
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"setup.py", "pyproject.toml", "LICENSE"} <= names
    assert {"tokenguard/py.typed", "tokenguard/_region.h"} <= names
    assert all_of(".pyx", ".pxd", ".pxi", ".pyi", ".h") <= names
    assert not {name for name in names if name.endswith((".c", ".so"))}


def test_wheel_holds_the_compiled_core_its_stub_and_no_source(wheel):
    """Type checkers find the marker and the stub, the server its description; nothing is left to compile."""
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"tokenguard/py.typed", "tokenguard/api/openapi.json"} <= names
    assert all_of(".pyi") <= names
    built = {source.removesuffix(".pyx") + sysconfig.get_config_var("EXT_SUFFIX") for source in all_of(".pyx")}
    assert built <= names
    assert not {name for name in names if name.endswith((".c", ".h", ".pxd", ".pxi", ".pyx"))}


def test_wheel_holds_every_module(wheel):
    """A new package that ``pyproject.toml`` does not list is missed here, and not by a user."""
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "tokenguard").rglob("*.py")}
    assert modules <= set(zipfile.ZipFile(wheel).namelist())


def test_wheel_works_in_a_fresh_environment(wheel, tmp_path):
    """The core is imported from where the wheel was installed, without this checkout."""
    environment = tmp_path / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", environment)
    python = environment / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel)
    core = run(python, "-I", "-c", "import tokenguard._bucket as core; print(core.__file__)").strip()
    assert Path(core).is_relative_to(environment)
