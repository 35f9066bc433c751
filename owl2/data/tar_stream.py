"""Tar files as streams: which files belong together, and whether the end has been reached.

webdataset opens urls and knows what a key is. The archive is read here, because a shard that was
cut short must be an error: `tarfile` (and webdataset with it) takes a missing end for the end.
"""

import tarfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import groupby
from subprocess import Popen, TimeoutExpired
from typing import Any, Self

from owl2.errors import InputError

# The files of one sample, in the archive's order: extension (lower case, all of it) and content.
Files = list[tuple[str, bytes]]

# `tarfile` copies what is left of its buffer at each read: with more than this, that takes longer
# than reading.
_BUFFER = 1 << 16


def read_shard(
    url: str, wanted: Callable[[str], bool], skip: int = 0
) -> Iterator[tuple[str, Files]]:
    """The keys of a tar file, from the one at `skip` on, with those files that are wanted.

    `url`: a path, or what webdataset opens, such as `http://...` or `pipe:COMMAND`. The key is a
    file's path up to the first dot of its name, the rest is its extension. Files of one key lie
    side by side. Directories and files without an extension are passed over, so are `__NAME__`.

    Raises:
        InputError: it cannot be opened, or is damaged or cut short; no half sample comes before.
    """
    stream = _opened(url)
    try:
        with tarfile.open(fileobj=stream, mode="r|*", bufsize=_BUFFER, tarinfo=_Header) as archive:
            groups = groupby(_members(archive), key=lambda member: member[0])
            for place, (key, members) in enumerate(groups):
                if place >= skip:
                    yield key, [(ext, _content(archive, i)) for _, ext, i in members if wanted(ext)]
        while stream.read(_BUFFER):
            pass  # a command that is not read to its end fails when its pipe is closed
        stream.close()
    except (tarfile.TarError, OSError, EOFError) as error:
        raise InputError(f"{url} cannot be read to its end: {_reason(stream, error)}.") from error
    finally:
        _abandon(stream)


def require_webdataset() -> None:
    """Raises `InputError` where webdataset is not installed."""
    try:
        import webdataset  # noqa: F401 - only whether it is there
    except ImportError as error:
        raise InputError(
            "Tar shards need the package webdataset: pip install 'owl2-vlm[data]'"
        ) from error


class _Header(tarfile.TarInfo):
    """A header that must be whole, unless it is the empty one that ends an archive."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if len(buf) == tarfile.BLOCKSIZE and not any(buf):
                raise
            raise tarfile.ReadError(f"it is cut short or damaged ({error})") from error


def _opened(url: str) -> Any:
    from webdataset.gopen import gopen

    try:
        return gopen(url)
    except (OSError, ValueError) as error:
        raise InputError(f"{url} cannot be opened: {error}.") from error


def _members(archive: tarfile.TarFile) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    """Key, extension and header of each file."""
    from webdataset.tariterators import base_plus_ext

    for header in archive:
        archive.members.clear()  # type: ignore[attr-defined]  # typeshed lacks it; it grows
        key, extension = base_plus_ext(header.name)
        if header.isreg() and key is not None and not header.name.startswith("__"):
            yield key, extension.lower(), header


def _content(archive: tarfile.TarFile, header: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(header)
    assert file is not None  # it is a regular file
    return file.read()


def _reason(stream: Any, error: Exception) -> str:
    """What ended the stream: its command, if that failed, else `error`."""
    process: Popen[bytes] | None = getattr(stream, "proc", None)
    try:
        code = process.wait(timeout=1) if process is not None else 0
    except TimeoutExpired:  # it goes on, so it is what it sends that is wrong
        code = 0
    # Not the whole command: it may hold a token.
    name = (
        process.args[0] if process is not None and isinstance(process.args, list) else "the command"
    )
    return f"{name} ended with exit code {code}" if code else str(error)


def _abandon(stream: Any) -> None:
    process: Popen[bytes] | None = getattr(stream, "proc", None)
    if process is not None:
        process.terminate()  # nothing, where it has ended; else closing would wait for it
    # It complains of a command that was stopped half-way, or whose failure has been reported.
    with suppress(OSError):
        stream.close()
