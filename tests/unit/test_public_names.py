"""What is exported is what the documents name, and says what it takes and raises."""

import ast
import builtins
import re
from pathlib import Path

import pytest

import tokenguard
import tokenguard.middleware

ROOT = Path(__file__).parents[2]
PAGES = {tokenguard: "docs/library.md", tokenguard.middleware: "docs/middleware.md"}


def named(page):
    """Return the names in the table that a page ends with."""
    _, _, table = (ROOT / page).read_text().partition("## Public names\n")
    return re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)


@pytest.mark.parametrize("module", PAGES, ids=lambda module: module.__name__)
def test_exported_is_what_the_page_names(module):
    """A package exports the names in its page's table, each once, and has all of them."""
    assert sorted(named(PAGES[module])) == sorted(module.__all__)
    assert all(hasattr(module, name) for name in module.__all__)


def definition(module, name):
    """Return a class or function as it is written: what is compiled has no signature to ask for."""
    path = ROOT / module.replace(".", "/")
    source = path.with_suffix(".py") if path.with_suffix(".py").exists() else path / "__init__.py"
    tree = ast.parse(source.read_text())
    return next((node for node in tree.body if getattr(node, "name", None) == name), None)


def callables():
    """Yield every public function, class and method, as a name, its class and its definition."""
    homes = {
        (getattr(module, name).__module__, name)
        for module in PAGES
        for name in module.__all__
        if callable(getattr(module, name))
    }
    homes.add(("tokenguard.library.budgets", "Budgets"))  # nobody makes one, everybody has one
    for module, name in sorted(homes):
        node = definition(module, name)
        assert node is not None, f"{module}.{name}"
        yield name, None, node
        for method in node.body if isinstance(node, ast.ClassDef) else ():
            if isinstance(method, ast.FunctionDef | ast.AsyncFunctionDef) and not method.name.startswith("_"):
                yield f"{name}.{method.name}", node, method


MADE_BY_US = {"BackendDown", "Call", "InvalidValue"}
"""Classes of which nobody else makes an instance."""

CALLABLES = [pytest.param(owner, node, id=name) for name, owner, node in callables()]


def method_of(node, name):
    """Return a method of a class, or None."""
    return next((method for method in node.body if getattr(method, "name", None) == name), None)


def parameters(node):
    """Return the names that a function, or a class's constructor, takes."""
    function = method_of(node, "__init__") if isinstance(node, ast.ClassDef) else node
    if function is None:
        return set()
    taken = [*function.args.args, *function.args.kwonlyargs, function.args.kwarg]
    return {one.arg for one in taken if one is not None} - {"self", "cls"}


def sections(node):
    """Return a docstring's sections, each as the names in it."""
    text = ast.get_docstring(node) or ""
    parts = re.split(r"^(Args|Attributes|Raises):\n", text, flags=re.MULTILINE)
    return {
        title: set(re.findall(r"^    (\w+):", body, re.MULTILINE))
        for title, body in zip(parts[1::2], parts[2::2], strict=True)
    }


@pytest.mark.parametrize(("owner", "node"), CALLABLES)
def test_docstring_tells_arguments(owner, node):
    """Every argument stands under Args, there or at the method that the docstring says has the same ones."""
    text = ast.get_docstring(node)
    assert text
    told = sections(node).get("Args", set()) | sections(node).get("Attributes", set())
    for other in re.findall(r"[Tt]akes what ``(\w+)`` takes", text):
        told |= sections(method_of(owner, other))["Args"]
    assert parameters(node) <= told or node.name in MADE_BY_US


@pytest.mark.parametrize(("owner", "node"), CALLABLES)
def test_docstring_tells_errors(owner, node):
    """What is raised on the spot stands under Raises, and what stands there is public or Python's own."""
    told = sections(node).get("Raises", set())
    raised = set()
    if not isinstance(node, ast.ClassDef):
        found = [one.exc for one in ast.walk(node) if isinstance(one, ast.Raise) and isinstance(one.exc, ast.Call)]
        raised = {error.func.id for error in found}
    assert raised <= told
    assert all(name in tokenguard.__all__ or hasattr(builtins, name) for name in told)
