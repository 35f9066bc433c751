"""The processor's files in a checkpoint: search and validation.

The files come from any source, so every problem is an `InputError` with the file and the key.
"""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import is_offline_mode
from huggingface_hub.errors import LocalEntryNotFoundError
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils.hub import cached_file

from owl2.errors import ErrorCode, InputError
from owl2.files import require_checkpoint
from owl2.model.registry import DEFAULT_MODEL_TYPE, MODEL_TYPES, ModelType
from owl2.processing.image_processing import Owl2ImageProcessor
from owl2.processing.tokenizer import TOKENIZER_CONFIG_FILE, TOKENIZER_FILE, encode

CONFIG_FILE = "config.json"
PREPROCESSOR_FILE = "preprocessor_config.json"
PROCESSOR_FILE = "processor_config.json"
TEMPLATE_FILE = "chat_template.jinja"
# config.json first: every checkpoint has it, so it shows whether the checkpoint exists.
_FILES = (CONFIG_FILE, PREPROCESSOR_FILE, PROCESSOR_FILE, TEMPLATE_FILE, TOKENIZER_CONFIG_FILE)
# Each of these makes a tokenizer. From tokenizer_config.json alone, transformers would create an
# empty tokenizer.
_VOCABULARIES = ((TOKENIZER_FILE,), ("tokenizer.json",), ("vocab.json", "merges.txt"))
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")

_HUB_ARGS = frozenset(
    ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
)
# Added by AutoProcessor and pipelines.
_AUTO_ARGS = frozenset(
    ("_commit_hash", "_from_auto", "_from_pipeline", "code_revision", "dtype", "trust_remote_code")
)

Files = dict[str, Path | None]


def find_files(name: str, hub: dict[str, Any]) -> Files:
    """The processor's files in a directory or on the hub (downloaded); None for missing files.

    Raises:
        InputError: The directory does not exist, the hub is not reachable or does not have the
            repository, or a required file is missing.
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
        place = ""
        if not Path(name).is_dir():
            place = " in the hub's cache" if _is_offline(hub) else " on the hub"
        raise InputError(
            f"'{name}'{place} does not contain a processor: {' and '.join(missing)} missing. Copy "
            "the files of the original checkpoint, or create them with `owl2 init`.",
            ErrorCode.FILE_NOT_FOUND,
        )
    return files


def _find(name: str, file: str, hub: dict[str, Any]) -> Path | None:
    try:
        # For config.json only, transformers raises if it cannot find out whether the file exists.
        found = cached_file(
            name, file, _raise_exceptions_for_missing_entries=file == CONFIG_FILE, **hub
        )
    except OSError as error:
        if not isinstance(error.__cause__, LocalEntryNotFoundError):
            code, reason = ErrorCode.NETWORK, f"the hub does not provide its {file}: {error}"
        elif _is_offline(hub):
            code, reason = (
                ErrorCode.FILE_NOT_FOUND,
                "the hub's cache does not contain it (offline).",
            )
        else:
            code, reason = ErrorCode.NETWORK, "the hub is not reachable. Check the connection."
        raise InputError(f"There is no directory '{name}', and {reason}", code) from error
    return Path(found) if found else None


def _is_offline(hub: dict[str, Any]) -> bool:
    return bool(is_offline_mode() or hub.get("local_files_only"))


# ------------------------------------------------------------------------ reading


def read_processor(name: str, hub: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `Owl2Processor` for a checkpoint, a directory or a hub id.

    Raises:
        InputError: A file is missing or invalid.
        TypeError: An unknown argument in `hub`.
    """
    hub = {key: value for key, value in hub.items() if key not in _AUTO_ARGS}
    if unknown := sorted(hub.keys() - _HUB_ARGS):
        raise TypeError(f"from_pretrained() got unexpected arguments: {', '.join(unknown)}")
    files = find_files(name, hub)
    config, own = read_json(files[CONFIG_FILE]), read_json(files[PROCESSOR_FILE])
    name_of_type = config.get("model_type")
    is_registered = isinstance(name_of_type, str) and name_of_type in MODEL_TYPES
    model_type = MODEL_TYPES[str(name_of_type) if is_registered else DEFAULT_MODEL_TYPE]
    visual = section(config, "visual_config")
    # Without the file, all settings but the size have their default (Specification §1.5).
    pixels = read_json(files[PREPROCESSOR_FILE]) or {
        "size": number(section(visual, "visual_model"), "image_size", 448)
    }
    image_processor = Owl2ImageProcessor.from_dict(pixels, model_type.image_policy)
    template = read_template(files[TEMPLATE_FILE])
    tokenizer = load_tokenizer(name, files, hub, model_type)
    size = len(tokenizer)
    num_image_tokens = number(own, "num_image_tokens", 65, PROCESSOR_FILE)
    image_token_id = number(own, "image_token_id", size, PROCESSOR_FILE)
    if config:
        # The model's configuration has precedence, because the ids must fit the model.
        abstractor = section(visual, "visual_abstractor")
        num_image_tokens = number(abstractor, "num_learnable_queries", 64) + 1
        image_token_id = max(number(config, "vocab_size", size), size)
    return {
        "image_processor": image_processor,
        "tokenizer": tokenizer,
        "chat_template": tokenizer.chat_template if template is None else template,
        "num_image_tokens": num_image_tokens,
        "image_token_id": image_token_id,
    }


def load_tokenizer(
    name: str, files: Files, hub: dict[str, Any], model_type: ModelType
) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint.

    Raises:
        InputError: It cannot be loaded, or its vocabulary is empty.
    """
    file = TOKENIZER_CONFIG_FILE
    for key, value in read_json(files[file]).items():
        if key in _SPECIAL_TOKENS and not isinstance(value, (str, dict, type(None))):
            raise InputError(
                f"{files[file]}: {key} is {value!r}; it must be a string.", ErrorCode.INVALID_CONFIG
            )
    loader = AutoTokenizer if files[TOKENIZER_FILE] is None else model_type.load("tokenizer")
    try:
        tokenizer: PreTrainedTokenizerBase = loader.from_pretrained(name, **hub)
        is_empty = not encode(tokenizer, "x")
    except InputError:
        raise
    except Exception as error:  # the loader raises exceptions of any type for corrupt files
        raise InputError(
            f"The tokenizer of '{name}' cannot be loaded: {type(error).__name__}: {error}. Its "
            f"files ({file}, ...) may be corrupt: copy them again.",
            ErrorCode.UNREADABLE_FILE,
        ) from error
    if is_empty:
        raise InputError(
            f"The tokenizer of '{name}' has no tokens for the text 'x': its vocabulary is missing "
            "or empty. Copy the files of the tokenizer again.",
            ErrorCode.UNREADABLE_FILE,
        )
    return tokenizer


def read_template(path: Path | None) -> str | None:
    """The chat template, or None without a file. Raises `InputError` if it is not UTF-8."""
    if path is None:
        return None
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not a text file in UTF-8: {error}.", ErrorCode.INVALID_FORMAT
        ) from error


def read_json(path: Path | None) -> dict[str, Any]:
    """A JSON object, or `{}` without a file. Raises `InputError` for other contents."""
    if path is None:
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: {error}.", ErrorCode.INVALID_CONFIG) from error
    if not isinstance(content, dict):
        raise InputError(
            f"{path} must contain a JSON object, not a {type(content).__name__}.",
            ErrorCode.INVALID_CONFIG,
        )
    return content


def section(config: dict[str, Any], key: str) -> dict[str, Any]:
    """The object under `key` of config.json, or `{}`."""
    value = config.get(key, {})
    if not isinstance(value, dict):
        raise InputError(
            f"{CONFIG_FILE}: {key} is {value!r}; it must be an object.", ErrorCode.INVALID_CONFIG
        )
    return value


def number(config: dict[str, Any], key: str, default: int, file: str = CONFIG_FILE) -> int:
    """The positive integer under `key`, or `default`."""
    value = config.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(
            f"{file}: {key} is {value!r}; it must be an integer of at least 1.",
            ErrorCode.INVALID_CONFIG,
        )
    return value


def as_json(content: dict[str, Any]) -> str:
    """Deterministic JSON."""
    return json.dumps(content, indent=2, sort_keys=True) + "\n"
