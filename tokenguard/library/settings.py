"""The settings of a limiter of one's own: those of the proxy's that say something where no server is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypedDict

from tokenguard.config import SETTINGS, check_name
from tokenguard.errors import InvalidSetting


class Settings(TypedDict, total=False):
    """What ``Limiter`` takes beside its URL; docs/settings.md tells what each is, and its default."""

    CAP_GLOBAL: int | str
    RATE_GLOBAL: float
    CAP_TEAM: int | str
    RATE_TEAM: float
    CAP_ROLEGROUP: int | str
    RATE_ROLEGROUP: float
    CAP_ROLE: int | str
    RATE_ROLE: float
    CAP_USER: int | str
    RATE_USER: float
    TOKENGUARD_REALM: str
    TOKENGUARD_REDIS_TIMEOUT_S: float
    TOKENGUARD_REDIS_DOWN: str
    TOKENGUARD_NODES: int
    TOKENGUARD_BUCKETS: int
    TOKENGUARD_TABLE: str
    TOKENGUARD_ASK_FOR_USAGE: bool | str
    TOKENGUARD_LOG_CALLS: bool | str
    TOKENGUARD_PROVIDER_LIMITS: bool | str
    TOKENGUARD_SYNC_INTERVAL_S: float
    OPENAI_BASE_URL: str
    OPENAI_ADMIN_KEY: str
    OPENAI_PROJECT_ID: str


def as_typed(settings: Mapping[str, object]) -> dict[str, str]:
    """Return settings as the environment would have them; None is a default.

    Raises:
        InvalidSetting: One is none, or says nothing to a limiter.
    """
    for name in settings:
        check_name(name)
        if name in ("REDIS_URL", "TOKENGUARD_STATE"):
            raise InvalidSetting(name, f"{name} is what the URL says: give that")
        if name not in Settings.__annotations__:
            known = ", ".join(Settings.__annotations__)
            raise InvalidSetting(
                name, f"{name} is a setting of the server's, and says nothing here: known are {known}"
            )
    return {name: _text(name, value) for name, value in settings.items() if value is not None}


def _text(name: str, value: object) -> str:
    if isinstance(value, bool) and SETTINGS[name].default in ("on", "off"):
        return "on" if value else "off"
    return str(value)
