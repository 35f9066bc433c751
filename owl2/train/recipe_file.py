"""From files and `key=value` words to a `Recipe`, with errors that name the file and the field."""

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from owl2.errors import InputError
from owl2.train.recipe import DataSource, Recipe

COMMAND_LINE = "the command line"
# What pydantic calls a wrong type, and what a person would.
WANTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "dict_type": "a mapping of names to values",
    "model_type": "a mapping of names to values",
}


class _Loader(yaml.SafeLoader):
    """YAML as people write it: `1e-4` is a number (YAML 1.1 reads text), a key stands once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for number, ((key_node, _), key) in enumerate(zip(node.value, keys, strict=True)):
            if key in keys[:number]:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key!r} stands twice", problem_mark=key_node.start_mark
                )
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def read_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a file, with what it derives from (`base`) and with `key=value` over it.

    Args:
        path: a YAML file; its `base: other.yaml`, relative to it, is read first.
        overrides: `learning_rate=1e-4`, `data.0.count=100`: dotted keys, YAML values.

    Raises:
        InputError: for a missing or broken file, a circle of bases, an unknown key (names the
            nearest), a value of the wrong type or out of range (names the field and the file).
    """
    settings, origins = _read_layers(Path(path), ())
    _override(settings, origins, overrides)
    try:
        return Recipe.model_validate(settings)
    except ValidationError as error:
        problems = [_in_words(detail, origins, str(path)) for detail in error.errors()]
        raise InputError("\n".join(problems)) from error


def _read_layers(path: Path, above: tuple[Path, ...]) -> tuple[dict[str, Any], dict[str, str]]:
    """A file over its bases: the settings, and for each the file that it came from."""
    if path.resolve() in above:
        circle = " → ".join(str(file) for file in (*above, path.resolve()))
        raise InputError(f"recipes that are each other's `base`: {circle}")
    own = read_yaml(path)
    base = own.pop("base", None)
    settings: dict[str, Any] = {}
    origins: dict[str, str] = {}
    if base is not None:
        if not isinstance(base, str):
            raise InputError(f"{path}: `base` is {base!r}, but must be the name of a file")
        settings, origins = _read_layers(path.parent / base, (*above, path.resolve()))
    _lay_over(settings, own)
    return settings, origins | dict.fromkeys(own, str(path))


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file of `key: value` lines, as people write it. Raises `InputError` if it is not."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError as error:
        raise InputError(f"there is no file {path}") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not text in UTF-8") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
        raise InputError(f"{where}: this is not YAML: {error.problem}") from error
    except yaml.YAMLError as error:
        raise InputError(f"{path}: this is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} must be a list of `key: value` lines, but is not")
    for key in content:
        if not isinstance(key, str):
            raise InputError(f"{path}: the key {key!r} is not a name")
    return content


def _lay_over(settings: dict[str, Any], upper: dict[str, Any]) -> None:
    """Put `upper` over `settings`; of `epochs` and `max_steps` the later one counts."""
    for key, other in (("epochs", "max_steps"), ("max_steps", "epochs")):
        if upper.get(key) is not None and other not in upper:
            settings.pop(other, None)
    settings.update(upper)


def _override(settings: dict[str, Any], origins: dict[str, str], overrides: Sequence[str]) -> None:
    """Put `key=value` words over the settings, in place: whole settings, then parts of them."""
    whole: dict[str, Any] = {}
    parts: list[tuple[list[str], Any, str]] = []
    for word in overrides:
        dotted, equals, text = word.partition("=")
        if not equals or not dotted:
            raise InputError(f"{word!r} on the command line is not of the form key=value")
        try:
            value = yaml.load(text, _Loader)
        except yaml.YAMLError as error:
            raise InputError(f"{word!r} on the command line: the value is not YAML") from error
        keys = dotted.split(".")
        if len(keys) == 1:
            whole[dotted] = value
        else:
            parts.append((keys, value, word))
        origins[keys[0]] = COMMAND_LINE
    _lay_over(settings, whole)
    for keys, value, word in parts:
        _set_within(settings, keys, value, word)


def _set_within(settings: dict[str, Any], keys: list[str], value: Any, word: str) -> None:
    """`settings[a][0][b] = value` for the keys a, 0, b; `word` is quoted in errors."""
    place: Any = settings
    for position, key in enumerate(keys):
        index: str | int = key
        at = ".".join(keys[:position])
        if isinstance(place, list):
            if not key.isdigit() or int(key) >= len(place):
                raise InputError(
                    f"{word!r}: `{at}` has {len(place)} entries, from 0; none is {key!r}"
                )
            index = int(key)
        elif not isinstance(place, dict):
            raise InputError(f"{word!r}: the recipe has nothing at `{at}` that could hold {key!r}")
        if position == len(keys) - 1:
            place[index] = value
        else:
            place = place.setdefault(index, {}) if isinstance(place, dict) else place[index]


def _in_words(detail: ErrorDetails, origins: dict[str, str], path: str) -> str:
    """One of pydantic's findings as a line: file, field, what was given, what is wanted."""
    where = [part for part in detail["loc"] if not _names_a_branch(part)]
    field = ".".join(str(part) for part in where)
    if where:
        origin = origins.get(str(where[0]), path)
    else:  # settings that do not go together
        origin = f"{path} or {COMMAND_LINE}" if COMMAND_LINE in origins.values() else path
    kind, given = detail["type"], detail["input"]
    if kind == "missing":
        return f"{path}: `{field}` is missing: {_meaning(where)}"
    if kind == "extra_forbidden":
        names = list((DataSource if len(where) > 1 else Recipe).model_fields)
        near = difflib.get_close_matches(str(where[-1]), names, n=1, cutoff=0)
        return f"{origin}: there is no setting `{field}`; the nearest is `{near[0]}`"
    if kind == "value_error":  # raised by the recipe itself, in words
        at = f" `{field}`:" if field else ""
        return f"{origin}:{at} {detail['ctx']['error']}"
    if kind == "literal_error":
        return f"{origin}: `{field}` is {given!r}, but must be {detail['ctx']['expected']}"
    if kind == "too_short":
        return f"{origin}: `{field}` is empty, but must have at least one entry"
    if kind in WANTED:
        return f"{origin}: `{field}` is {given!r}, but must be {WANTED[kind]}"
    message = detail["msg"].removeprefix("Input ").removeprefix("should be ")
    return f"{origin}: `{field}` is {given!r}, but must be {message}"


def _names_a_branch(part: Any) -> bool:
    """Whether a step of pydantic's path is not a field but a branch it tried, as `list[...]`."""
    return isinstance(part, str) and bool(re.search(r"[\[\](]", part))


def _meaning(where: list[Any]) -> str:
    fields = (DataSource if len(where) > 1 else Recipe).model_fields
    field = fields.get(str(where[-1]))
    return (field and field.description) or "it must be given"
