"""How log lines look: one line each, as text or as JSON, whatever is in them."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from datetime import UTC, datetime

from tokenguard.account import Account

_calls = logging.getLogger("tokenguard.calls")

FIELDS = "fields"
"""The attribute of a log record that holds what a line tells in fields."""


def log_call(account: Account) -> None:
    """Log one call that is over."""
    _calls.info("call", extra={FIELDS: fields_of(account)})


def fields_of(account: Account) -> dict[str, object]:
    """Return what a line tells of a call; what is not there is left out."""
    who = account.identity
    fields = {
        "request_id": account.request_id,
        "status": account.status or None,
        **({} if who is None else who._asdict()),
        "model": account.model,
        "stream": account.stream or None,
        "refused_by": account.refused_by and str(account.refused_by),
        "estimate": account.estimate or None,
        "outcome": account.outcome,
        "charged": account.charged if account.outcome else None,
        "forgiven": account.forgiven or None,
        "upstream_status": account.upstream_status,
        "upstream_ms": None if account.upstream_s is None else round(account.upstream_s * 1000, 1),
        "ms": round(account.seconds * 1000, 1),
        "failure": account.failure,
    }
    return {name: value for name, value in fields.items() if value is not None}


class TextFormatter(logging.Formatter):
    """Time, level, logger, message, fields as ``name=value``; control characters are escaped."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - as logging has it
        """Return the line, without a traceback that may follow."""
        fields: Mapping[str, object] = getattr(record, FIELDS, {})
        told = "".join(f" {name}={_bare(value)}" for name, value in fields.items())
        return _one_line(super().formatMessage(record)) + told


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (UTC), level, logger, message, and the fields beside them."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line = {
            "time": time.replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, FIELDS, {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


def handler(*, as_json: bool) -> logging.Handler:
    """Return what writes log lines to standard error."""
    stderr = logging.StreamHandler()
    stderr.setFormatter(JsonFormatter() if as_json else TextFormatter())
    return stderr


def set_up(*, as_json: bool) -> None:
    """Write what TokenGuard logs to standard error, unless whoever runs it has set up logging already."""
    ours = logging.getLogger("tokenguard")
    if not ours.hasHandlers():
        ours.addHandler(handler(as_json=as_json))
        ours.setLevel(logging.INFO)
        ours.propagate = False


def _bare(value: object) -> str:
    """Return a value as it stands in a line of text: quoted where it would not be one word."""
    text = str(value)
    return text if text.isascii() and text.isprintable() and not set(text) & set(' "=') else json.dumps(text)


def _one_line(text: str) -> str:
    return text if text.isprintable() else "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text)
