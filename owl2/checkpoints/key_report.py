"""Errors about weights: missing, unexpected and mismatched keys, and files that cannot be read."""

import pickle
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers.utils import logging

from owl2.checkpoints.weight_names import released_name
from owl2.errors import ErrorCode, InputError

MAX_LINES = 12
Shapes = Mapping[str, tuple[Sequence[int], Sequence[int]]]
# StrictDataclassError: an option in config.json has the wrong type.
UNREADABLE = (OSError, SafetensorError, EOFError, StrictDataclassError, pickle.UnpicklingError)
# transformers reports the keys that do not fit, and owl2 decides.
REPORT_KEYS: dict[str, Any] = {"ignore_mismatched_sizes": True, "output_loading_info": True}


@contextmanager
def translate_load_errors(source: str | Path | None) -> Iterator[None]:
    """Raise an InputError for errors while weights are loaded.

    The loading report of transformers is suppressed, because it says "newly initialized" for keys
    that owl2 rejects.
    """
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    except (*UNREADABLE, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "PytorchStreamReader" not in str(error):
            raise  # only this one is torch's message for a corrupt .bin
        # torch's message about pickles recommends weights_only=False.
        is_pickle = isinstance(error, pickle.UnpicklingError)
        reason = "a weight file is corrupt or contains code" if is_pickle else str(error)
        raise InputError(
            f"{source} cannot be loaded as a checkpoint: {reason}", ErrorCode.UNREADABLE_FILE
        ) from error
    finally:
        logging.set_verbosity(verbosity)


def check_keys(
    source: str | Path,
    missing: Iterable[str] = (),
    unexpected: Iterable[str] = (),
    shapes: Shapes | None = None,
    hint: str = "",
) -> None:
    """Raise an InputError that lists the keys that do not fit, if there are any.

    Args:
        source: The checkpoint or file, for the message.
        shapes: By key, the shape in the file and the shape in the model, which must be equal.
        hint: Appended to the message.
    """
    mismatched = [
        f"{key}: {tuple(stored)} in the file, {tuple(own)} in the model"
        for key, (stored, own) in (shapes or {}).items()
        if tuple(stored) != tuple(own)
    ]
    kinds = (
        ("missing", sorted(missing), ErrorCode.MISSING_WEIGHTS),
        ("unexpected", sorted(unexpected), ErrorCode.UNEXPECTED_WEIGHTS),
        ("of another shape", sorted(mismatched), ErrorCode.SHAPE_MISMATCH),
    )
    problems = [(f"{len(keys)} {kind}", keys, code) for kind, keys, code in kinds if keys]
    if problems:
        lists = "\n".join(listing(title, keys) for title, keys, _ in problems)
        raise InputError(f"{source} does not fit the model. Keys\n{lists}{hint}", problems[0][2])


def check_loading_info(source: str | Path, info: Mapping[str, Any], hint: str = "") -> None:
    """`check_keys` of the ``loading_info`` of transformers' `from_pretrained`."""
    shapes = {released_name(key): (stored, own) for key, stored, own in info["mismatched_keys"]}
    missing = map(released_name, info["missing_keys"])
    check_keys(source, missing, map(released_name, info["unexpected_keys"]), shapes, hint)


def listing(title: str, lines: list[str]) -> str:
    """A title and the first lines, indented."""
    shown = lines[:MAX_LINES]
    if len(lines) > MAX_LINES:
        shown.append(f"... and {len(lines) - MAX_LINES} more")
    return "\n".join([f"  {title}:", *(f"    {line}" for line in shown)])
