"""Lookup of components by the names that recipes and the command line use."""

import difflib
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import yaml

from owl2.errors import ErrorCode, InputError

Entry = TypeVar("Entry")


def look_up(kind: str, name: object, table: Mapping[str, Entry]) -> Entry:
    """The entry `name` of `table`.

    Raises:
        InputError: There is no such entry. The message names the `kind`, the most similar name and
            all names.
    """
    if isinstance(name, str) and name in table:
        return table[name]
    similar = difflib.get_close_matches(str(name), table, n=1)
    hint = f" Did you mean {similar[0]!r}?" if similar else ""
    raise InputError(
        f"unknown {kind} {name!r}.{hint} Choose from: {', '.join(sorted(table))}.",
        ErrorCode.UNKNOWN_NAME,
    )


def read_setting(text: str, loader: Any = yaml.SafeLoader) -> tuple[str, Any]:
    """`option=value` as a pair; the value is parsed as YAML. Raises `InputError` if it is not."""
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise InputError(f"{text!r} must have the form option=value", ErrorCode.INVALID_FORMAT)
    try:
        return key, yaml.load(value, loader)
    except yaml.YAMLError as error:
        raise InputError(
            f"{text!r}: the value is not valid YAML: {error}", ErrorCode.INVALID_FORMAT
        ) from error


def check_options(kind: str, function: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """Raises `InputError` for a key that is not a keyword-only parameter of `function`."""
    known = options_of(function)
    for option in options:
        look_up(kind, option, known)


def options_of(function: Callable[..., Any]) -> dict[str, Any]:
    """The keyword-only parameters of `function` with their defaults, in order."""
    return {
        parameter.name: parameter.default
        for parameter in inspect.signature(function).parameters.values()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
