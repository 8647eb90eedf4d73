"""The compiled core in a variant: built with macros beside the checkout, and used by a process of its own.

Run: python -m tests.variants CORE MODULE ARGUMENT...
It runs a module as a script, with CORE in the place of the core that is installed.
"""

import importlib.util
import os
import runpy
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parents[1]
NAME = "tokenguard._bucket"
CORE = ("__init__.py", "_bucket.pyx", "_bucket.pxd", "_table.pxi", "_region.h")
SETUP = """
from Cython.Build import cythonize
from setuptools import Extension, setup
core = Extension("tokenguard._bucket", ["tokenguard/_bucket.pyx"], extra_compile_args=["-O3"])
setup(ext_modules=cythonize([core], language_level=3))
"""
"""What builds the core, and nothing else that is compiled."""


def variant(folder: Path, *macros: str) -> Path:
    """Build the core with macros set; return where it is. Variants in one folder share the C that Cython makes."""
    (folder / "tokenguard").mkdir(parents=True, exist_ok=True)
    for name in CORE:
        shutil.copy2(ROOT / "tokenguard" / name, folder / "tokenguard" / name)
    (folder / "setup.py").write_text(SETUP)
    place = folder / "-".join(("with", *macros))
    places = ("--build-temp", place / "temp", "--build-lib", place)
    built = subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_ext", *places],
        cwd=folder,
        env={**os.environ, "CFLAGS": " ".join(f"-D{macro}" for macro in macros)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    return place / f"tokenguard/_bucket{sysconfig.get_config_var('EXT_SUFFIX')}"


def use(core: Path) -> None:
    """Make a variant this process's core; nothing may have imported another one."""
    assert NAME not in sys.modules
    spec = importlib.util.spec_from_file_location(NAME, core)
    sys.modules[NAME] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    importlib.import_module("tokenguard")._bucket = module


def command(core: Path, module: str, *arguments: object) -> list[str]:
    """Return the command that runs a module as a script with a variant."""
    return [sys.executable, "-m", "tests.variants", str(core), module, *map(str, arguments)]


if __name__ == "__main__":
    use(Path(sys.argv[1]))
    sys.argv[:2] = []
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
