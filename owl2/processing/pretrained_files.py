"""The files of a processor in a checkpoint: which there are, and how they are found and read.

They come from anywhere, so whatever is wrong in them is an `InputError` with the file and the
field.
"""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import is_offline_mode
from huggingface_hub.errors import LocalEntryNotFoundError
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils.hub import cached_file

from owl2.errors import InputError
from owl2.files import require_checkpoint
from owl2.processing.tokenizer import TOKENIZER_CONFIG_FILE, TOKENIZER_FILE, Owl2Tokenizer, encode

CONFIG_FILE = "config.json"
PREPROCESSOR_FILE = "preprocessor_config.json"
PROCESSOR_FILE = "processor_config.json"
TEMPLATE_FILE = "chat_template.jinja"
# config.json first: every checkpoint has it, so it tells whether there is one.
_FILES = (CONFIG_FILE, PREPROCESSOR_FILE, PROCESSOR_FILE, TEMPLATE_FILE, TOKENIZER_CONFIG_FILE)
# Any one of these makes a tokenizer. tokenizer_config.json alone does not, though transformers
# would make an empty one of it.
_VOCABULARIES = ((TOKENIZER_FILE,), ("tokenizer.json",), ("vocab.json", "merges.txt"))
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")

Files = dict[str, Path | None]


def find_files(name: str, hub: dict[str, Any]) -> Files:
    """The processor's files in a directory or on the hub (fetched), None for those not there.

    Raises `InputError`: no such directory, not on the hub or not reachable, or without what a
    processor needs.
    """
    require_checkpoint(name, "a processor")
    files = {file: _find(name, file, hub) for file in _FILES}
    for vocabulary in _VOCABULARIES:
        files |= {file: _find(name, file, hub) for file in vocabulary}
        if has_vocabulary := all(files[file] for file in vocabulary):
            break
    missing = []
    if not has_vocabulary:
        missing.append(f"a tokenizer ({' or '.join(map(' and '.join, _VOCABULARIES))})")
    if files[PREPROCESSOR_FILE] is None and files[CONFIG_FILE] is None:
        missing.append(f"the image settings ({PREPROCESSOR_FILE})")
    if missing:
        where = f"'{name}'"
        if not Path(name).is_dir():
            where += " in the hub's cache" if _is_offline(hub) else " on the hub"
        raise InputError(
            f"{where} holds no processor: {' and '.join(missing)} missing. Copy the files from "
            "the checkpoint it was made from, or make one with `owl2 init`."
        )
    return files


def _find(name: str, file: str, hub: dict[str, Any]) -> Path | None:
    try:
        # For config.json, transformers raises if nothing can be known about it, and only then.
        found = cached_file(
            name, file, _raise_exceptions_for_missing_entries=file == CONFIG_FILE, **hub
        )
    except OSError as error:
        if not isinstance(error.__cause__, LocalEntryNotFoundError):
            reason = f"the hub does not give its {file}: {error}"
        elif _is_offline(hub):
            reason = "offline, only the hub's cache can be asked, which does not hold it."
        else:
            reason = "the hub cannot be reached. Check the path, or the connection."
        raise InputError(f"There is no directory '{name}' here, and {reason}") from error
    return Path(found) if found else None


def _is_offline(hub: dict[str, Any]) -> bool:
    return bool(is_offline_mode() or hub.get("local_files_only"))


# ------------------------------------------------------------------ reading


def load_tokenizer(name: str, files: Files, hub: dict[str, Any]) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint. Raises `InputError` if it cannot be loaded or has no words."""
    file = TOKENIZER_CONFIG_FILE
    for key, value in read_json(files[file]).items():
        if key in _SPECIAL_TOKENS and not isinstance(value, (str, dict, type(None))):
            raise InputError(f"{files[file]}: {key} is {value!r}; it must be a string.")
    loader = AutoTokenizer if files[TOKENIZER_FILE] is None else Owl2Tokenizer
    try:
        tokenizer: PreTrainedTokenizerBase = loader.from_pretrained(name, **hub)
        is_empty = not encode(tokenizer, "x")
    except InputError:
        raise
    except Exception as error:  # a foreign loader on files of any content: it raises anything
        raise InputError(
            f"The tokenizer of '{name}' cannot be loaded: {type(error).__name__}: {error}. Its "
            f"files ({file}, ...) may be broken: copy them again."
        ) from error
    if is_empty:
        raise InputError(
            f"The tokenizer of '{name}' has no tokens for the text 'x': its vocabulary is missing "
            "or empty. Copy the tokenizer's files again."
        )
    return tokenizer


def read_template(path: Path | None) -> str | None:
    """The chat template, None where there is no file. Raises `InputError` if it is not UTF-8."""
    if path is None:
        return None
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not a text file in UTF-8: {error}.") from error


def read_json(path: Path | None) -> dict[str, Any]:
    """A settings file, `{}` where there is none. Raises `InputError` if it is no JSON object."""
    if path is None:
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is no JSON: {error}.") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} must hold a JSON object, not {type(content).__name__}.")
    return content


def section(config: dict[str, Any], key: str) -> dict[str, Any]:
    """The object under `key` of config.json, `{}` where there is none."""
    value = config.get(key, {})
    if not isinstance(value, dict):
        raise InputError(f"{CONFIG_FILE}: {key} is {value!r}; it must be an object.")
    return value


def number(config: dict[str, Any], key: str, default: int, file: str = CONFIG_FILE) -> int:
    """The whole number above 0 under `key`, `default` where there is none."""
    value = config.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"{file}: {key} is {value!r}; it must be a whole number above 0.")
    return value


def as_json(content: dict[str, Any]) -> str:
    """The text of a settings file; the same content gives the same text."""
    return json.dumps(content, indent=2, sort_keys=True) + "\n"
