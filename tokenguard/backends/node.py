"""Opens what the processes of a node share: the table, and the state that it goes on from."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tokenguard._bucket import BucketTable
from tokenguard.backends.mirror import NOTHING, read_records
from tokenguard.backends.state import State, StateFile, taken
from tokenguard.backends.table_file import open_table
from tokenguard.errors import InvalidSetting, StateUnwritable, TableFull

_log = logging.getLogger("tokenguard")


class Node(NamedTuple):
    """What the processes of a node share.

    Attributes:
        table: The table.
        file: Where its state is kept, if it is.
        shared: Where processes that were started apart find the table, if they do.
    """

    table: BucketTable
    file: StateFile | None = None
    shared: Path | None = None


def open_node(buckets: int, table: Path | None = None, state: Path | None = None) -> Node:
    """Open a node's table and state, or make them.

    Args:
        buckets: How many buckets the table must hold.
        table: A file to share the table in; None for memory, shared by processes that are forked off.
        state: A file to keep the state in; None to keep none.

    Raises:
        InvalidSetting: The table or the state cannot be had, or somebody else's is there.
    """
    file = None if state is None else StateFile(state)
    try:
        if table is None:
            made = _begin(file, None, lambda seed: BucketTable(buckets, seed=seed))
        else:
            made, first = open_table(table, buckets, lambda left, new: _begin(file, left, new))
            if file is not None and not first:
                file.join(made.identity)
    except BaseException:
        if file is not None:
            file.close()
        raise
    return Node(made, file, table)


def _begin(
    file: StateFile | None, left: BucketTable | None, new: Callable[[bytes | None], BucketTable]
) -> BucketTable:
    """Return the table that others left behind, or a new one, in the state that was kept."""
    if left is not None:
        left.forget_shared()  # of calls that ended with them, and perhaps of another provider
    if file is None:
        if left is not None:
            _log.info("going on with the table that is there")
        return left or new(None)
    file.own()
    saved = file.read()
    if left is not None and (saved is None or _is_of(saved, left)):
        table = left
        _log.info("going on with the table that is there, which is newer than the state in %s", file.path)
    else:
        table = new(saved.seed if saved else None)
        if saved is not None:
            _restore(table, saved, file)
    try:
        state = taken(table, NOTHING.changed(None, read_records(table.changes(0)[2])).records)
        file.write(state)
        table.saved_turn = state.turn
    except StateUnwritable as error:
        raise InvalidSetting("TOKENGUARD_STATE", f"TOKENGUARD_STATE: {error}") from error
    file.share(table.identity)
    return table


def _is_of(saved: State, left: BucketTable) -> bool:
    """Return whether a state is the last that was saved of a table; else somebody put another in its place."""
    return saved.table == left.identity and saved.turn >= left.saved_turn


def _restore(table: BucketTable, saved: State, file: StateFile) -> None:
    """Put what was saved into a new table. Levels go on by the wall clock, as if nothing had happened."""
    try:
        budgets = len(list(read_records(saved.budgets)))
        table.rewrite(saved.budgets)
        table.load(saved.buckets)
    except TableFull as error:
        what = f"TOKENGUARD_BUCKETS must be higher: the state in {file.path} has no room, for {error}"
        raise InvalidSetting("TOKENGUARD_BUCKETS", what) from error
    except ValueError as error:
        raise InvalidSetting(
            "TOKENGUARD_STATE", f"TOKENGUARD_STATE: the state in {file.path} cannot be used: {error}"
        ) from error
    used = table.stats()["used"]
    _log.info("going on from %s: %d budgets, and %d buckets that are not full", file.path, budgets, used)
