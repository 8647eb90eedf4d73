"""What the oracle decided once, every engine still decides, and the stored integers are the same at every step."""

import pytest

from tests.engines import OracleEngine
from tests.golden import FOLDER, TIMELINES, read, replay
from tests.golden.record import recorded
from tokenguard._bucket import BucketTable


@pytest.mark.parametrize("engine", [OracleEngine, lambda: BucketTable(4)], ids=["oracle", "table"])
@pytest.mark.parametrize("name", TIMELINES)
def test_golden_timeline(name, engine):
    """What was recorded once is decided so still."""
    replay(read(name), engine())


def test_recording_again_writes_the_same():
    """The files are what the recorder makes of the oracle, and there are no others."""
    files = {name: (FOLDER / f"{name}.json").read_text(encoding="utf-8") for name in TIMELINES}

    assert recorded() == files
