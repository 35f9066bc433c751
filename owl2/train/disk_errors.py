"""Errors of a full disk as `InputError`s."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException

from owl2.errors import ErrorCode, InputError

DISK_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
# Parts of the messages of safetensors and torch.save for a full disk.
WRITE_MESSAGES = ("I/O error", "inline_container", "iostream", "PytorchStreamWriter")


@contextmanager
def translate_disk_errors(target: Path) -> Iterator[None]:
    """Raise what torch, safetensors and the file system raise on a full disk as an InputError.

    Raises:
        InputError: Names `target` and the free space. Other errors are not changed.
    """
    try:
        yield
    except InputError:
        raise
    except (OSError, SafetensorError, CheckpointException, RuntimeError) as error:
        reason = _disk_reason(error)
        if reason is None:
            raise
        existing = next(path for path in (target, *target.absolute().parents) if path.exists())
        free = shutil.disk_usage(existing).free / 1e9
        raise InputError(
            f"{target} cannot be written: {reason}; {free:.2f} GB are free on that disk. Free some "
            "space and run the same command: it resumes from the last complete checkpoint",
            ErrorCode.WRITE_FAILED,
        ) from error


def _disk_reason(error: BaseException) -> str | None:
    """Why the disk refused; None for an error that is not about the disk."""
    if isinstance(error, CheckpointException):
        reasons = (_disk_reason(cause[0]) for cause in error.failures.values())
        return next(filter(None, reasons), None)
    if isinstance(error, OSError):
        return (error.strerror or str(error)) if error.errno in DISK_ERRNOS else None
    return str(error) if any(part in str(error) for part in WRITE_MESSAGES) else None
