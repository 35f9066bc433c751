"""Reading ``config.json`` and ``generation_config.json``, whatever somebody wrote into them."""

import json
from pathlib import Path
from typing import Any

from huggingface_hub.errors import LocalEntryNotFoundError
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from owl2.errors import InputError
from owl2.files import require_checkpoint
from owl2.model.configuration import Owl2Config

NUMBERS = ("temperature", "top_p", "min_p", "repetition_penalty", "length_penalty")
WHOLE = ("max_new_tokens", "max_length", "min_length", "min_new_tokens", "top_k", "num_beams")
TRUTHS = ("do_sample", "use_cache")
TOKENS = ("bos_token_id", "pad_token_id", "eos_token_id")


def read_config(name_or_path: str | Path, **hub: Any) -> Owl2Config:
    """The configuration of a checkpoint of ours, a directory or a hub id.

    Args:
        hub: where to look, as transformers' `from_pretrained` (``subfolder``, ``revision`` ...).

    Raises:
        InputError: there is none, it is another model's, or a setting makes no model.
    """
    path, subfolder = Path(name_or_path), hub.get("subfolder") or ""
    if path.is_file():
        raise InputError(f"{path} is a file; give the checkpoint's directory")
    require_checkpoint(str(name_or_path), "a model")
    if path.is_dir() and not (path / subfolder / "config.json").is_file():
        raise InputError(f"{path / subfolder} is no checkpoint: it has no config.json")
    file = path / subfolder / "config.json"
    try:
        values, _ = Owl2Config.get_config_dict(name_or_path, **hub)
        kind = values.get("model_type")
    except (OSError, ValueError) as error:
        if isinstance(error.__cause__, LocalEntryNotFoundError):
            raise InputError(
                f"There is no directory '{name_or_path}' here, and the hub cannot be asked or does "
                "not have it. Check the path, or the connection."
            ) from error
        raise InputError(f"{name_or_path} has no config.json that can be read: {error}") from error
    except (TypeError, AttributeError) as error:  # transformers looks things up in what is no dict
        raise InputError(f"{file}: expected an object of settings") from error
    _check_kind(file, kind)
    try:
        config = Owl2Config(**values)
        # What the position code lacks shows only when it is made; it is a few hundred numbers.
        LlamaRotaryEmbedding(config)
    except Exception as error:  # values of any type: what trips over them raises anything
        reason = str(error) if isinstance(error, ValueError) else repr(error)
        raise InputError(f"{file}: a setting makes no model: {reason}") from error
    return config


def check_generation_config(folder: Path) -> None:
    """Raise an InputError if a local ``generation_config.json`` holds values of a wrong type."""
    file = folder / "generation_config.json"
    if not file.is_file():
        return
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{file} is no JSON: {error}") from error
    if not isinstance(values, dict):
        raise InputError(f"{file}: expected an object of settings")
    for names, kinds, wanted in (
        (NUMBERS, (int, float), "a number"),
        (WHOLE, (int,), "a whole number"),
        (TRUTHS, (bool,), "true or false"),
    ):
        for name in names:
            value = values.get(name)
            # type, not isinstance: Python's True is a whole number.
            if value is not None and type(value) not in kinds:
                raise InputError(f"{file}: {name} must be {wanted}, not {value!r}")
    for name in TOKENS:
        value = values.get(name)
        ids = value if name == "eos_token_id" and isinstance(value, list) else [value]
        if value is not None and any(type(id_) is not int for id_ in ids):
            raise InputError(f"{file}: {name} must be a token's number, not {value!r}")


def _check_kind(file: Path, kind: Any) -> None:
    if kind == Owl2Config.model_type:
        return
    if kind is None:
        raise InputError(f"{file} has no model_type; an mPLUG-Owl2's is {Owl2Config.model_type!r}")
    hint = "; `owl2 init` makes an mPLUG-Owl2 of a LLaMA" if kind == "llama" else ""
    raise InputError(f"{file} is a {kind} model's, no {Owl2Config.model_type}'s{hint}")
