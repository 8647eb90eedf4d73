"""What the pages of the documents show runs, answers as they say, and is typed."""

import re
import signal
import subprocess
import sys
from contextlib import contextmanager
from functools import partial

import pytest

from tests.e2e.conftest import OUR_KEY, environment, running, running_under
from tests.e2e.pages import ROOT, SERVERS, agrees, commands, files, page, request, said, snippets

PAGES = [
    f"docs/{name}.md"
    for name in ("library", "middleware", "openai-sdk", "langchain", "fastapi", "django", "flask")
]
QUIET = {
    "uvicorn": ["--log-level", "warning", "--no-access-log"],
    "gunicorn": ["--log-level", "warning", "--no-control-socket"],
    "hypercorn": ["--log-level", "warning"],
}
SECONDS = 60
MYPY = """
[mypy]
strict = true

[mypy-django.*]
ignore_missing_imports = true
"""
"""How a reader's own code would be checked; Django has no types of its own."""

RUNS = [
    pytest.param(name, server, id=f"{name[5:-3]}-{server.words[0] if server else 'alone'}")
    for name in PAGES
    for server in [command for command in commands(page(name)) if command.words[0] in SERVERS] or [None]
]
"""A page, and a server that it starts: what it types in another terminal is typed before each of them."""


@contextmanager
def started(command, folder, settings):
    """Run the command of a page that starts a server, on a free port, and in a folder for what it shares."""
    settings = settings | {
        name: value.replace("/dev/shm", str(folder)) for name, value in command.settings.items()
    }
    name, *options = command.words
    if name == "tokenguard":
        verb, *rest = options
        assert rest == ["--port", "8000"]
        start = partial(running, folder, verb)
    else:
        text = "\0".join(options).replace("--port\x008000", "--fd\0{fd}").replace("127.0.0.1:8000", "fd://{fd}")
        start = partial(running_under, folder, name, *text.split("\0"), *QUIET[name])
    with start(**settings) as server:
        yield server
        assert server.stop() in (0, -signal.SIGTERM)  # uvicorn ends in order, and then by the signal that it got


@pytest.fixture
def settings(upstream_url, fake):
    """What an example finds in its environment: the provider, for whom it needs no code."""
    return {"OPENAI_BASE_URL": upstream_url, "OPENAI_API_KEY": OUR_KEY}


def follow(text, folder, settings, url):
    """Type what a page types in another terminal; return what does not answer as it says."""
    wrong = []
    for command in commands(text):
        if command.words[0] == "curl":
            answer = said(request(command.words, url), command.words)
        elif command.words[0] == "python":
            answer = run(folder, command.words[1:], settings)
        else:
            continue
        if not agrees(command.shown, answer):
            wrong.append(f"{command}\nshown:\n{command.shown}\nsaid:\n{answer}")
    return wrong


def run(folder, words, settings):
    """Run a script of a page; return what it prints."""
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", *words],
        cwd=folder,
        env=environment(**settings),
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.mark.parametrize(("name", "server"), RUNS)
def test_page_does_what_it_shows(name, server, tmp_path, settings):
    """Who saves the files of a page and types its commands sees what stands there."""
    text = page(name)
    save(text, tmp_path)
    if server is None:
        assert follow(text, tmp_path, settings, None) == []
        return
    with started(server, tmp_path, settings) as running_server:
        save(text.replace("http://127.0.0.1:8000", running_server.url), tmp_path)
        assert follow(text, tmp_path, settings, running_server.url) == []


def save(text, folder):
    """Save the files of a page."""
    for file, source in files(text).items():
        (folder / file).write_text(source)


@pytest.mark.parametrize("name", PAGES)
def test_page_has_files_commands_and_a_refusal(name):
    """A page begins with a file to save, has a command to run it, and shows what a refusal looks like."""
    text = page(name)
    assert files(text)
    assert len(files(text)) == len(re.findall(r"[Ss]ave as", text))
    assert any(command.words[0] in (*SERVERS, "python") for command in commands(text))
    assert any("Rate limit reached" in command.shown for command in commands(text))


def test_snippets_of_the_library_run(tmp_path, settings):
    """Every block of Python on the library's page runs by itself, and the README's too; all is settled."""
    readme = [source for source in snippets(page("README.md")) if source.startswith("from tokenguard import")]
    assert len(readme) == 1
    for i, source in enumerate(snippets(page("docs/library.md")) + readme):
        (tmp_path / f"snippet{i}.py").write_text(source)
        assert run(tmp_path, [f"snippet{i}.py"], settings)


def test_all_examples_are_typed(tmp_path):
    """mypy, strict, finds nothing to say of any example.

    It reads the openai SDK for half a minute, the first time; it remembers that.
    """
    settings = tmp_path / "mypy.ini"
    settings.write_text(MYPY)
    options = ["--config-file", settings, "--cache-dir", ROOT / ".mypy_cache/examples"]
    for name in PAGES:
        for i, source in enumerate(snippets(page(name))):
            (tmp_path / f"{name[5:-3].replace('-', '_')}_{i}.py").write_text(source)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *options, *sorted(tmp_path.glob("*.py"))],
        cwd=ROOT,
        env=environment(MYPYPATH=ROOT),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
