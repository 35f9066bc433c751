"""Image-text pairs as img2dataset writes them: numbered tar files with statistics beside each.

::

    00000.tar  00000_stats.json  00000.parquet  00001.tar ...

They are trained on where they lie (`data.shards`); here they are only looked at. img2dataset writes
the statistics last, so a shard without them is not finished.
"""

import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from owl2.errors import InputError
from owl2.json_records import JsonRecord, SkippedRows, json_object

_NUMBERED = re.compile(r"(\d+)\.tar")
_END = bytes(1024)  # two empty blocks: the end of an archive
_IMAGES = (".jpg", ".png", ".webp")


@dataclass(frozen=True)
class Shard:
    """A finished shard: its file, and how many pairs its statistics tell of."""

    path: Path
    pairs: int


def shards(source: Path, *, read: bool = False) -> Iterator[Shard | SkippedRows]:
    """The finished shards of a folder, in the order of their numbers.

    A shard is finished when its statistics are there and the archive has its end. With `read` every
    archive is also gone through, and its images are counted against the statistics.

    Raises:
        InputError: no folder, no shard in it, statistics of another form, or another count.
    """
    if not source.is_dir():
        raise InputError(f"{source} is not a folder; give the one with img2dataset's shards.")
    paths = sorted(path for path in source.iterdir() if _NUMBERED.fullmatch(path.name))
    if not paths:
        raise InputError(f"{source} has no shards, such as 00000.tar.")
    for path in paths:
        statistics = path.with_name(f"{path.stem}_stats.json")
        if not statistics.is_file():
            yield SkippedRows("shards without statistics, so not finished")
        elif not _has_end(path):
            yield SkippedRows("shards cut short")
        elif not (pairs := _pairs(json_object(statistics))):
            yield SkippedRows("shards without a pair")
        else:
            if read:
                _count(path, pairs)
            yield Shard(path, pairs)


def _pairs(statistics: JsonRecord) -> int:
    # `count` is what was asked for; what could not be fetched or decoded is not in the shard.
    return statistics.integer("successes")


def _has_end(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            if size < len(_END) or size % 512:
                return False
            file.seek(-len(_END), os.SEEK_END)
            return file.read() == _END
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from error


def _count(path: Path, pairs: int) -> None:
    try:
        with tarfile.open(path, "r:") as archive:
            images = sum(member.name.endswith(_IMAGES) for member in archive)
    except (OSError, tarfile.TarError) as error:
        raise InputError(f"{path} is not a tar file that can be read: {error}") from error
    if images != pairs:
        raise InputError(
            f"{path} has {images} images, and its statistics tell of {pairs}; make it anew."
        )


def ranges(paths: Sequence[Path]) -> list[str]:
    """Paths of numbered files as few patterns: "DIR/{00000..00042}.tar", "DIR/00044.tar"."""
    found: list[list[Path]] = []
    for path in paths:
        if found and _follows(found[-1][-1], path):
            found[-1].append(path)
        else:
            found.append([path])
    return [_pattern(run[0], run[-1]) for run in found]


def _follows(before: Path, path: Path) -> bool:
    same_form = before.parent == path.parent and len(before.name) == len(path.name)
    return same_form and int(path.stem) == int(before.stem) + 1


def _pattern(first: Path, last: Path) -> str:
    if first == last:
        return str(first)
    return str(first.with_name(f"{{{first.stem}..{last.stem}}}{first.suffix}"))
