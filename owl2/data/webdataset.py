"""Tar files of images and texts (WebDataset's shards) as a stream of Samples.

::

    000.tar: 0001.jpg 0001.txt 0001.json 0002.jpg ...     files with one key are one sample
        │ in order: iter(shards), for looking at all of it
        ▼
    shards in an order drawn for the epoch ─► windows of samples, each shuffled ─► stream(...)

A sample has images, `KEY.jpg` (.jpeg, .png, .webp) or `KEY.0.jpg`, `KEY.1.jpg`, ..., and one of

- `KEY.txt`: the caption. So do img2dataset's shards; their `.json` then says nothing more.
- `KEY.json` with `caption`, `messages` or `conversations`: see `readers`; images in it are those
  of the sample, in order. Without images it is a text-only conversation.

Only one window is held at a time, whatever the size of the data.
"""

import glob
import json
import re
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from owl2.data.row_parsers import parse_row
from owl2.data.sample import InvalidSample, Message, Sample
from owl2.data.tar_stream import Files, read_shard, require_webdataset
from owl2.errors import ErrorCode, InputError

_URL = re.compile(r"pipe:|[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_IMAGE = re.compile(r"(?:(\d+)\.)?(?:jpe?g|png|webp)")

_KINDS = ("txt", "json")

# Where a stream stands, for JSON; see `TarDataset.stream`.
State = dict[str, Any]


def is_shard_url(name: str) -> bool:
    """Whether this names tar files, rather than another source of samples."""
    return bool(_URL.match(name)) or name.lower().endswith((".tar", ".tar.gz", ".tgz"))


class _Entry(NamedTuple):
    """A sample, the place of its shard in the epoch's order, and its row there, from 0."""

    epoch: int
    shard: int
    row: int
    sample: Sample | InvalidSample


class TarDataset:
    """The Samples of tar files.

    `urls`: paths, in which `*`, `?` and `{000..099}` are expanded, and urls that webdataset opens,
    such as `https://...` and `pipe:COMMAND`, in which only `{...}` is. One or several. Afterwards
    `urls` is the list of all; sources of samples are named "URL, KEY".

    A sample that is none stands as a `InvalidSample` in its place. A shard that cannot be opened or is cut
    short raises `InputError` when it is read, in a stream up to a window ahead: there is no telling
    what is missing then.

    Raises:
        InputError: a pattern without a match, a path that is no file, or no webdataset.
    """

    def __init__(self, urls: str | Sequence[str]) -> None:
        require_webdataset()
        patterns = [urls] if isinstance(urls, str) else urls
        self.urls = [url for pattern in patterns for url in _expanded(pattern)]
        if not self.urls:
            raise InputError("There is no shard: give at least one tar file.")

    def __iter__(self) -> Iterator[Sample | InvalidSample]:
        """All samples once, in order."""
        for url in self.urls:
            for key, files in read_shard(url, _is_wanted):
                yield _sample(f"{url}, {key}", files)

    def stream(
        self,
        *,
        seed: int,
        shuffle_buffer: int,
        rank: int = 0,
        world_size: int = 1,
        state: State | None = None,
    ) -> Iterator[tuple[Sample | InvalidSample, State]]:
        """Samples without end, epoch after epoch, each with the state after it.

        The order depends on `seed` only. Every epoch draws an order of the shards; the samples that
        follow on each other are shuffled within windows of `window`, which memory has to hold.

        Of `world` processes that of `rank` gets its share, and together they get every sample once
        an epoch: whole shards in turn or, where there are fewer shards than processes, every
        `world`-th sample, for which all read everything.

        `state`: one that came with a sample; goes on with the one after it. It is a small dict that
        JSON can hold. At most one shard is read up to where the window begins.

        Raises:
            InputError: a `state` of another stream, or no sample in all shards.
        """
        if shuffle_buffer < 1 or not 0 <= rank < world_size:
            raise InputError(
                f"No stream has shuffle_buffer {shuffle_buffer}, rank {rank} and world_size {world_size}."
            )
        told = {"seed": seed, "window": shuffle_buffer, "rank": rank, "world": world_size}
        of = told | {"shards": len(self.urls)}
        if state is not None and state["of"] != of:
            raise InputError(
                f"The position in the shards was saved with {_written(state['of'])}; now it is "
                f"{_written(of)}. Go on with the same, or start anew."
            )
        return self._stream(of, state or {"epoch": 0, "shard": 0, "row": 0, "used": 0})

    def _stream(
        self, of: dict[str, int], start: State
    ) -> Iterator[tuple[Sample | InvalidSample, State]]:
        windows = _Windows(self._entries(of, start), of["window"])
        used = start["used"]
        while True:
            window = windows.take()
            here = {"epoch": window[0].epoch, "shard": window[0].shard, "row": window[0].row}
            Random(f"{of['seed']}/{here}").shuffle(window)
            total = len(window)
            del window[total - used :]
            while window:
                sample = window.pop().sample
                yield sample, here | {"used": total - len(window), "of": of}
                windows.grow()
            used = 0

    def _entries(self, of: dict[str, int], start: State) -> Iterator[_Entry]:
        shard, row = start["shard"], start["row"]
        empty: set[str] = set()
        for epoch in count(start["epoch"]):
            yield from self._epoch(epoch, of, shard, row, empty)
            shard = row = 0

    def _epoch(
        self, epoch: int, of: dict[str, int], shard: int, row: int, empty: set[str]
    ) -> Iterator[_Entry]:
        """What a rank gets of an epoch, from a place on; enters into `empty` which shards are."""
        world, rank, size = of["world"], of["rank"], len(self.urls)
        urls = self.urls.copy()
        Random(f"{of['seed']}/{epoch}").shuffle(urls)
        for place in range(shard, size):
            # Counted through all epochs, so that what is left over goes to each rank in turn.
            position = epoch * size + place
            if size >= world and position % world != rank:
                continue
            url, skip = urls[place], row if place == shard else 0
            number = skip - 1
            for number, (key, files) in enumerate(read_shard(url, _is_wanted, skip), start=skip):
                if size >= world or (position + number) % world == rank:
                    yield _Entry(epoch, place, number, _sample(f"{url}, {key}", files))
            if number < 0:
                empty.add(url)
                if empty.issuperset(self.urls):
                    raise InputError(f"There is no sample in {_listed(self.urls)}.")


class _Windows:
    """Neighbours in windows: `size` of them, or what is left of an epoch.

    While one window is used up, the next is read one by one, each in the place of a used one: there
    is no pause between windows, and never more than one in memory.
    """

    def __init__(self, entries: Iterator[_Entry], size: int) -> None:
        self._entries = entries
        self._size = size
        self._coming: list[_Entry] = []
        self._next = next(entries)

    def grow(self) -> bool:
        """Read one more for the window to come; False where it is whole."""
        coming = self._coming
        if len(coming) == self._size or (coming and coming[0].epoch != self._next.epoch):
            return False
        coming.append(self._next)
        self._next = next(self._entries)
        return True

    def take(self) -> list[_Entry]:
        """The next window, in order."""
        while self.grow():
            pass
        window, self._coming = self._coming, []
        return window


def _expanded(pattern: str) -> list[str]:
    from braceexpand import braceexpand

    try:
        urls = list(braceexpand(pattern))
    except ValueError as error:
        raise InputError(f"{pattern}: a brace is open or closed without the other.") from error
    return [path for url in urls for path in ([url] if _URL.match(url) else _paths(url))]


def _paths(pattern: str) -> list[str]:
    if Path(pattern).is_file():
        return [pattern]
    found = sorted(path for path in glob.glob(pattern, recursive=True) if Path(path).is_file())
    if not found:
        raise InputError(f"{pattern}: there is no such file to read samples from.")
    return found


def _listed(urls: Sequence[str]) -> str:
    return ", ".join(urls[:3]) + (f" and {len(urls) - 3} more" if len(urls) > 3 else "")


def _written(of: dict[str, int]) -> str:
    return ", ".join(f"{key} {value}" for key, value in of.items())


# ------------------------------------------------------------------ files → Sample


def _is_wanted(extension: str) -> bool:
    return extension in _KINDS or _IMAGE.fullmatch(extension) is not None


def _sample(source: str, files: Files) -> Sample | InvalidSample:
    try:
        return _read(source, files)
    except InputError as error:
        return InvalidSample.from_error(source, error)


def _read(source: str, files: Files) -> Sample:
    contents = dict(files)
    if len(contents) < len(files):
        raise InputError("two files of the sample have one name.")
    images = sorted((ext for ext in contents if ext not in _KINDS), key=_image_number)
    given = [contents[ext] for ext in images]
    if "txt" in contents:
        row: Any = {"caption": _text(contents["txt"], "txt")}
    elif "json" in contents:
        row = _parsed(_text(contents["json"], "json"))
    else:
        raise InputError(
            "there is no .txt or .json beside the image. (The files of a sample must follow each "
            "other; tar's --sort=name does that.)"
        )
    return parse_row(row, source, _image, given)


def _image_number(extension: str) -> tuple[int, str]:
    found = _IMAGE.fullmatch(extension)
    assert found is not None  # only such extensions are wanted
    return int(found[1] or -1), extension


def _image(given: Any) -> Message:
    if isinstance(given, bytes):
        return {"type": "image", "image": given}
    raise InputError(
        f"the .json names the image {given!r:.80}, and images of a shard lie beside it, as "
        'KEY.jpg or KEY.0.jpg, KEY.1.jpg, ...; in messages their parts are {"type": "image"}.',
        ErrorCode.MISSING_IMAGE,
    )


def _text(data: bytes, extension: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"its .{extension} is not text in UTF-8: {error}") from error


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"its .json is not JSON: {error}") from error
