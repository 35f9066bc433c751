"""Read a `Recipe` from files and `key=value` overrides; errors name the file and the field."""

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from owl2.errors import ErrorCode, InputError
from owl2.files import expand_user
from owl2.json_records import readable
from owl2.registry import read_setting
from owl2.train.recipe import Recipe
from owl2.train.recipe_sections import (
    DataSource,
    LoraSettings,
    LossSettings,
    Section,
    ValidationSettings,
)

COMMAND_LINE = "the command line"
# The code of each of pydantic's errors, and the expected type unless its message names it.
ERRORS = {
    "missing": (ErrorCode.MISSING_VALUE, ""),
    "extra_forbidden": (ErrorCode.UNKNOWN_NAME, ""),
    "value_error": (ErrorCode.CONFLICT, ""),  # raised by the recipe itself
    "int_type": (ErrorCode.INVALID_TYPE, "an integer"),
    "float_type": (ErrorCode.INVALID_TYPE, "a number"),
    "bool_type": (ErrorCode.INVALID_TYPE, "true or false"),
    "string_type": (ErrorCode.INVALID_TYPE, "a string"),
    "list_type": (ErrorCode.INVALID_TYPE, "a list"),
    "dict_type": (ErrorCode.INVALID_TYPE, "a mapping of names to values"),
    "model_type": (ErrorCode.INVALID_TYPE, "a mapping of names to values"),
    "too_short": (ErrorCode.INVALID_VALUE, "a list with at least one entry"),
}
SECTIONS: dict[str, type[Section]] = {
    "data": DataSource,
    "lora": LoraSettings,
    "loss": LossSettings,
    "validation": ValidationSettings,
}


class _Loader(yaml.SafeLoader):
    """A YAML loader that reads `1e-4` as a number and refuses duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for number, ((key_node, _), key) in enumerate(zip(node.value, keys, strict=True)):
            if key in keys[:number]:
                raise yaml.MarkedYAMLError(
                    problem=f"duplicate key {key!r}", problem_mark=key_node.start_mark
                )
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def read_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, the recipes that it is based on, and `key=value` overrides.

    Args:
        path: A YAML file. Its `base: other.yaml`, relative to the file, is read first.
        overrides: Such as `learning_rate=1e-4` or `data.0.count=100`: dotted keys, YAML values.

    Raises:
        InputError: A missing or invalid file, a cycle of bases, an unknown key (the message names
            the most similar one), a value of the wrong type or out of range.
    """
    settings, origins = _read_with_bases(expand_user(path), ())
    pairs = [read_setting(argument, _Loader) for argument in overrides]
    origins |= {key.split(".")[0]: COMMAND_LINE for key, _ in pairs}
    _update(settings, {key: value for key, value in pairs if "." not in key})
    for key, value in pairs:  # nested keys after the keys that they are in
        if "." in key:
            _set_nested(settings, key, value)
    try:
        return Recipe.model_validate(settings)
    except ValidationError as error:
        problems = [_describe(detail, origins, str(path)) for detail in error.errors()]
        code, _ = ERRORS.get(error.errors()[0]["type"], (ErrorCode.INVALID_VALUE, ""))
        raise InputError("\n".join(problems), code) from error


def _read_with_bases(
    path: Path, derived: tuple[Path, ...]
) -> tuple[dict[str, Any], dict[str, str]]:
    """The settings of a file and its bases, and for each setting the file that it came from."""
    if path.resolve() in derived:
        cycle = " → ".join(str(file) for file in (*derived, path.resolve()))
        raise InputError(f"cycle of `base` recipes: {cycle}", ErrorCode.CONFLICT)
    own = read_yaml(path)
    base = own.pop("base", None)
    settings: dict[str, Any] = {}
    origins: dict[str, str] = {}
    if base is not None:
        if not isinstance(base, str):
            raise InputError(
                f"{path}: `base` is {base!r}, but must be a path", ErrorCode.INVALID_TYPE
            )
        base_path = path.parent / expand_user(base)
        settings, origins = _read_with_bases(base_path, (*derived, path.resolve()))
    _update(settings, own)
    return settings, origins | dict.fromkeys(own, str(path))


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file that contains a mapping of strings.

    Raises:
        InputError: The file does not exist, cannot be read or is not such a file.
    """
    try:
        with readable(path):
            content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
        problem = getattr(error, "problem", error)
        raise InputError(f"{where}: invalid YAML: {problem}", ErrorCode.INVALID_FORMAT) from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise InputError(f"{path} must contain `key: value` lines", ErrorCode.INVALID_FORMAT)
    return content


def _update(settings: dict[str, Any], changes: dict[str, Any]) -> None:
    """Update the settings in place; of `epochs` and `max_steps` the later one replaces both."""
    for key, other in (("epochs", "max_steps"), ("max_steps", "epochs")):
        if changes.get(key) is not None and other not in changes:
            settings.pop(other, None)
    settings.update(changes)


def _set_nested(settings: dict[str, Any], dotted: str, value: Any) -> None:
    """Set `settings[a][0][b] = value` for the key a.0.b."""
    *parents, last = dotted.split(".")
    container: Any = settings
    try:
        for key in parents:
            is_list = isinstance(container, list)
            container = container[int(key)] if is_list else container.setdefault(key, {})
        container[int(last) if isinstance(container, list) else last] = value
    except (AttributeError, IndexError, TypeError, ValueError) as error:
        raise InputError(
            f"{dotted!r} on {COMMAND_LINE} is not a key of the recipe, which has "
            f"{container!r:.80} there",
            ErrorCode.UNKNOWN_NAME,
        ) from error


def _describe(detail: ErrorDetails, origins: dict[str, str], path: str) -> str:
    """One validation error of pydantic as a line: file, field, the value, what is expected."""
    # Steps such as `list[...]` are branches of a union that pydantic tried, not fields.
    where = [part for part in detail["loc"] if not re.search(r"[\[\](]", str(part))]
    field, kind = ".".join(map(str, where)), detail["type"]
    if where:
        origin = origins.get(str(where[0]), path)
    else:  # a conflict between settings
        origin = f"{path} or {COMMAND_LINE}" if COMMAND_LINE in origins.values() else path
    if kind == "value_error":
        at = f" `{field}`:" if field else ""
        return f"{origin}:{at} {detail['ctx']['error']}"
    fields = _section_of(where).model_fields
    if kind == "missing":
        description = getattr(fields.get(str(where[-1])), "description", None)
        return f"{path}: `{field}` is missing: {description or 'it is required'}"
    if kind == "extra_forbidden":
        [similar] = difflib.get_close_matches(str(where[-1]), list(fields), n=1, cutoff=0)
        return f"{origin}: unknown key `{field}`; the most similar key is `{similar}`"
    _, expected = ERRORS.get(kind, (None, ""))
    message = detail["msg"].removeprefix("Input ").removeprefix("should be ")
    return f"{origin}: `{field}` is {detail['input']!r}, but must be {expected or message}"


def _section_of(where: Sequence[Any]) -> type[Section]:
    """The section that contains the last field of a path such as (validation, data, 0, file)."""
    section: type[Section] = Recipe
    for part in where[:-1]:
        section = SECTIONS.get(str(part), section)
    return section
