"""Callers who hang up, thousands of them, at random moments."""

import httpx
import pytest

from tests.e2e import storm
from tests.e2e.conftest import DRIVERS, OUR_KEY

SEED = 20


@pytest.mark.parametrize(("driver", "calls"), [("uvicorn", 2000), ("gunicorn", 500)])
def test_no_hang_up_leaves_anything_behind(tmp_path, driver, calls):
    """After a storm no reservation is open, every scope is charged the same, and nothing is left open."""
    with storm.Upstream(SEED) as upstream:
        url = f"http://127.0.0.1:{upstream.port}/v1"
        with (
            DRIVERS[driver](tmp_path, OPENAI_API_KEY=OUR_KEY, OPENAI_BASE_URL=url, **storm.SETTINGS) as server,
            httpx.Client(base_url=server.url, timeout=10) as client,
        ):
            callers = storm.rage(server, 100, SEED, "first")
            before = storm.quiet(client)
            callers += storm.rage(server, calls, SEED, "user")
            after = storm.quiet(client)
            storm.account(client, upstream, callers)
            assert after["tokenguard_reservations_open"] == 0
            assert after["tokenguard_tokens_reserved_total"] + after["tokenguard_tokens_overrun_total"] == (
                after["tokenguard_tokens_settled_total"] + after["tokenguard_tokens_refunded_total"]
            )
            assert after["process_open_fds"] <= before["process_open_fds"] + storm.CALLERS
            assert server.log == ""
