"""What is compiled, as setup.py says, and whether it is up to date."""

import ast
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parents[1]
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")


def compiled():
    """Return the sources that setup.py compiles, and what else each is made of."""
    for node in ast.parse((ROOT / "setup.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and node.targets[0].id == "COMPILED":
            return ast.literal_eval(node.value)
    raise LookupError("setup.py has no COMPILED")


def module_of(source):
    """Return the name of the module that a source is compiled to."""
    return source.rpartition(".")[0].replace("/", ".")


def stale():
    """Return the modules whose extensions are missing, or older than what they are made of."""
    return [module_of(source) for source, parts in compiled().items() if _is_stale(ROOT / source, parts)]


def _is_stale(source, parts):
    extension = source.with_suffix(SUFFIX)
    made_of = [source, source.with_suffix(".pxd"), *(ROOT / part for part in parts)]
    newest = max(path.stat().st_mtime for path in made_of if path.exists())
    return not extension.exists() or extension.stat().st_mtime < newest
