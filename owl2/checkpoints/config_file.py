"""Reads and checks ``config.json`` and ``generation_config.json``."""

import json
from pathlib import Path
from typing import Any

from huggingface_hub.errors import LocalEntryNotFoundError
from transformers import PreTrainedConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from owl2.errors import ErrorCode, InputError
from owl2.files import require_checkpoint
from owl2.model.configuration import Owl2Config
from owl2.model.registry import DEFAULT_MODEL_TYPE, get_model_type

FLOATS = ("temperature", "top_p", "min_p", "repetition_penalty", "length_penalty")
INTEGERS = ("max_new_tokens", "max_length", "min_length", "min_new_tokens", "top_k", "num_beams")
BOOLEANS = ("do_sample", "use_cache")
TOKEN_IDS = ("bos_token_id", "pad_token_id", "eos_token_id")
GENERATION_TYPES: dict[str, tuple[tuple[type, ...], str]] = {
    **dict.fromkeys(FLOATS, ((int, float), "a number")),
    **dict.fromkeys(INTEGERS, ((int,), "an integer")),
    **dict.fromkeys(BOOLEANS, ((bool,), "true or false")),
    **dict.fromkeys(TOKEN_IDS, ((int,), "a token id")),
}


def read_config(name_or_path: str | Path, **hub: Any) -> Owl2Config:
    """The configuration of a checkpoint, a directory or a hub id.

    Args:
        hub: Location arguments of `from_pretrained` (``subfolder``, ``revision`` ...).

    Raises:
        InputError: There is no configuration, it is of another model, or an option is invalid.
    """
    path, subfolder = Path(name_or_path), hub.get("subfolder") or ""
    if path.is_file():
        raise InputError(
            f"{path} is a file; pass the directory of the checkpoint", ErrorCode.INVALID_VALUE
        )
    require_checkpoint(str(name_or_path), "a model")
    file = path / subfolder / "config.json"
    if path.is_dir() and not file.is_file():
        raise InputError(f"{file.parent} has no config.json", ErrorCode.FILE_NOT_FOUND)
    try:
        values, _ = PreTrainedConfig.get_config_dict(name_or_path, **hub)
        model_type = values.get("model_type")
    except (OSError, ValueError) as error:
        if isinstance(error.__cause__, LocalEntryNotFoundError):
            raise InputError(
                f"There is no directory '{name_or_path}', and the hub is not reachable or does not "
                "have this repository. Check the path, or the connection.",
                ErrorCode.FILE_NOT_FOUND,
            ) from error
        raise InputError(
            f"{name_or_path}: config.json cannot be read: {error}", ErrorCode.UNREADABLE_FILE
        ) from error
    except (TypeError, AttributeError) as error:  # transformers expects a dict
        raise InputError(f"{file} must contain a JSON object", ErrorCode.INVALID_CONFIG) from error
    if not isinstance(model_type, str):
        raise InputError(
            f"{file}: model_type is {model_type!r}; expected {DEFAULT_MODEL_TYPE!r}",
            ErrorCode.INVALID_CONFIG,
        )
    try:
        parts = get_model_type(model_type)
    except InputError as error:
        hint = " `owl2 init` creates an mPLUG-Owl2 from a LLaMA." if model_type == "llama" else ""
        raise InputError(f"{file}: {error}{hint}", error.code) from error
    try:
        config: Owl2Config = parts.load("config")(**values)
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
    if not file.is_file():
        return
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{file} is not JSON: {error}", ErrorCode.INVALID_CONFIG) from error
    if not isinstance(values, dict):
        raise InputError(f"{file} must contain a JSON object", ErrorCode.INVALID_CONFIG)
    for name, (types, expected) in GENERATION_TYPES.items():
        value = values.get(name)
        items = value if name == "eos_token_id" and isinstance(value, list) else [value]
        # type, not isinstance: True is an int in Python.
        if value is not None and any(type(item) not in types for item in items):
            raise InputError(
                f"{file}: {name} must be {expected}, not {value!r}", ErrorCode.INVALID_CONFIG
            )
