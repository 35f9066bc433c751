"""Lookup of components by the names that recipes and the command line use."""

import difflib
import inspect
from collections.abc import Callable, Mapping
from typing import Annotated, Any, NamedTuple, TypeVar

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from owl2.errors import ErrorCode, InputError

Entry = TypeVar("Entry")

PositiveInteger = Annotated[int, Field(ge=1)]
PositiveNumber = Annotated[float, Field(gt=0, allow_inf_nan=False)]


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


class Option(NamedTuple):
    """The type of an option, as pydantic reads it, and its default."""

    type: Any
    default: Any


def options_of(function: Callable[..., Any]) -> dict[str, Option]:
    """The keyword-only parameters of `function`, in order."""
    return {
        parameter.name: Option(parameter.annotation, parameter.default)
        for parameter in inspect.signature(function, eval_str=True).parameters.values()
        if parameter.kind is parameter.KEYWORD_ONLY
    }


def check_options(kind: str, known: Mapping[str, Option], options: Mapping[str, Any]) -> None:
    """Raises `InputError` for an unknown option, or for a value that is not of the option's type.

    Values are not converted: "3" is not an integer.
    """
    for name, value in options.items():
        type_ = look_up(kind, name, known).type
        try:
            TypeAdapter(type_, config=ConfigDict(strict=True)).validate_python(value)
        except ValidationError as error:
            problem = error.errors()[0]
            code = ErrorCode.INVALID_TYPE if "_type" in problem["type"] else ErrorCode.INVALID_VALUE
            raise InputError(f"{name}={value}: {problem['msg']}", code) from error
