"""Looking things up by the names that recipes and the command line use."""

import difflib
from collections.abc import Mapping
from typing import TypeVar

from owl2.errors import InputError

Entry = TypeVar("Entry")


def look_up(kind: str, name: object, table: Mapping[str, Entry]) -> Entry:
    """The entry of this name. Raises `InputError` for another one, with the nearest and all names.

    `kind` completes "'xyz' is no ...".
    """
    if isinstance(name, str) and name in table:
        return table[name]
    near = difflib.get_close_matches(str(name), table, n=1)
    hint = f" Do you mean {near[0]!r}?" if near else ""
    raise InputError(f"{name!r} is no {kind}.{hint} There are: {', '.join(sorted(table))}.")
