"""The Lua scripts, as they travel: read from the files beside, once."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

LUA = Path(__file__).parent / "lua"


class Script(NamedTuple):
    """A script and the name that Redis knows it by.

    Attributes:
        text: The script.
        sha: The SHA-1 of the text, in hexadecimal digits.
    """

    text: str
    sha: str


def load(*names: str) -> Script:
    """Return one script made of files, in their order."""
    text = "".join((LUA / f"{name}.lua").read_text(encoding="utf-8") for name in names)
    return Script(text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest())


CALLS = load("bucket", "calls")
CONFIGURE = load("bucket", "configure")
BUDGETS = load("budgets")
PUBLISH = load("publish")
CLAIM = load("claim")
SHARE = load("bucket", "share")
