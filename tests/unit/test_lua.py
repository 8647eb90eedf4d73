"""What can be seen of the Lua scripts without running them: their contracts, and traps that are known."""

import re
from pathlib import Path

import pytest

from tests.oracle import NEVER_US, STEP_US
from tokenguard import _bucket
from tokenguard.backends.batch import Kind
from tokenguard.backends.scripts import LUA

PRELUDE = "bucket"
SCRIPTS = sorted(path.stem for path in LUA.glob("*.lua") if path.stem != PRELUDE)
PARAMETER = re.compile(r"\b((?:KEYS|ARGV)\[\d+…?\])")


def text_of(name):
    return (LUA / f"{name}.lua").read_text(encoding="utf-8")


def header_of(name):
    """Return the comment that a file opens with."""
    return re.match(r"(?:--.*\n)+", text_of(name))[0]


def code_of(name):
    """Return a file without its comments."""
    return re.sub(r"--.*", "", text_of(name))


def parameters_of(name):
    """Return the KEYS and ARGV that a script reads, as a header has them: ``KEYS[3…]`` is 3 and all after."""
    code = code_of(name)
    code = re.sub(r"for i = (\d+), #(KEYS|ARGV)\b", r"\2[\1…]", code)
    if "local values = call('MGET', unpack(KEYS))" in code:
        code = code.replace("values[", "KEYS[")
    return set(PARAMETER.findall(code))


@pytest.mark.parametrize("name", SCRIPTS)
def test_header_documents_what_the_script_reads(name):
    """Every key and argument that is read is documented, none is that is not, and so is what comes back."""
    header = header_of(name)

    assert set(PARAMETER.findall(header)) == parameters_of(name)
    assert re.match(r"-- [A-Z].*\.\n--\n-- KEYS\[1\] ", header), "it does not begin with its purpose"
    assert re.search(r"^-- Returns  ", header, re.MULTILINE)


def test_prelude_takes_nothing_of_its_own():
    """What is put in front of other scripts leaves their keys and arguments to them."""
    assert "KEYS" not in code_of(PRELUDE)
    assert "ARGV" not in code_of(PRELUDE)
    assert "no KEYS or ARGV" in header_of(PRELUDE)


@pytest.mark.parametrize("name", [PRELUDE, *SCRIPTS])
def test_no_key_is_made_up_in_a_script(name):
    """A cluster must be told all keys: a command names one of KEYS, or a bucket's that came from there."""
    code = code_of(name)
    named = re.findall(r"\bcall\('[A-Z]+', (unpack\(KEYS\)|[^,)]+)", code)
    buckets = re.findall(r" = bucket_of\(([^,]+),", code)
    taken = re.findall(r"\blocal key\b[^=]*= ([^,\n]+)", code)
    given = re.compile(r"KEYS\[\w\]|unpack\(KEYS\)")

    assert len(named) == len(re.findall(r"\bcall\((?!'TIME')", code))
    assert {each for each in named if not given.fullmatch(each)} <= {"key"}
    assert {each for each in buckets if not given.fullmatch(each)} <= {"key", "nil"}
    assert {each for each in taken if not given.fullmatch(each)} <= {"bucket.key"}


def test_clock_is_asked_in_one_place_and_once_a_script():
    """Two answers of the clock in one script may differ."""
    assert [name for name in (PRELUDE, *SCRIPTS) if "TIME" in code_of(name)] == [PRELUDE]
    assert code_of(PRELUDE).count("'TIME'") == 1
    for name in SCRIPTS:
        assert code_of(name).count("clock_us()") <= 1


@pytest.mark.parametrize("name", [PRELUDE, *SCRIPTS])
def test_numbers_become_text_by_format_d_only(name):
    """``tostring``, ``..``, ``cjson`` and ``%g`` print 14 digits, where a time in µs has 16; ``%f`` prints -0."""
    code = code_of(name)

    assert not re.search(r"\btostring\b|\bcjson\b|\btable\.concat\b|\.\.", code)
    formats = re.findall(r"\bformat\('([^']*)'", code)
    assert len(formats) == len(re.findall(r"\bformat\(", code))
    assert set(re.findall(r"%.", "".join(formats))) <= {"%d", "%s"}


@pytest.mark.parametrize("function", ["clamp", "refill", "convert", "charge", "bring_up", "full_in_us"])
def test_what_is_computed_twice_has_one_name(function):
    """A rule of the buckets is found under the same name in Lua and in Cython."""
    folder = Path(_bucket.__file__).parent
    core = "".join((folder / name).read_text(encoding="utf-8") for name in ("_table.pxi", "_bucket.pyx"))

    assert re.search(rf"^local function {function}\(", text_of(PRELUDE) + text_of("calls"), re.MULTILINE)
    assert re.search(rf"^ *c?p?def .*\b{function}\(", core, re.MULTILINE)


def test_constants_are_the_engine_s():
    """Never, the step of a clock that is believed, and the kinds of calls are the same numbers everywhere."""
    never, step_us = re.search(r"NEVER, STEP_US = (\S+), (\S+)", code_of(PRELUDE)).groups()
    reserve, settle = re.search(r"RESERVE, SETTLE = (\d), (\d)", code_of("calls")).groups()

    assert (float(never), float(step_us)) == (NEVER_US, STEP_US)
    assert (int(reserve), int(settle)) == (Kind.RESERVE, Kind.SETTLE)
