"""The container files keep what the settings and the README promise."""

import re
from pathlib import Path

from tokenguard.config import read_config

ROOT = Path(__file__).parents[2]
COMPOSE = (ROOT / "docker-compose.yml").read_text()
DOCKERFILE = (ROOT / "Dockerfile").read_text()
FINAL_STAGE = DOCKERFILE.rpartition("\nFROM ")[2]
IGNORED = (ROOT / ".dockerignore").read_text().splitlines()


def test_ports_are_published_on_this_machine_only():
    """Compose publishes one port, of the api, on the loopback."""
    assert re.findall(r"ports:\n((?: +- .*\n)+)", COMPOSE) == ['      - "127.0.0.1:8000:8000"\n']


def test_who_calls_the_published_port_may_set_budgets():
    """The gateway that compose's callers come from is within TOKENGUARD_ADMIN_ALLOW, and nobody else beside it."""
    allowed = re.search(r"TOKENGUARD_ADMIN_ALLOW: (\S+)", COMPOSE)[1]
    gateway = re.search(r"gateway: (\S+)", COMPOSE)[1]
    networks = [str(network) for network in read_config({"TOKENGUARD_ADMIN_ALLOW": allowed}).admin_allow]
    assert networks == ["127.0.0.0/8", "::1/128", f"{gateway}/32"]


def test_api_uses_the_redis_that_comes_along():
    """Compose brings one, and the api is told where."""
    url = re.search(r"REDIS_URL: (\S+)", COMPOSE)[1]
    assert read_config({"REDIS_URL": url}).redis.hosts == (("redis", 6379),)


def test_redis_keeps_what_it_is_given():
    """Redis writes to a volume and evicts nothing."""
    assert "redis:7-alpine" in COMPOSE
    assert '"--appendonly", "yes", "--maxmemory-policy", "noeviction"' in COMPOSE
    assert "redis-data:/data" in COMPOSE


def test_image_runs_without_root_and_without_a_compiler():
    """The final stage installs wheels, as nobody in particular."""
    assert "gcc" not in FINAL_STAGE
    assert "--no-index" in FINAL_STAGE
    user = re.search(r"^USER (\d+):(\d+)$", FINAL_STAGE, re.MULTILINE)
    assert int(user[1]) > 0
    assert FINAL_STAGE.index("pip install") < user.start()
    assert "HEALTHCHECK" in FINAL_STAGE


def test_context_holds_what_is_copied_and_no_secret():
    """All that the Dockerfile copies is there and let through; what is not named stays out, .env with it."""
    copied = [
        word.rstrip("/")
        for line in re.findall(r"^COPY (.*)$", DOCKERFILE, re.MULTILINE)
        for word in line.split()[:-1]
    ]
    assert IGNORED[1] == "*"
    assert {f"!{name}" for name in copied} == {line for line in IGNORED if line.startswith("!")}
    assert all((ROOT / name).exists() for name in copied)
