"""Writes files and directories atomically, expands and checks paths before work begins.

Content is written into a hidden temporary directory next to its target and then renamed. Readers
never see an incomplete file, also if the writer is killed. A file, or a directory that did not
exist, appears in one step. Replacing a directory takes two renames. The target is missing between
them. If the process is killed at that moment, the old directory is ``.NAME.previous`` until
`restore_directory` or the next `atomic_directory` renames it back.
"""

import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from safetensors import SafetensorError

from owl2.errors import ErrorCode, InputError


@contextmanager
def atomic_directory(target: str | Path) -> Iterator[Path]:
    """Yield an empty directory that becomes ``target`` when the block ends without an exception.

    On an exception (including Ctrl-C) the new directory is removed and an existing ``target`` is
    unchanged.

    Raises:
        InputError: ``target`` exists and is not a directory, or cannot be written.
    """
    target = Path(target)
    with _temporary_directory(target, "directory", target.exists() and not target.is_dir()) as part:
        _remove_abandoned(target)
        restore_directory(target)
        new = part / target.name
        new.mkdir()
        yield new
        try:
            if target.exists():  # a rename cannot replace a directory that is not empty
                target.rename(_previous(target))
            new.rename(target)
        finally:
            restore_directory(target)


def restore_directory(target: str | Path) -> None:
    """Restore a directory whose replacement was interrupted, or remove its old version."""
    previous = _previous(Path(target))
    if previous.exists():
        if Path(target).exists():
            shutil.rmtree(previous)
        else:
            previous.rename(target)


def _previous(target: Path) -> Path:
    return target.with_name(f".{target.name}.previous")


@contextmanager
def atomic_file(path: str | Path) -> Iterator[TextIO]:
    """Yield a text file (UTF-8) that becomes ``path`` when the block ends without an exception.

    On an exception (including Ctrl-C) the new file is removed and an existing one is unchanged.

    Raises:
        InputError: ``path`` is a directory, or cannot be written.
    """
    path = Path(path)
    with _temporary_directory(path, "file", path.is_dir()) as part:
        with (part / path.name).open("w", encoding="utf-8") as file:
            yield file
        (part / path.name).replace(path)


def atomic_write_text(path: str | Path, text: str) -> None:
    """Write ``text`` (UTF-8) to ``path`` and replace an existing file in one step.

    Raises:
        InputError: ``path`` is a directory, or cannot be written.
    """
    with atomic_file(path) as file:
        file.write(text)


def atomic_write_json(path: str | Path, value: Any, indent: int | None = 2) -> None:
    """`atomic_write_text` of a value as JSON."""
    atomic_write_text(path, json.dumps(value, indent=indent) + "\n")


@contextmanager
def exclusive_directory(directory: Path) -> Iterator[None]:
    """Keep other processes from using an output directory, by a lock on its file ``.lock``.

    The lock ends with the process. Its children do not inherit it.

    Raises:
        InputError: Another process uses the directory, or it cannot be written.
    """
    path = directory / ".lock"
    with translate_write_errors(path):
        directory.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
    with file:
        if sys.platform != "win32":
            import fcntl

            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError) as error:
                raise InputError(
                    f"another process writes to {directory}: wait for its end, or give another "
                    "output",
                    ErrorCode.CONFLICT,
                ) from error
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def apply_umask(files: Iterable[Path]) -> None:
    """Give files the permissions of new files; safetensors lets only the owner read its files."""
    umask = os.umask(0)
    os.umask(umask)
    for file in files:
        file.chmod(0o666 & ~umask)


def require_writable(target: str | Path) -> None:
    """Check before hours of work that ``target`` can be written. Creates nothing.

    Raises:
        InputError: The nearest existing parent directory of ``target`` is not writable.
    """
    target = Path(target).absolute()
    with translate_write_errors(target):
        parent = next(path for path in target.parents if path.exists())
        # By trying: permission bits do not cover read-only and virtual file systems.
        with tempfile.TemporaryDirectory(prefix=".owl2-", dir=parent):
            pass


def require_new(target: str | Path) -> None:
    """Check before hours of work that ``target`` does not exist and can be written.

    Raises:
        InputError: It exists, or its nearest existing parent directory is not writable.
    """
    if Path(target).exists():
        raise InputError(f"{target} exists; choose another output", ErrorCode.FILE_EXISTS)
    require_writable(target)


def expand_user(path: str | Path) -> Path:
    """The path with ``~`` replaced by the home directory."""
    return Path(os.path.expanduser(path))


@contextmanager
def _temporary_directory(target: Path, kind: str, is_other: bool) -> Iterator[Path]:
    """A directory next to `target`, on the same file system, that is removed in the end."""
    if is_other:
        raise InputError(
            f"{target} exists and is not a {kind}; move it, or choose another output",
            ErrorCode.FILE_EXISTS,
        )
    with translate_write_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        prefix = _part_prefix(target)
        with (
            tempfile.TemporaryDirectory(prefix=prefix, dir=target.parent) as part,
            _lock(Path(part)),
        ):
            yield Path(part)


def _part_prefix(target: Path) -> str:
    return f".{target.name}.part-"


def _remove_abandoned(target: Path) -> None:
    """Remove temporary directories of `target` whose process was killed."""
    name = re.compile(re.escape(_part_prefix(target)) + "[a-z0-9_]{8}")  # as `tempfile` names them
    for part in target.parent.iterdir():
        with suppress(OSError):  # it has just been removed
            # A new directory may not be locked yet.
            if name.fullmatch(part.name) and time.time() - part.stat().st_mtime > 60:
                with _lock(part) as is_mine:
                    if is_mine:
                        shutil.rmtree(part)


@contextmanager
def _lock(directory: Path) -> Iterator[bool]:
    """Lock a directory until the end of the block or of the process.

    Yields:
        False if it is locked, or if the file system has no locks.
    """
    if sys.platform == "win32":
        yield False
        return
    import fcntl

    descriptor = os.open(directory, os.O_RDONLY)
    try:
        is_mine = True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            is_mine = False
        yield is_mine
    finally:
        os.close(descriptor)


@contextmanager
def translate_write_errors(target: Path) -> Iterator[None]:
    """Raise an InputError about `target`, not about its temporary name, for an OSError.

    safetensors has an exception of its own for a full disk.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        if isinstance(error, FileExistsError):  # of `mkdir`, where a parent is a file
            reason = "Not a directory"
        raise InputError(f"{target} cannot be written: {reason}", ErrorCode.WRITE_FAILED) from error
