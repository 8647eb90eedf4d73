"""Header fields where they stand: for the modules that are compiled; Python sees no more than that there are some."""

MAX_FIELDS: int
"""How many fields a head may have."""

class Fields:
    """The fields of one head."""

    def as_list(self) -> list[tuple[bytes, bytes]]:
        """Return the fields as (name, value), names in lower case."""
