"""A process that is killed in an operation leaves the whole of it or nothing, and keeps nobody waiting."""

import json
import subprocess
from pathlib import Path

import pytest

from tests.integration.operations import OPERATIONS
from tests.variants import ROOT, command

LIMIT_S = 60
PROMPT_S = 0.5
"""Much less than the second after which who waits for the lock gives up."""

REPAIRS = [
    "reserve under other scales, refused",
    "configure a level of what is not there",
    "remove",
    "rewrite",
    "tally",
]
"""They change all that there is to repair."""
AGAIN = ["configure what is not there", "remove what is not there", "rewrite", "tally"]
"""They are short, so that there is time to kill who does them again wherever it repairs or does them."""
WITH_PID_LOCK = [
    *[(name, "repaired") for name in ("reserve that makes room", "settle on new buckets", "remove", "rewrite")],
    *[(name, "repaired twice") for name in ("configure a level", "tally")],
]


def run(core, module, *arguments):
    """Run a script of this folder with a core, and return what it tells."""
    ended = subprocess.run(
        command(core, f"tests.integration.{module}", *arguments),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


def check(told):
    """Assert that nothing was wrong, and that some kills came too early for the operation."""
    assert told["problems"] == []
    assert told["kills"] >= told["undone"] > 0


@pytest.mark.parametrize("name", OPERATIONS)
def test_operation_has_happened_or_has_not_wherever_its_process_was_killed(name, test_core, tmp_path):
    """The next process finds the table as it was before, or as it is after, and goes on."""
    check(run(test_core, "crash", "repaired", name, tmp_path))


@pytest.mark.parametrize("name", REPAIRS)
def test_repair_may_be_killed_as_well(name, test_core, tmp_path):
    """Wherever the process that repairs is killed too, a third one repairs all the same."""
    check(run(test_core, "crash", "repaired twice", name, tmp_path))


@pytest.mark.parametrize("name", AGAIN)
def test_operation_may_be_killed_again_as_it_is_done_again(name, test_core, tmp_path):
    """Nothing that the next process does, before it has the lock or after, makes what was there beyond repair."""
    check(run(test_core, "crash", "repeated", name, tmp_path))


@pytest.mark.parametrize(("name", "kind"), WITH_PID_LOCK)
def test_lock_that_holds_a_process_id_is_passed_on_as_well(name, kind, test_core_with_pid_lock, tmp_path):
    """Where the system has no robust mutexes, killed processes leave the whole of an operation or nothing too."""
    check(run(test_core_with_pid_lock, "crash", kind, name, tmp_path))


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="the system does not tell who is asleep")
@pytest.mark.parametrize("core", ["test_core", "test_core_with_pid_lock"])
def test_who_waits_has_the_lock_at_once_when_its_holder_is_killed(core, request, tmp_path):
    """Two processes wait for one that is stopped inside an operation; when it is killed, both go on."""
    told = run(request.getfixturevalue(core), "waiting", tmp_path)

    assert max(told["took_s"]) < PROMPT_S
    assert told["repaired"] == 1
