"""The files of a processor in a checkpoint: which there are, and how they are found and read."""

import json
from pathlib import Path
from typing import Any

from transformers.utils.hub import cached_file

from owl2.errors import InputError
from owl2.processing.tokenizer import TOKENIZER_CONFIG_FILE, TOKENIZER_FILE

CONFIG_FILE = "config.json"
PREPROCESSOR_FILE = "preprocessor_config.json"
PROCESSOR_FILE = "processor_config.json"
TEMPLATE_FILE = "chat_template.jinja"
_TOKENIZER_FILES = (TOKENIZER_FILE, "tokenizer.json", TOKENIZER_CONFIG_FILE)
_FILES = (CONFIG_FILE, PREPROCESSOR_FILE, PROCESSOR_FILE, TEMPLATE_FILE, *_TOKENIZER_FILES)


def find_files(name: str, hub: dict[str, Any]) -> dict[str, Path | None]:
    """The processor's files in a directory or on the hub (fetched), None for those not there.

    Raises `InputError`: no such directory, not on the hub or not reachable, or without what a
    processor needs.
    """
    if not Path(name).is_dir() and (name.startswith((".", "/", "~")) or name.count("/") != 1):
        raise InputError(
            f"There is no directory '{name}' to load a processor from. Check the path."
        )
    files: dict[str, Path | None] = {}
    for file in _FILES:
        try:
            found = cached_file(name, file, _raise_exceptions_for_missing_entries=False, **hub)
        except OSError as error:
            raise InputError(
                f"'{name}' is no directory, and the hub does not give its {file}: {error}"
            ) from error
        files[file] = Path(found) if found else None
    missing = []
    if not any(files[file] for file in _TOKENIZER_FILES):
        missing.append(f"a tokenizer ({' or '.join(_TOKENIZER_FILES[:2])})")
    if files[PREPROCESSOR_FILE] is None and files[CONFIG_FILE] is None:
        missing.append(f"the picture settings ({PREPROCESSOR_FILE})")
    if missing:
        where = f"'{name}'" if Path(name).is_dir() else f"'{name}' on the hub"
        raise InputError(
            f"{where} holds no processor: {' and '.join(missing)} missing. Copy the files from "
            "the checkpoint it was made from, or make one with `owl2 init`."
        )
    return files


def read_json(path: Path | None) -> dict[str, Any]:
    """A settings file, `{}` where there is none. Raises `InputError` if it is no JSON object."""
    if path is None:
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is no JSON: {error}.") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} must hold a JSON object, not {type(content).__name__}.")
    return content


def as_json(content: dict[str, Any]) -> str:
    """The text of a settings file; the same content gives the same text."""
    return json.dumps(content, indent=2, sort_keys=True) + "\n"
