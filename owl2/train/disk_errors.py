"""Errors of a full disk as `InputError`s, and files that are flushed to the disk."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException

from owl2.errors import ErrorCode, InputError

DISK_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
# Parts of torch.save's message for a full disk, which does not name the reason.
TORCH_WRITERS = ("inline_container", "iostream", "PytorchStreamWriter")


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
    match error:
        case OSError():
            is_disk = error.errno in DISK_ERRNOS
            return (error.strerror or str(error)) if is_disk else None
        case SafetensorError():
            return str(error) if "I/O error" in str(error) else None
        case CheckpointException():
            reasons = (_disk_reason(cause[0]) for cause in error.failures.values())
            return next((reason for reason in reasons if reason is not None), None)
    is_disk = any(name in str(error) for name in TORCH_WRITERS)
    return "a file is incomplete" if is_disk else None


def flush_directory(directory: Path) -> dict[str, int]:
    """Flush all files of a directory to the disk; their sizes in bytes by relative path.

    Written files survive a killed process; only flushed files survive a power failure.
    """
    sizes = {}
    for path in (*sorted(directory.rglob("*")), directory):
        if path.is_file() or path.is_dir():
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        if path.is_file():
            sizes[path.relative_to(directory).as_posix()] = path.stat().st_size
    return sizes
