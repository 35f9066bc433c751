"""Tar files in the format of WebDataset as a stream of samples.

::

    000.tar: 0001.jpg 0001.txt 0001.json 0002.jpg ...     consecutive files with one key: a sample
        │ iter(dataset): in order
        ▼
    shards in a random order per epoch ─► buffers of samples, each shuffled ─► dataset.stream(...)

A sample has images, `KEY.jpg` (.jpeg, .png, .webp) or `KEY.0.jpg`, `KEY.1.jpg`, ..., and one of

- `KEY.txt`: the caption, as in img2dataset's shards. Their `.json` is then ignored.
- `KEY.json` with `caption`, `messages` or `conversations`, see `row_parsers`. Its images are those
  of the sample, in order. Without images it is a text-only conversation.

The package webdataset opens URLs and defines the keys. The archive is read here, because a
truncated shard must be an error: `tarfile`, and webdataset with it, accepts a missing end.
"""

import glob
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import count, groupby, islice
from operator import itemgetter
from pathlib import Path
from random import Random
from subprocess import Popen, TimeoutExpired
from typing import IO, Any, Self, cast

from owl2.data.row_parsers import parse_row
from owl2.data.sample import InvalidSample, Message, Sample
from owl2.errors import ErrorCode, InputError, require_package, shorten
from owl2.json_records import parse_json

_URL = re.compile(r"pipe:|[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_IMAGE = re.compile(r"(?:(\d+)\.)?(?:jpe?g|png|webp)")
TEXTS = ("txt", "json")

# `tarfile` copies the rest of its buffer at each read, which is slow for larger buffers.
_BUFFER = 1 << 16

# The position of a stream, as JSON; see `TarDataset.stream`.
State = dict[str, Any]
# The files of a sample in the order of the archive: lower-case extension and content.
Files = list[tuple[str, bytes]]


def is_shard_url(name: str) -> bool:
    """Whether this names tar files, rather than another kind of dataset."""
    return bool(_URL.match(name)) or name.lower().endswith((".tar", ".tar.gz", ".tgz"))


class TarDataset:
    """The samples of tar files.

    A sample that is not valid becomes an `InvalidSample`. A shard that cannot be opened or is
    truncated raises `InputError` when it is read, because the number of missing samples is unknown.

    Args:
        urls: One or several paths, in which `*`, `?` and `{000..099}` are expanded, or URLs that
            webdataset opens, such as `https://...` and `pipe:COMMAND`, in which only `{...}` is.

    Attributes:
        urls: All shards. The source of a sample is "URL, KEY".

    Raises:
        InputError: A pattern has no match, a path is not a file, or webdataset is not installed.
    """

    def __init__(self, urls: str | Sequence[str]) -> None:
        require_package("webdataset", "A dataset of tar shards", "data")
        patterns = [urls] if isinstance(urls, str) else urls
        self.urls = [url for pattern in patterns for url in _expand(pattern)]
        if not self.urls:
            raise InputError("no shards: pass at least one tar file", ErrorCode.EMPTY_DATASET)

    def __iter__(self) -> Iterator[Sample | InvalidSample]:
        """All samples once, in order."""
        for url in self.urls:
            for key, files in read_shard(url):
                yield to_sample(f"{url}, {key}", files)

    def stream(
        self,
        *,
        seed: int,
        shuffle_buffer: int,
        rank: int = 0,
        world_size: int = 1,
        state: State | None = None,
    ) -> Iterator[tuple[Sample | InvalidSample, State]]:
        """Endless samples, epoch after epoch, each with the state after it.

        The order depends on `seed` only. The order of the shards is random in each epoch, and
        consecutive samples are shuffled in buffers of `shuffle_buffer`, which are held in memory.

        Each process reads its share, and together they read every sample once per epoch: whole
        shards in turn, or, with fewer shards than processes, every `world_size`-th sample.

        Args:
            state: Resumes after the sample that it was returned with. At most one shard is read up
                to the start of the buffer.

        Raises:
            InputError: `state` belongs to other arguments or shards, or no shard has a sample.
        """
        arguments = {
            "seed": seed,
            "shuffle_buffer": shuffle_buffer,
            "rank": rank,
            "world_size": world_size,
            "shards": len(self.urls),
        }
        if state is not None and state["arguments"] != arguments:
            raise InputError(
                f"the position in the shards was saved with {state['arguments']}, but the stream "
                f"has {arguments}",
                ErrorCode.RESUME_MISMATCH,
            )
        return self._stream(arguments, state or {"epoch": 0, "shard": 0, "row": 0, "used": 0})

    def _stream(
        self, arguments: dict[str, int], start: State
    ) -> Iterator[tuple[Sample | InvalidSample, State]]:
        # While a buffer is used, the next one is read sample by sample. So there is no pause
        # between buffers, and at most one buffer is in memory.
        ready: list[tuple[Sample | InvalidSample, State]] = []  # in reverse order
        buffer: list[Sample | InvalidSample] = []
        first: dict[str, int] = {}  # the position of its first sample
        used = start["used"]
        for position, sample in self._read(arguments, start):
            is_full = len(buffer) == arguments["shuffle_buffer"]
            if buffer and (is_full or position["epoch"] != first["epoch"]):
                while ready:
                    yield ready.pop()
                Random(f"{arguments['seed']}/{first}").shuffle(buffer)
                numbers = range(len(buffer), used, -1)
                states = (first | {"used": n, "arguments": arguments} for n in numbers)
                ready = list(zip(buffer[: len(numbers)], states, strict=True))
                buffer, used = [], 0
            if not buffer:
                first = position
            buffer.append(sample)
            if ready:
                yield ready.pop()

    def _read(
        self, arguments: dict[str, int], start: State
    ) -> Iterator[tuple[dict[str, int], Sample | InvalidSample]]:
        """The samples of a process in the order of the shards, from a position on.

        The position of a sample is its epoch, its shard in the order of the epoch, and its row in
        the shard, all from 0.
        """
        rank, world_size, size = arguments["rank"], arguments["world_size"], len(self.urls)
        shard, row = start["shard"], start["row"]
        empty: set[str] = set()
        for epoch in count(start["epoch"]):
            urls = Random(f"{arguments['seed']}/{epoch}").sample(self.urls, size)
            for place in range(shard, size):
                # Counted over all epochs, so that the ranks take turns with surplus shards.
                position = epoch * size + place
                if size >= world_size and position % world_size != rank:
                    continue
                url, number = urls[place], row - 1
                for number, (key, files) in enumerate(read_shard(url, row), start=row):
                    if size >= world_size or (position + number) % world_size == rank:
                        where = {"epoch": epoch, "shard": place, "row": number}
                        yield where, to_sample(f"{url}, {key}", files)
                if number < 0:
                    empty.add(url)
                    if empty.issuperset(self.urls):
                        raise InputError(
                            f"the shards have no samples: {', '.join(self.urls[:3])}",
                            ErrorCode.EMPTY_DATASET,
                        )
                row = 0
            shard = row = 0


def _expand(pattern: str) -> list[str]:
    from braceexpand import braceexpand

    try:
        urls = list(braceexpand(os.path.expanduser(pattern)))
    except ValueError as error:
        raise InputError(f"{pattern}: unbalanced braces", ErrorCode.INVALID_VALUE) from error
    paths: list[str] = []
    for url in urls:
        if _URL.match(url) or Path(url).is_file():
            paths.append(url)
        elif found := sorted(p for p in glob.glob(url, recursive=True) if Path(p).is_file()):
            paths += found
        else:
            raise InputError(f"{url}: no such file", ErrorCode.FILE_NOT_FOUND)
    return paths


# ------------------------------------------------------------------ files of a sample


def to_sample(source: str, files: Files) -> Sample | InvalidSample:
    """The sample of its files, see `read_shard`."""
    try:
        contents = dict(files)
        if len(contents) < len(files):
            raise InputError("two files of the sample have the same name", ErrorCode.CONFLICT)
        extensions = sorted((ext for ext in contents if ext not in TEXTS), key=_image_order)
        if "txt" in contents:
            row: Any = {"caption": contents["txt"].decode("utf-8-sig")}
        elif "json" in contents:
            row = parse_json(contents["json"], "its .json")
            if isinstance(row, dict) and "sha256" in row and row.get("caption") is None:
                raise InputError(
                    "img2dataset wrote the sample without a caption: run it with --caption_col",
                    ErrorCode.EMPTY_MESSAGE,
                )
        else:
            raise InputError(
                "the sample has no .txt or .json. (The files of a sample must be consecutive; "
                "tar's --sort=name does that.)",
                ErrorCode.INVALID_FORMAT,
            )
        return parse_row(row, source, _read_image, [contents[ext] for ext in extensions])
    except UnicodeDecodeError as error:
        return InvalidSample(source, f"its .txt is not UTF-8: {error}")
    except InputError as error:
        return InvalidSample.from_error(source, error)


def _image_order(extension: str) -> tuple[int, str]:
    match = _IMAGE.fullmatch(extension)
    return int(match[1] or -1) if match else -1, extension


def _read_image(value: Any) -> Message:
    if isinstance(value, bytes):
        return {"type": "image", "image": value}
    raise InputError(
        f"the .json names the image {shorten(value)}, but the images of a shard are files next to "
        'it, KEY.jpg or KEY.0.jpg, KEY.1.jpg, ...; in messages their parts are {"type": "image"}',
        ErrorCode.MISSING_IMAGE,
    )


# ------------------------------------------------------------------ tar files


def read_shard(url: str, skip: int = 0) -> Iterator[tuple[str, Files]]:
    """The keys of a tar file, from number `skip` on, with their images and texts.

    The key is the path up to the first dot of the file name; the rest is the extension.
    Directories, files without an extension and `__NAME__` are ignored.

    Args:
        url: A path, or a URL that webdataset opens, such as `http://...` or `pipe:COMMAND`.

    Raises:
        InputError: The file cannot be opened, or is damaged or truncated. The samples before the
            error are complete.
    """
    from webdataset.gopen import gopen

    try:
        stream = gopen(url)
    except (OSError, ValueError) as error:
        raise InputError(f"{url} cannot be opened: {error}", ErrorCode.FILE_NOT_FOUND) from error
    process: Popen[bytes] | None = getattr(stream, "proc", None)  # a command, such as curl
    try:
        with tarfile.open(fileobj=stream, mode="r|*", bufsize=_BUFFER, tarinfo=_Header) as archive:
            for key, members in islice(groupby(_members(archive), itemgetter(0)), skip, None):
                yield (
                    key,
                    [
                        (extension, cast(IO[bytes], archive.extractfile(header)).read())
                        for _, extension, header in members
                        if extension in TEXTS or _IMAGE.fullmatch(extension)
                    ],
                )
        while stream.read(_BUFFER):
            pass  # a command whose output is not read to the end fails when its pipe is closed
        stream.close()
    except (tarfile.TarError, OSError, EOFError) as error:
        raise InputError(
            f"{url} cannot be read completely: {_failure(process) or error}",
            ErrorCode.UNREADABLE_FILE,
        ) from error
    finally:
        if process is not None:
            process.terminate()  # closing would wait for it
        # A stopped command, or one whose failure was reported, raises when it is closed.
        with suppress(OSError):
            stream.close()


class _Header(tarfile.TarInfo):
    """A header that must be complete, unless it is the empty one at the end of an archive."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if len(buf) == tarfile.BLOCKSIZE and not any(buf):
                raise
            raise tarfile.ReadError(f"it is truncated or damaged ({error})") from error


def _members(archive: tarfile.TarFile) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    """(key, lower-case extension, header) of the files of samples."""
    from webdataset.tariterators import base_plus_ext

    for header in archive:
        archive.members.clear()  # type: ignore[attr-defined]  # not in typeshed; it would grow
        key, extension = base_plus_ext(header.name)
        if header.isreg() and key is not None and not header.name.startswith("__"):
            yield key, extension.lower(), header


def _failure(process: "Popen[bytes] | None") -> str:
    """The exit code of a command that failed; "" for others."""
    try:
        code = process.wait(timeout=1) if process is not None else 0
    except TimeoutExpired:  # the command still runs, so its output is not valid
        code = 0
    if process is None or not code:
        return ""
    # Not the full command, which may contain a token.
    name = process.args[0] if isinstance(process.args, list) else "the command"
    return f"{name!s} failed with exit code {code}"
