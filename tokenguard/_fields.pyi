"""Header fields where they stand, for the modules that are compiled; what they see is in ``_fields.pxd``."""

from typing_extensions import disjoint_base

MAX_FIELDS: int
"""How many fields a head may have."""

@disjoint_base
class Fields:
    """The fields of one head."""

    def as_list(self) -> list[tuple[bytes, bytes]]:
        """Return the fields as (name, value), names in lower case."""

def lines_of(headers: list[tuple[bytes, bytes]]) -> bytes:
    """Return a list of fields as lines, each with its CRLF."""

def list_of(lines: bytes) -> list[tuple[bytes, bytes]]:
    """Return lines of ours, each with its CRLF, as (name, value)."""
