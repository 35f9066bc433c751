"""`InputError`: the one exception for errors that a user can cause and correct."""

import re
import string
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from typing import Any

# Base64, and values that are as unreadable in a message. A path has shorter runs of letters in both
# cases. The lookaheads are bounded, because a text may have millions of characters.
_BASE64 = re.compile(
    r";base64,.|(?=[a-z0-9+=]{0,39}[A-Z])(?=[A-Z0-9+=]{0,39}[a-z])[A-Za-z0-9+=]{40}"
    r"|[A-Za-z0-9+=]{100}"
)
_BASE64_CHARACTERS = string.ascii_letters + string.digits + "+/=-_"


class ErrorCode(StrEnum):
    """The kind of an `InputError`. Programs and tests compare codes; messages are for people."""

    # Options, arguments and settings
    INVALID_VALUE = "invalid_value"  # a value of the right type that is not allowed
    INVALID_TYPE = "invalid_type"  # a value of the wrong type
    MISSING_VALUE = "missing_value"  # a required option, key or argument is absent
    UNKNOWN_NAME = "unknown_name"  # no such task, dataset, option, key, metric, device ...
    CONFLICT = "conflict"  # two settings exclude each other
    UNSUPPORTED = "unsupported"  # the model, device or library cannot do this

    # Files and the network
    FILE_NOT_FOUND = "file_not_found"
    FILE_EXISTS = "file_exists"  # an output that would be overwritten
    FILE_CHANGED = "file_changed"  # a file changed or disappeared while it was in use
    UNREADABLE_FILE = "unreadable_file"  # no permission, truncated or corrupt
    WRITE_FAILED = "write_failed"  # no permission or no space left on the device
    INVALID_FORMAT = "invalid_format"  # the content does not follow the expected format
    NETWORK = "network"  # a URL, hub or server that cannot be reached or refuses

    # Checkpoints
    INVALID_CONFIG = "invalid_config"  # config.json or another settings file of a checkpoint
    MISSING_WEIGHTS = "missing_weights"
    UNEXPECTED_WEIGHTS = "unexpected_weights"
    SHAPE_MISMATCH = "shape_mismatch"
    BASE_MODEL_MISMATCH = "base_model_mismatch"  # an adapter with another base model

    # Images
    MISSING_IMAGE = "missing_image"
    BROKEN_IMAGE = "broken_image"
    IMAGE_TOO_LARGE = "image_too_large"
    IMAGE_COUNT_MISMATCH = "image_count_mismatch"  # placeholders and images differ in number

    # Messages and samples
    INVALID_ROLE = "invalid_role"
    EMPTY_MESSAGE = "empty_message"
    TOO_LONG = "too_long"  # more tokens than the context or `max_length`
    NO_LABELS = "no_labels"  # no token contributes to the loss
    EMPTY_DATASET = "empty_dataset"

    # Runs
    RESUME_MISMATCH = "resume_mismatch"  # the state of an earlier run does not fit this one
    NON_FINITE = "non_finite"  # NaN or infinity in logits, loss or weights
    PROCESS_FAILED = "process_failed"  # another process of the run failed or stopped
    MISSING_DEPENDENCY = "missing_dependency"  # an optional package is not installed
    OUT_OF_MEMORY = "out_of_memory"


class InputError(ValueError):
    """An error that a user can cause and correct.

    The message says what was wrong, where, and what to do about it. The command line prints it
    without a traceback and exits with code 2; a library caller may catch it as a `ValueError`.

    Args:
        message: For people.
        code: For programs. Code that raises an `InputError` from another one passes its code on.
    """

    def __init__(self, message: str, code: ErrorCode) -> None:
        super().__init__(message, code)
        self.message = message
        self.code = code

    def __str__(self) -> str:
        return self.message


@contextmanager
def error_prefix(prefix: str) -> Iterator[None]:
    """Put `prefix` before the messages of the InputErrors in this block."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{prefix}{error}", error.code) from error


def shorten(value: Any, limit: int = 80, convert: Callable[[Any], str] = repr) -> str:
    """A value for an error message: its first `limit` characters, without base64."""
    text = convert(value)
    if found := _BASE64.search(text):
        limit = min(limit, len(text[: found.start()].rstrip(_BASE64_CHARACTERS)) + 12)
    return text if len(text) <= limit else f"{text[:limit]}…({len(text)} characters)"


def _is_distribution(name: str) -> bool:
    """Whether pip or another installer installed a package of this name."""
    try:
        distribution(name)
    except PackageNotFoundError:
        return False
    return True


def require_package(package: str, purpose: str, extra: str) -> None:
    """Raise an `InputError` if an optional package is not installed.

    Args:
        purpose: What needs it, the subject of the message.
        extra: The extra of this package that installs it.
    """
    spec = find_spec(package)
    # A folder of this name in the current directory is a namespace package; so are some wheels.
    if spec is None or (spec.origin is None and not _is_distribution(package)):
        raise InputError(
            f"{purpose} requires {package}: pip install 'owl2-vlm[{extra}]'",
            ErrorCode.MISSING_DEPENDENCY,
        )
