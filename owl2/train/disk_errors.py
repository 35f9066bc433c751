"""What a run writes to disk: whole, by one process for all, and with errors that say where."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException

from owl2.errors import InputError

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
# What torch.save says when the disk is full; it does not say that.
TORCH_WRITER = ("inline_container", "iostream", "PytorchStreamWriter")


@contextmanager
def writing(target: Path) -> Iterator[None]:
    """What torch, safetensors and the file system say of a full disk is an InputError of `target`.

    Raises:
        InputError: says how much room is left. Other errors pass as they are.
    """
    try:
        yield
    except InputError:
        raise
    except (OSError, SafetensorError, CheckpointException, RuntimeError) as error:
        if not _is_of_the_disk(error):
            raise
        raise InputError(
            f"{target} cannot be written: {_reason(error)}; {_room(target)}. With more room the "
            "same command goes on from the last whole state"
        ) from error


def _is_of_the_disk(error: BaseException) -> bool:
    match error:
        case OSError():
            return error.errno in NO_ROOM
        case SafetensorError():
            return "I/O error" in str(error)
        case CheckpointException():
            return any(_is_of_the_disk(cause[0]) for cause in error.failures.values())
    return any(word in str(error) for word in TORCH_WRITER)


def _reason(error: BaseException) -> str:
    match error:
        case OSError():
            return error.strerror or str(error)
        case SafetensorError():
            return str(error)
    return "not all of a file could be"  # torch does not say why


def _room(target: Path) -> str:
    place = next(path for path in (target, *target.absolute().parents) if path.exists())
    return f"{shutil.disk_usage(place).free / 1e9:.2f} GB are free on that disk"


def sizes_on_disk(directory: Path) -> dict[str, int]:
    """Bytes of every file in a directory, by its path there, after all have reached the disk.

    A kill leaves what was written; a machine that stops leaves only what reached the disk.
    """
    sizes = {}
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            _flush(path)
            sizes[path.relative_to(directory).as_posix()] = path.stat().st_size
        elif path.is_dir():
            _flush(path)
    _flush(directory)
    return sizes


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
