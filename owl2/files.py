"""Writes files and directories atomically, and checks paths before work begins.

Content is written under a hidden temporary name next to its target and then renamed. Readers never
see an incomplete file, also if the writer is killed. A file, or a directory that did not exist,
appears in one step. Replacing a directory takes two renames. The target is missing between them; if
the process is killed at that moment, the old directory remains in ``.NAME.old-XXXX/`` and the new
one in ``.NAME.part-XXXX``.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from owl2.errors import ErrorCode, InputError


@contextmanager
def atomic_directory(target: str | Path) -> Iterator[Path]:
    """Yield an empty directory that becomes ``target`` when the block ends without an exception.

    On an exception (including Ctrl-C) the new directory is removed and an existing ``target`` is
    unchanged. The temporary directory is a sibling of the target, on the same file system, so that
    the rename is one step.

    Raises:
        InputError: ``target`` exists and is not a directory, or cannot be written.
    """
    target = Path(target)
    if target.exists() and not target.is_dir():
        raise InputError(
            f"{target} is a file, but the output is a directory; move the file",
            ErrorCode.FILE_EXISTS,
        )
    with translate_write_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{target.name}.part-", dir=target.parent))
        try:
            part.chmod(0o777 & ~_umask())  # mkdtemp allows only the owner; checkpoints are shared
            yield part
            _rename_over(part, target)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise


@contextmanager
def atomic_file(path: str | Path) -> Iterator[TextIO]:
    """Yield a text file (UTF-8) that becomes ``path`` when the block ends without an exception.

    On an exception (including Ctrl-C) the new file is removed and an existing one is unchanged.

    Raises:
        InputError: ``path`` is a directory, or cannot be written.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(
            f"{path} is a directory, but the output is a file; move the directory",
            ErrorCode.FILE_EXISTS,
        )
    with translate_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.part-", dir=path.parent)
        part = Path(name)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                yield file
            part.chmod(0o666 & ~_umask())
            part.replace(path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise


def atomic_write_text(path: str | Path, text: str) -> None:
    """Write ``text`` (UTF-8) to ``path`` and replace an existing file in one step.

    Raises:
        InputError: ``path`` is a directory, or cannot be written.
    """
    with atomic_file(path) as file:
        file.write(text)


@contextmanager
def translate_write_errors(target: Path) -> Iterator[None]:
    """Raise an InputError about `target`, not about its temporary name, for an OSError."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{target} cannot be written: {error.strerror or error}", ErrorCode.WRITE_FAILED
        ) from error


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


def require_checkpoint(name: str, kind: str) -> None:
    """Check that a name is an existing directory or can be a hub id (``owner/name``).

    Args:
        kind: What is loaded, for the message: "a model", "a processor".

    Raises:
        InputError: The name is a path to a missing directory.
    """
    if Path(name).is_dir():
        return
    owner = name.split("/")[0]
    hint = ""
    if not name.startswith((".", "/", "~")) and name.count("/") == 1:
        if not Path(owner).is_dir():
            return
        hint = f" To load it from the hub, run from a directory without '{owner}'."
    raise InputError(
        f"There is no directory '{name}' to load {kind} from. Check the path.{hint}",
        ErrorCode.FILE_NOT_FOUND,
    )


def _rename_over(part: Path, target: Path) -> None:
    if not target.exists():
        part.rename(target)
        return
    # A non-empty directory cannot be replaced by a rename. The old one is moved first, and restored
    # if the new one cannot be renamed.
    backup = Path(tempfile.mkdtemp(prefix=f".{target.name}.old-", dir=target.parent))
    old = target.rename(backup / target.name)
    try:
        part.rename(target)
    except BaseException:
        old.rename(target)
        backup.rmdir()
        raise
    shutil.rmtree(backup)


def _umask() -> int:
    # It can only be read by setting it.
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
