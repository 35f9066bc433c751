"""Looking things up by the names that recipes and the command line use."""

import difflib
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import yaml

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


def read_setting(text: str) -> tuple[str, Any]:
    """`option=value` → its two sides, the value read as YAML. Raises `InputError` if it cannot."""
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise InputError(f"{text!r} must have the form option=value.")
    try:
        return key, yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise InputError(f"{text!r}: the value cannot be read: {error}") from error


def check_options(kind: str, function: Callable[..., Any], given: Mapping[str, Any]) -> None:
    """Raises `InputError` for what is no keyword option of the function.

    `kind` as in `look_up`.
    """
    known = options_of(function)
    for option in given:
        look_up(kind, option, known)


def options_of(function: Callable[..., Any]) -> dict[str, Any]:
    """The function's keyword-only options with their defaults, in order."""
    return {
        parameter.name: parameter.default
        for parameter in inspect.signature(function).parameters.values()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
