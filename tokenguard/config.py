"""The only reader of the environment. Every setting stands in ``SETTINGS``, once."""

from __future__ import annotations

import difflib
import ipaddress
import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from tokenguard import arithmetic
from tokenguard._bucket import MAX_BUCKETS, MAX_ROWS
from tokenguard.backends.redis_url import RedisUrl, read_redis_url
from tokenguard.errors import InvalidSetting, InvalidValue
from tokenguard.model import SCOPE_KINDS, Scale

PREFIXES = ("TOKENGUARD_", "CAP_", "RATE_")
"""What begins so is ours, and must be a setting: a typo in a limit would otherwise go unnoticed."""
UNLIMITED = "unlimited"

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


@dataclass(frozen=True, slots=True)
class Config:
    """What TokenGuard was told.

    Attributes:
        openai_api_key: The provider's key; None if there is none.
        openai_base_url: Where the provider's API begins.
        openai_organization: The organization that pays, if the key has several.
        openai_project: The project that pays, if the key has several.
        openai_admin_key: Opens the provider's admin API; None if it is not to be asked.
        provider_limits: Whether the provider's own limits are learned and obeyed.
        sync_interval_s: How often the admin API is asked for them.
        defaults: For each kind of scope the tokens that an id without a budget of its own gets.
        admin_token: What opens the admin endpoints; None opens them to peers nearby.
        admin_allow: Where such peers may be.
        redis: Where buckets and budgets are shared; None keeps them in this process.
        realm: The name of what is shared there.
        redis_timeout_s: How long a call may wait for Redis.
        redis_down: What decides while Redis is down: ``closed``, ``share`` or ``open``.
        nodes: How many nodes share a budget while Redis is down; given where ``redis_down`` is ``share``.
        workers: How many processes ``tokenguard serve`` serves with.
        buckets: How many buckets the table holds.
        table: Where processes that were started apart share the table; None where none do.
        state: Where budgets and levels are kept for the next start; None to keep none.
        max_body_bytes: The longest body that is read.
        connect_timeout_s: For a connection to the provider.
        read_timeout_s: For the provider to begin its answer, and between two pieces of it.
        total_timeout_s: For the whole of its answer.
        max_connections: To the provider, at most.
        queue_timeout_s: How long a call may wait for one of them to become free.
        caller_timeout_s: For a caller to send the next piece of a body, or to take the next piece of an answer.
        shutdown_timeout_s: How long running calls may take to end when the server is told to stop.
        ask_for_usage: Whether to ask for a stream's usage where the caller did not.
        log_calls: Whether to log one line for each call.
        log_json: Whether log lines are JSON objects rather than text.
        fast_lane: Whether ``tokenguard serve`` answers chat completions without going through Falcon.
    """

    openai_base_url: str
    defaults: Mapping[str, Scale]
    admin_allow: tuple[Network, ...]
    realm: str
    redis_timeout_s: float
    redis_down: str
    workers: int
    buckets: int
    max_body_bytes: int
    connect_timeout_s: float
    read_timeout_s: float
    total_timeout_s: float
    max_connections: int
    queue_timeout_s: float
    caller_timeout_s: float
    shutdown_timeout_s: int
    ask_for_usage: bool
    log_calls: bool
    log_json: bool
    fast_lane: bool
    provider_limits: bool
    sync_interval_s: float
    openai_api_key: str | None = field(default=None, repr=False)
    openai_organization: str | None = None
    openai_project: str | None = None
    openai_admin_key: str | None = field(default=None, repr=False)
    admin_token: str | None = field(default=None, repr=False)
    redis: RedisUrl | None = None
    nodes: int | None = None
    table: Path | None = None
    state: Path | None = None


def _text(value: str) -> str:
    if not value.isascii() or not value.isprintable():
        raise ValueError("printable ASCII")
    return value


def _secret(value: str) -> str:
    try:
        return _text(value)
    except ValueError:
        raise ValueError("printable ASCII (the value is not shown)") from None


def _url(value: str) -> str:
    allowed = "a URL with http:// or https:// and a host, without a user or password"
    try:
        parts = urlsplit(_text(value))
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        raise ValueError(allowed) from None
    if not usable or " " in value or "@" in parts.netloc or parts.fragment:
        raise ValueError(allowed)
    return value


def _whole(least: int, most: int) -> Callable[[str], int]:
    def read(value: str) -> int:
        if not value.isascii() or not value.isdigit() or len(value) > 15 or not least <= int(value) <= most:
            raise ValueError(f"a whole number from {least} to {most}")
        return int(value)

    return read


def _seconds(value: str) -> float:
    try:
        seconds = float(value)
    except ValueError:
        seconds = math.nan
    if not 0.001 <= seconds <= 86_400:
        raise ValueError("seconds, from 0.001 to 86400")
    return seconds


def _switch(value: str) -> bool:
    if value not in ("on", "off"):
        raise ValueError("on or off")
    return value == "on"


def _one_of(*allowed: str) -> Callable[[str], str]:
    def read(value: str) -> str:
        if value not in allowed:
            raise ValueError(f"{', '.join(allowed[:-1])} or {allowed[-1]}")
        return value

    return read


def _path(value: str) -> Path:
    if not value.isprintable() or value.endswith("/"):
        raise ValueError("the path of a file")
    return Path(value)


def _realm(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", value):
        raise ValueError("1 to 64 letters, digits, dots, dashes and underscores")
    return value


def _networks(value: str) -> tuple[Network, ...]:
    try:
        return tuple(ipaddress.ip_network(part.strip()) for part in value.split(","))
    except ValueError:
        raise ValueError("networks such as 127.0.0.0/8,::1/128") from None


def _capacity(value: str) -> int | None:
    if value.lower() == UNLIMITED:
        return None
    try:
        return _whole(1, arithmetic.MAX_CAPACITY)(value)
    except ValueError:
        raise ValueError(f"a whole number from 1 to {arithmetic.MAX_CAPACITY}, or {UNLIMITED}") from None


def _rate(value: str) -> float:
    try:
        rate = float(value)
    except ValueError:
        rate = math.nan
    if not 0 <= rate <= arithmetic.MAX_RATE:
        raise ValueError("a number from 0 to 10^12")
    return rate


class Setting(NamedTuple):
    """One setting of the environment.

    Attributes:
        read: Returns the value, or raises ValueError with what is allowed.
        default: As it would be typed; None for none.
        secret: Whether its value must not be shown.
    """

    read: Callable[[str], Any]
    default: str | None = None
    secret: bool = False


SETTINGS: dict[str, Setting] = {
    "OPENAI_API_KEY": Setting(_secret, secret=True),
    "OPENAI_BASE_URL": Setting(_url, "https://api.openai.com/v1"),
    "OPENAI_ORG_ID": Setting(_text),
    "OPENAI_PROJECT_ID": Setting(_text),
    "OPENAI_ADMIN_KEY": Setting(_secret, secret=True),
    "TOKENGUARD_PROVIDER_LIMITS": Setting(_switch, "on"),
    "TOKENGUARD_SYNC_INTERVAL_S": Setting(_seconds, "300"),
    "REDIS_URL": Setting(read_redis_url, secret=True),
    "CAP_GLOBAL": Setting(_capacity, "10000"),
    "RATE_GLOBAL": Setting(_rate, "50"),
    "CAP_TEAM": Setting(_capacity, "5000"),
    "RATE_TEAM": Setting(_rate, "25"),
    "CAP_ROLEGROUP": Setting(_capacity),
    "RATE_ROLEGROUP": Setting(_rate),
    "CAP_ROLE": Setting(_capacity),
    "RATE_ROLE": Setting(_rate),
    "CAP_USER": Setting(_capacity, "1000"),
    "RATE_USER": Setting(_rate, "5"),
    "TOKENGUARD_ADMIN_TOKEN": Setting(_secret, secret=True),
    "TOKENGUARD_ADMIN_ALLOW": Setting(_networks, "127.0.0.0/8,::1/128"),
    "TOKENGUARD_REALM": Setting(_realm, "default"),
    "TOKENGUARD_REDIS_TIMEOUT_S": Setting(_seconds, "1"),
    "TOKENGUARD_REDIS_DOWN": Setting(_one_of("closed", "share", "open"), "closed"),
    "TOKENGUARD_NODES": Setting(_whole(1, 10_000)),
    "TOKENGUARD_WORKERS": Setting(_whole(1, MAX_ROWS), "1"),
    "TOKENGUARD_BUCKETS": Setting(_whole(1, MAX_BUCKETS), "500000"),
    "TOKENGUARD_TABLE": Setting(_path),
    "TOKENGUARD_STATE": Setting(_path),
    "TOKENGUARD_MAX_BODY_BYTES": Setting(_whole(1, 2**30), str(20 * 2**20)),
    "TOKENGUARD_CONNECT_TIMEOUT_S": Setting(_seconds, "5"),
    "TOKENGUARD_READ_TIMEOUT_S": Setting(_seconds, "600"),
    "TOKENGUARD_TOTAL_TIMEOUT_S": Setting(_seconds, "3600"),
    "TOKENGUARD_MAX_CONNECTIONS": Setting(_whole(1, 65_535), "256"),
    "TOKENGUARD_QUEUE_TIMEOUT_S": Setting(_seconds, "5"),
    "TOKENGUARD_CALLER_TIMEOUT_S": Setting(_seconds, "60"),
    "TOKENGUARD_SHUTDOWN_TIMEOUT_S": Setting(_whole(0, 86_400), "30"),
    "TOKENGUARD_ASK_FOR_USAGE": Setting(_switch, "on"),
    "TOKENGUARD_LOG_CALLS": Setting(_switch, "off"),
    "TOKENGUARD_LOG_FORMAT": Setting(_one_of("text", "json"), "text"),
    "TOKENGUARD_FASTLANE": Setting(_switch, "on"),
}
"""Every setting. An empty value is as good as none."""


_OF_REDIS = ("TOKENGUARD_REALM", "TOKENGUARD_REDIS_TIMEOUT_S", "TOKENGUARD_REDIS_DOWN", "TOKENGUARD_NODES")


def read_config(environ: Mapping[str, str]) -> Config:
    """Return what the environment says.

    Raises:
        InvalidSetting: A value cannot be used, or a name that begins like ours is not one of ours.
    """
    _check_names(environ)
    values = {name: _read(environ, name) for name in SETTINGS}
    given = [name for name in environ if environ[name].strip()]
    for name in _OF_REDIS:
        if name in given and values["REDIS_URL"] is None:
            raise InvalidSetting(name, f"{name} is set, but REDIS_URL is not, and without Redis it says nothing")
    if values["REDIS_URL"] is not None and values["TOKENGUARD_STATE"] is not None:
        raise InvalidSetting(
            "TOKENGUARD_STATE", "TOKENGUARD_STATE is set, and so is REDIS_URL: what is in Redis, Redis keeps"
        )
    if values["TOKENGUARD_STATE"] is not None and values["TOKENGUARD_STATE"] == values["TOKENGUARD_TABLE"]:
        raise InvalidSetting(
            "TOKENGUARD_STATE",
            f"TOKENGUARD_STATE and TOKENGUARD_TABLE must be two files, got {values['TOKENGUARD_STATE']} for both",
        )
    if values["OPENAI_ADMIN_KEY"] is not None and values["OPENAI_PROJECT_ID"] is None:
        raise InvalidSetting(
            "OPENAI_PROJECT_ID",
            "OPENAI_PROJECT_ID must be set where OPENAI_ADMIN_KEY is: limits are a project's; got nothing",
        )
    if values["TOKENGUARD_REDIS_DOWN"] == "share" and values["TOKENGUARD_NODES"] is None:
        raise InvalidSetting(
            "TOKENGUARD_NODES",
            "TOKENGUARD_NODES must be set where TOKENGUARD_REDIS_DOWN is share: how many nodes share "
            "a budget while Redis is down; got nothing",
        )
    return Config(
        openai_api_key=values["OPENAI_API_KEY"],
        openai_base_url=values["OPENAI_BASE_URL"],
        openai_organization=values["OPENAI_ORG_ID"],
        openai_project=values["OPENAI_PROJECT_ID"],
        openai_admin_key=values["OPENAI_ADMIN_KEY"],
        provider_limits=values["TOKENGUARD_PROVIDER_LIMITS"],
        sync_interval_s=values["TOKENGUARD_SYNC_INTERVAL_S"],
        defaults=_defaults(values, given),
        admin_token=values["TOKENGUARD_ADMIN_TOKEN"],
        admin_allow=values["TOKENGUARD_ADMIN_ALLOW"],
        redis=values["REDIS_URL"],
        realm=values["TOKENGUARD_REALM"],
        redis_timeout_s=values["TOKENGUARD_REDIS_TIMEOUT_S"],
        redis_down=values["TOKENGUARD_REDIS_DOWN"],
        nodes=values["TOKENGUARD_NODES"],
        workers=values["TOKENGUARD_WORKERS"],
        buckets=values["TOKENGUARD_BUCKETS"],
        table=values["TOKENGUARD_TABLE"],
        state=values["TOKENGUARD_STATE"],
        max_body_bytes=values["TOKENGUARD_MAX_BODY_BYTES"],
        connect_timeout_s=values["TOKENGUARD_CONNECT_TIMEOUT_S"],
        read_timeout_s=values["TOKENGUARD_READ_TIMEOUT_S"],
        total_timeout_s=values["TOKENGUARD_TOTAL_TIMEOUT_S"],
        max_connections=values["TOKENGUARD_MAX_CONNECTIONS"],
        queue_timeout_s=values["TOKENGUARD_QUEUE_TIMEOUT_S"],
        caller_timeout_s=values["TOKENGUARD_CALLER_TIMEOUT_S"],
        shutdown_timeout_s=values["TOKENGUARD_SHUTDOWN_TIMEOUT_S"],
        ask_for_usage=values["TOKENGUARD_ASK_FOR_USAGE"],
        log_calls=values["TOKENGUARD_LOG_CALLS"],
        log_json=values["TOKENGUARD_LOG_FORMAT"] == "json",
        fast_lane=values["TOKENGUARD_FASTLANE"],
    )


def _check_names(environ: Mapping[str, str]) -> None:
    for name in environ:
        prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), None)
        if prefix is not None:
            check_name(name, prefix)


def check_name(name: str, prefix: str = "") -> None:
    """Refuse what is not the name of a setting.

    Args:
        name: The name.
        prefix: What those begin with that may be meant.

    Raises:
        InvalidSetting: It is not.
    """
    if name in SETTINGS:
        return
    near = difflib.get_close_matches(name.upper(), SETTINGS, n=1, cutoff=0.8)
    known = [known for known in SETTINGS if known.startswith(prefix)]
    hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
    raise InvalidSetting(name, f"{name} is not a setting: {hint}")


def _read(environ: Mapping[str, str], name: str) -> Any:  # noqa: ANN401 - as the setting's reader says
    setting = SETTINGS[name]
    value = environ.get(name, "").strip() or setting.default
    if value is None:
        return None
    try:
        return setting.read(value)
    except ValueError as error:
        shown = "a value" if setting.secret or "@" in value else repr(value)  # a URL may hold a password
        raise InvalidSetting(name, f"{name} must be {error}, got {shown}") from None


def _defaults(values: Mapping[str, Any], given: Collection[str]) -> dict[str, Scale]:
    defaults = {}
    for kind in SCOPE_KINDS:
        cap_name, rate_name = f"CAP_{kind.upper()}", f"RATE_{kind.upper()}"
        capacity, rate = values[cap_name], values[rate_name]
        if capacity is None:
            if rate is not None and cap_name not in given:
                raise InvalidSetting(cap_name, f"{cap_name} must be set where {rate_name} is, got nothing")
            continue
        if rate is None:
            raise InvalidSetting(rate_name, f"{rate_name} must be set where {cap_name} is, got nothing")
        try:
            defaults[kind] = arithmetic.scale(
                capacity, arithmetic.read_rate(rate), arithmetic.DEFAULT_DEBT * capacity
            )
        except InvalidValue as error:
            raise InvalidSetting(rate_name, f"{cap_name} and {rate_name} do not go together: {error}") from None
    return defaults
