"""Finds the files of a checkpoint, and reads its ``config.json`` and ``generation_config.json``."""

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

from huggingface_hub import is_offline_mode
from huggingface_hub.errors import LocalEntryNotFoundError
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.utils.hub import cached_file

from owl2.errors import ErrorCode, InputError, require_package
from owl2.files import expand_user
from owl2.model.configuration import Owl2Config
from owl2.model.registry import check_visual_parts, get_model_type

CONFIG_FILE = "config.json"
# Arguments of `from_pretrained` that locate a checkpoint.
HUB_ARGS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
FLOATS = ("temperature", "top_p", "min_p", "typical_p", "repetition_penalty", "length_penalty")
INTEGERS = (
    "max_new_tokens",
    "max_length",
    "min_length",
    "min_new_tokens",
    "top_k",
    "num_beams",
    "no_repeat_ngram_size",
)
BOOLEANS = ("do_sample", "use_cache")
TOKEN_IDS = ("bos_token_id", "pad_token_id", "eos_token_id")
GENERATION_TYPES: dict[str, tuple[tuple[type, ...], str]] = {
    **dict.fromkeys(FLOATS, ((int, float), "a number")),
    **dict.fromkeys(INTEGERS, ((int,), "an integer")),
    **dict.fromkeys(BOOLEANS, ((bool,), "true or false")),
    **dict.fromkeys(TOKEN_IDS, ((int,), "a token id")),
}
# With the value 1 or true, ids are those of ModelScope; the first that is set decides.
MODELSCOPE_VARIABLES = ("OWL2_USE_MODELSCOPE", "VLLM_USE_MODELSCOPE")
WEIGHTS = [r".+\.bin$", r".+\.safetensors$"]  # as ModelScope's snapshot_download expects


def resolve_checkpoint(
    name: str | Path, kind: str = "a model", weights: bool = True, revision: str | None = None
) -> str:
    """The directory of a checkpoint, or its Hugging Face id.

    ``~`` is the home directory. An id of ModelScope is downloaded (see `MODELSCOPE_VARIABLES`).

    Args:
        kind: What is loaded, for the message: "a model", "a processor".
        weights: Whether weights are downloaded from ModelScope.

    Raises:
        InputError: The name is a path to a file or to a missing directory; ModelScope does not
            provide the id.
    """
    path = expand_user(name)
    if path.is_dir():
        return str(path)
    if path.is_file():
        raise InputError(
            f"{name} is a file; pass the directory of the checkpoint", ErrorCode.INVALID_VALUE
        )
    name = str(name)
    owner, hint = name.split("/")[0], ""
    if not name.startswith((".", "/", "~")) and name.count("/") == 1:
        if not Path(owner).is_dir():
            settings = [os.environ[key] for key in MODELSCOPE_VARIABLES if key in os.environ]
            if settings and settings[0].lower() in ("1", "true"):
                return _download_from_modelscope(name, weights, revision)
            return name
        hint = f" To load it from the hub, run from a directory without '{owner}'."
    raise InputError(
        f"There is no directory '{name}' to load {kind} from. Check the path.{hint}",
        ErrorCode.FILE_NOT_FOUND,
    )


@cache
def _download_from_modelscope(name: str, weights: bool, revision: str | None) -> str:
    require_package("modelscope", "The hub modelscope", "modelscope")
    from modelscope import snapshot_download

    try:
        return str(
            snapshot_download(
                name, revision=revision, ignore_file_pattern=None if weights else WEIGHTS
            )
        )
    except Exception as error:  # of its HTTP client and of its own classes
        raise InputError(
            f"ModelScope does not provide '{name}': {error}", ErrorCode.NETWORK
        ) from error


def find_file(name: str | Path, file: str, hub: dict[str, Any]) -> Path | None:
    """A file of a checkpoint, a directory or a hub id (downloaded); None if it has no such file.

    Args:
        hub: Location arguments of `from_pretrained`, see `HUB_ARGS`.

    Raises:
        InputError: The hub is not reachable or does not have the repository.
    """
    try:
        # For config.json only, transformers raises if it cannot find out whether the file exists.
        found = cached_file(
            str(name), file, _raise_exceptions_for_missing_entries=file == CONFIG_FILE, **hub
        )
    except OSError as error:
        code, reason = ErrorCode.NETWORK, f"the hub does not provide its {file}: {error}"
        if isinstance(error.__cause__, LocalEntryNotFoundError):
            reason = "the hub is not reachable. Check the path, or the connection."
            if is_offline_mode() or hub.get("local_files_only"):
                code = ErrorCode.FILE_NOT_FOUND
                reason = "the hub's cache does not contain it (offline). Check the path."
        raise InputError(f"There is no directory '{name}', and {reason}", code) from error
    return Path(found) if found else None


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object. Raises `InputError` for other contents."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} is not JSON: {error}.", ErrorCode.INVALID_CONFIG) from error
    if not isinstance(content, dict):
        raise InputError(
            f"{file} must contain a JSON object, not a {type(content).__name__}.",
            ErrorCode.INVALID_CONFIG,
        )
    return content


def read_config(name_or_path: str | Path, **hub: Any) -> Owl2Config:
    """The configuration of a checkpoint, a directory or a hub id.

    Args:
        hub: Location arguments of `from_pretrained`, see `HUB_ARGS`.

    Raises:
        InputError: There is no configuration, it is of another model, or an option is invalid.
    """
    name_or_path = resolve_checkpoint(name_or_path, "a model", False, hub.get("revision"))
    file = find_file(name_or_path, CONFIG_FILE, hub)
    if file is None:
        raise InputError(f"{name_or_path} has no {CONFIG_FILE}", ErrorCode.FILE_NOT_FOUND)
    values = read_json(file)
    model_type = values.get("model_type")
    try:
        parts = get_model_type(str(model_type))
        visual = values.get("visual_config")
        check_visual_parts(str(model_type), visual if isinstance(visual, dict) else ())
    except InputError as error:
        hint = " `owl2 init` creates an mPLUG-Owl2 from a LLaMA." if model_type == "llama" else ""
        raise InputError(f"{file}: {error}{hint}", error.code) from error
    try:
        config: Owl2Config = parts.load("config")(**values)
        if not isinstance(quantization := values.get("quantization_config"), dict | None):
            raise ValueError(f"quantization_config must be an object, not {quantization!r}")
        # Invalid RoPE parameters raise only when the (small) module is created.
        LlamaRotaryEmbedding(config)
    except Exception as error:  # values of any type raise exceptions of any type
        reason = str(error) if isinstance(error, ValueError) else repr(error)
        raise InputError(
            f"{file}: invalid configuration: {reason}", ErrorCode.INVALID_CONFIG
        ) from error
    return config


def check_generation_config(folder: Path) -> None:
    """Raise an InputError if ``generation_config.json`` has values of a wrong type."""
    file = folder / "generation_config.json"
    values = read_json(file) if file.is_file() else {}
    for name, (types, expected) in GENERATION_TYPES.items():
        value = values.get(name)
        items = value if name == "eos_token_id" and isinstance(value, list) else [value]
        # type, not isinstance: True is an int in Python.
        if value is not None and any(type(item) not in types for item in items):
            raise InputError(
                f"{file}: {name} must be {expected}, not {value!r}", ErrorCode.INVALID_CONFIG
            )
