"""Files and directories that appear whole or not at all.

Everything is written beside its target under a hidden temporary name and then renamed, so whoever
looks at the target never sees half of it, also when the writer is killed half-way. A file, and a
directory where none was, appear in one step. A directory that replaces another takes two renames:
between them the target is missing, and a kill at that moment leaves the old one beside it, in
``.NAME.old-XXXX/``, and the new one in ``.NAME.part-XXXX``.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from owl2.errors import InputError


@contextmanager
def atomic_directory(target: str | Path) -> Iterator[Path]:
    """Yield an empty directory that becomes ``target`` when the block ends without an exception.

    On an exception (Ctrl-C included) what was written is removed and an older ``target`` stays as
    it was. On success an older directory is replaced. The temporary directory is a sibling of the
    target, named ``.NAME.part-XXXX``: on the same file system, so that the rename is one step.

    Raises:
        InputError: ``target`` exists and is not a directory, or cannot be written: no permission,
            no space, no such place.
    """
    target = Path(target)
    if target.exists() and not target.is_dir():
        raise InputError(
            f"{target} is a file, and a directory is to be written there; move it away"
        )
    _make_parent(target)
    with _said_of(target):
        part = Path(tempfile.mkdtemp(prefix=f".{target.name}.part-", dir=target.parent))
        try:
            part.chmod(0o777 & ~_umask())  # mkdtemp shuts others out; a checkpoint is to be shared
            yield part
            _put_in_place(part, target)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise


@contextmanager
def atomic_file(path: str | Path) -> Iterator[TextIO]:
    """Yield a text file (UTF-8) that becomes ``path`` when the block ends without an exception.

    For what is too long to be held as one text; otherwise as ``atomic_write_text``. On an exception
    (Ctrl-C included) what was written is removed and an older file stays as it was.

    Raises:
        InputError: ``path`` is a directory, or cannot be written.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path} is a directory, and a file is to be written there; move it away")
    _make_parent(path)
    with _said_of(path):
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
    """Write ``text`` (UTF-8) to ``path``, replacing an older file in one step.

    Raises:
        InputError: ``path`` is a directory, or cannot be written.
    """
    with atomic_file(path) as file:
        file.write(text)


def require_writable(target: str | Path) -> None:
    """Refuse a ``target`` that nothing could be written to, before hours of work; leaves nothing.

    Raises:
        InputError: the nearest directory above ``target`` takes no new entry.
    """
    target = Path(target).absolute()
    with _said_of(target):
        above = next(path for path in target.parents if path.exists())
        # Tried, not asked for: permissions say nothing of read-only and of virtual file systems.
        with tempfile.TemporaryDirectory(prefix=".owl2-", dir=above):
            pass


def require_checkpoint(name: str, what: str) -> None:
    """Refuse a name that is no directory and cannot be a hub id (``owner/name``) either.

    ``what`` completes "to load ... from".

    Raises:
        InputError: it is written like a path, or its first part is a directory here.
    """
    if Path(name).is_dir():
        return
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise InputError(f"There is no directory '{name}' to load {what} from. Check the path.")
    folder = name.split("/")[0]
    if Path(folder).is_dir():
        raise InputError(
            f"There is no directory '{name}', though '{folder}' is here. Check the path. (If you "
            "mean the hub's, run this from another directory.)"
        )


def _put_in_place(part: Path, target: Path) -> None:
    if not target.exists():
        part.rename(target)
        return
    # A directory that is not empty cannot be renamed over, so the old one steps aside first and
    # comes back if the new one cannot take its place.
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.old-", dir=target.parent))
    old = target.rename(aside / target.name)
    try:
        part.rename(target)
    except BaseException:
        old.rename(target)
        aside.rmdir()
        raise
    shutil.rmtree(aside)


@contextmanager
def _said_of(target: Path) -> Iterator[None]:
    """What the file system refuses, as an error about `target`, not about its temporary name."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{target} cannot be written: {error.strerror or error}") from error


def _make_parent(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path.parent} cannot be made: {error.strerror}") from error


def _umask() -> int:
    # The only way to read it is to set it.
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
