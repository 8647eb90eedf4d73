"""The documents keep up with the code."""

import re
from pathlib import Path

from tokenguard.config import SETTINGS, read_config

ROOT = Path(__file__).parents[2]


def documented():
    """Return each setting of the page's tables, with what stands in the column of defaults."""
    rows = re.findall(r"^\| `([A-Z_]+)` \| ([^|]*) \|", (ROOT / "docs/settings.md").read_text(), re.MULTILINE)
    assert len(dict(rows)) == len(rows), "a setting stands there twice"
    return dict(rows)


def test_every_setting_stands_in_the_docs_with_its_default():
    """The page about settings names exactly the settings that are read, and their defaults."""
    described = documented()
    assert described.keys() == SETTINGS.keys()
    for name, setting in SETTINGS.items():
        if setting.default is None:
            assert re.match("none|unlimited", described[name]), name
        else:
            assert described[name] == f"`{setting.default}`"


def test_example_environment_is_one():
    """What stands in .env.example can be read, once it is uncommented too, and names known settings only."""
    lines = (ROOT / ".env.example").read_text().splitlines()
    settings = dict(re.findall(r"^#? ?([A-Z_]+)=(.*)$", "\n".join(lines), re.MULTILINE))
    assert settings.keys() <= SETTINGS.keys()
    assert {
        "OPENAI_API_KEY",
        "CAP_GLOBAL",
        "CAP_TEAM",
        "CAP_USER",
        "RATE_GLOBAL",
        "RATE_TEAM",
        "RATE_USER",
    } <= set(settings)
    assert read_config(settings) == read_config({})


PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md")]


def anchors(page):
    """Return what the headings of a page can be linked to by."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_link_leads_somewhere():
    """A link from page to page names a file that is there, and a heading that is in it."""
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text()):
            path, _, anchor = target.partition("#")
            linked = (page.parent / path).resolve() if path else page
            assert linked.exists(), f"{page.name}: {target}"
            assert not anchor or anchor in anchors(linked), f"{page.name}: {target}"
