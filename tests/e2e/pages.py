"""Reads what a page of the documents shows: files to save, commands to type, and what they answer."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from http import HTTPStatus
from itertools import pairwise
from pathlib import Path

import httpx

ROOT = Path(__file__).parents[2]
SERVERS = ("uvicorn", "gunicorn", "hypercorn", "tokenguard")


@dataclass
class Command:
    """A command that a page shows.

    Attributes:
        settings: What is set for it in the environment.
        words: Itself.
        shown: What it answers, according to the page.
    """

    settings: dict[str, str]
    words: list[str]
    shown: str

    def __str__(self):
        return shlex.join(self.words)


def page(name):
    """Return the text of a page."""
    return (ROOT / name).read_text()


def files(text):
    """Return the files that a page has its reader save, by their names."""
    return dict(re.findall(r"[Ss]ave as\s`([\w.]+)`:\n\n```python\n(.*?)```", text, re.DOTALL))


def snippets(text):
    """Return every block of Python on a page."""
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def commands(text):
    """Return the commands of a page in their order."""
    found = []
    for block in re.findall(r"```console\n(.*?)```", text, re.DOTALL):
        for one in re.split(r"^\$ ", block.replace("\\\n", " "), flags=re.MULTILINE)[1:]:
            line, _, shown = one.partition("\n")
            words = shlex.split(line, comments=True)
            settings = []
            while re.match(r"[A-Z_]+=", words[0]):
                settings.append(words.pop(0).split("=", 1))
            found.append(Command(dict(settings), words, shown))
    return found


def request(words, url):
    """Do what a curl command does."""
    given = {"-H": [], "-d": [], "-X": []}
    (address,) = (word for i, word in enumerate(words) if word.startswith("localhost:8000") and i > 0)
    for option, value in pairwise(words):
        if option in given:
            given[option].append(value)
    headers = dict(header.split(": ") for header in given["-H"])
    if given["-d"]:
        headers["content-type"] = "application/x-www-form-urlencoded"
    method = (given["-X"] or ["POST" if given["-d"] else "GET"])[0]
    return httpx.request(
        method, address.replace("localhost:8000", url), headers=headers, content="".join(given["-d"]), timeout=10
    )


def said(answer, words):
    """Return what curl prints of an answer: with ``-i`` its head too."""
    if "-i" not in words:
        return answer.text
    fields = "".join(f"{name}: {value}\n" for name, value in answer.headers.items())
    status = HTTPStatus(answer.status_code)  # whose name some servers leave out
    return f"HTTP/1.1 {status} {status.phrase}\n{fields}\n{answer.text}"


def agrees(shown, said):
    """Return whether something is what a page shows, but for numbers, the time, and what ``…`` stands for.

    Of a head the page may leave fields out.
    """
    shown_head, said_head = ("", "")
    if shown.startswith("HTTP/1.1 "):
        shown_head, _, shown = shown.partition("\n\n")
        said_head, _, said = said.partition("\n\n")
    head = [_pattern(line) for line in shown_head.splitlines()]
    lines = said_head.splitlines()
    return _fits(_pattern(shown.strip()), said.strip()) and all(
        any(_fits(line, other) for other in lines) for line in head
    )


def _fits(pattern, text):
    return re.fullmatch(pattern, text, re.DOTALL) is not None


def _pattern(shown):
    """Return a pattern: what begins with HTTP is a status and stands as it is."""
    if shown.startswith("HTTP/1.1 "):
        return re.escape(shown)
    return re.sub(r"\d+(?:\\\.\d+)?s?", r"[\\d.m]+s?", re.escape(shown)).replace("…", ".*")
