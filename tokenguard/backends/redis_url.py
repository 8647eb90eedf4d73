"""Where Redis is, as ``REDIS_URL`` says it: one server, a group that Sentinel watches, or a cluster."""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

ALLOWED = (
    "redis://[[user]:password@]host[:port][/database], rediss:// for TLS, unix:///path/to/socket[?db=database], "
    "redis+sentinel://[…@]host[:port],…/group[/database] or redis+cluster://[…@]host[:port],…"
)
_SCHEMES = {"redis", "rediss", "unix", "redis+sentinel", "rediss+sentinel", "redis+cluster", "rediss+cluster"}
_OPTIONS = {"ssl_ca_certs", "ssl_cert_reqs", "sentinel_username", "sentinel_password", "db"}
_PORT = 6379
_SENTINEL_PORT = 26379


@dataclass(frozen=True)
class RedisUrl:
    """What a URL says.

    Attributes:
        kind: ``server``, ``sentinel`` or ``cluster``.
        hosts: Names or addresses and ports: of one server, of the Sentinels, or of some nodes of the cluster.
        path: The socket file, if there is one.
        group: The name under which Sentinel knows the servers.
        database: Its number.
        connection: How to connect to a server, as redis-py takes it; holds the password.
        sentinel: How to connect to a Sentinel.
    """

    kind: str
    hosts: tuple[tuple[str, int], ...]
    path: str | None
    group: str
    database: int
    connection: dict[str, Any] = field(repr=False)
    sentinel: dict[str, Any] = field(repr=False)

    def __str__(self) -> str:
        """Return where it is, without credentials."""
        if self.path is not None:
            where = self.path
        else:
            where = ",".join(f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in self.hosts)
        if self.kind == "sentinel":
            where = f"group {self.group} of the Sentinels at {where}"
        elif self.kind == "cluster":
            where = f"the cluster at {where}"
        return where + (f" database {self.database}" if self.database else "")

    @property
    def secrets(self) -> list[str]:
        """What must not be shown."""
        found = (self.connection.get("password"), self.sentinel.get("password"))
        return [secret for secret in found if secret]


def read_redis_url(url: str) -> RedisUrl:
    """Return what a URL says.

    Raises:
        ValueError: It says nothing that can be; the message is what is allowed.
    """
    try:
        return _read(url)
    except ValueError as error:
        why = str(error) if isinstance(error, _Wrong) else "it is no URL"
        raise ValueError(f"{ALLOWED}; {why} (it is not shown, for it may hold a password)") from None


class _Wrong(ValueError):
    """What is wrong with a URL, without any part of it."""


def _read(url: str) -> RedisUrl:
    parts = urlsplit(url.replace("valkey", "redis", 1) if url.startswith("valkey") else url)
    if parts.scheme not in _SCHEMES:
        raise _Wrong("it begins with none of these")
    if parts.fragment or not url.isascii() or not url.isprintable() or " " in url:
        raise _Wrong("it holds what a URL may not: in a password, write # / ? @ and the like as %23 %2F %3F %40")
    options = _options(parts.query)
    credentials, _, netloc = parts.netloc.rpartition("@")
    kind = parts.scheme.partition("+")[2] or "server"
    path = [unquote(part) for part in parts.path.split("/")[1:]]
    is_file = parts.scheme == "unix"
    group = path.pop(0) if kind == "sentinel" and path else ""
    if kind == "sentinel" and not group:
        raise _Wrong("the name of the group is missing")
    database = _database(options.get("db", "")) if is_file else _database("/".join(path))
    if kind == "cluster" and database:
        raise _Wrong("a cluster has database 0 only")
    connection = {**_login(credentials), **_tls(parts.scheme, options)}
    sentinel = {
        name: options[f"sentinel_{name}"] for name in ("username", "password") if f"sentinel_{name}" in options
    }
    if is_file and not (parts.path.startswith("/") and not netloc and len(parts.path) > 1):
        raise _Wrong("the path of the socket is missing, or does not begin with a slash")
    return RedisUrl(
        kind,
        () if is_file else _hosts(netloc, _SENTINEL_PORT if kind == "sentinel" else _PORT, many=kind != "server"),
        unquote(parts.path) if is_file else None,
        group,
        database,
        connection,
        {**sentinel, **_tls(parts.scheme, options)},
    )


def _options(query: str) -> dict[str, str]:
    wrong = _Wrong(f"after a ? there may be {', '.join(sorted(_OPTIONS))}, and in a password it is %3F")
    try:
        options = dict(parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query)))
    except ValueError:
        raise wrong from None
    if not set(options) <= _OPTIONS:
        raise wrong
    return options


def _login(credentials: str) -> dict[str, Any]:
    if not credentials:
        return {}
    username, colon, password = credentials.partition(":")
    if not colon or not password:
        raise _Wrong("before the @ a password is missing")
    return {"username": unquote(username) or None, "password": unquote(password)}


def _tls(scheme: str, options: dict[str, str]) -> dict[str, Any]:
    given = {name: value for name, value in options.items() if name.startswith("ssl_")}
    if not scheme.startswith("rediss"):
        if given:
            raise _Wrong("ssl_… go with rediss:// only")
        return {}
    if given.get("ssl_cert_reqs", "required") not in ("required", "none"):
        raise _Wrong("ssl_cert_reqs is required or none")
    checked = given.get("ssl_cert_reqs") != "none"
    return {
        "ssl": True,
        "ssl_cert_reqs": ssl.CERT_REQUIRED if checked else ssl.CERT_NONE,
        "ssl_check_hostname": checked,
        "ssl_ca_certs": given.get("ssl_ca_certs"),
    }


def _database(text: str) -> int:
    if not text:
        return 0
    if not text.isdigit() or len(text) > 9:
        raise _Wrong("the database is no number")
    return int(text)


def _hosts(netloc: str, port: int, *, many: bool) -> tuple[tuple[str, int], ...]:
    hosts = []
    for part in netloc.split(","):
        try:
            one = urlsplit(f"//{part}")
            given = one.port
        except ValueError:
            raise _Wrong("a port is no number from 1 to 65535") from None
        if not one.hostname:
            raise _Wrong("the host is missing")
        if given == 0:
            raise _Wrong("a port is no number from 1 to 65535")
        hosts.append((one.hostname, given or port))
    if len(hosts) > 1 and not many:
        raise _Wrong("it names several hosts")
    return tuple(hosts)
