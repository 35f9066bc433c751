"""Image-text pairs in the format of img2dataset: numbered tar files with statistics.

::

    00000.tar  00000_stats.json  00000.parquet  00001.tar ...

Training reads them in place (`shards` in a recipe); they are only checked here. img2dataset writes
the statistics last, so a shard without them is not complete.
"""

import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from owl2.errors import ErrorCode, InputError
from owl2.json_records import SkippedRows, json_object, readable

_SHARD_NAME = re.compile(r"(\d+)\.tar")
_TAR_END = bytes(1024)  # an archive ends with two empty blocks
_IMAGE_SUFFIXES = (".jpg", ".png", ".webp")


@dataclass(frozen=True)
class Shard:
    """A complete shard and its number of image-text pairs."""

    path: Path
    pairs: int


def shards(source: Path, *, read: bool = False) -> Iterator[Shard | SkippedRows]:
    """The complete shards of a directory, in numerical order.

    A shard is complete if its statistics exist and the archive has its end.

    Args:
        read: Also read every archive and compare its number of images with the statistics.

    Raises:
        InputError: There is no such directory, no shard in it, statistics of another format, or a
            different number of images.
    """
    if not source.is_dir():
        raise InputError(
            f"{source} is not a directory: give the one with img2dataset's shards",
            ErrorCode.FILE_NOT_FOUND,
        )
    paths = sorted(path for path in source.iterdir() if _SHARD_NAME.fullmatch(path.name))
    if not paths:
        raise InputError(f"{source} has no shards such as 00000.tar", ErrorCode.EMPTY_DATASET)
    for path in paths:
        statistics = path.with_name(f"{path.stem}_stats.json")
        if not statistics.is_file():
            yield SkippedRows("shards without statistics")
        elif not _has_end(path):
            yield SkippedRows("truncated shards")
        # `count` is the number of requested images, of which some could not be downloaded.
        elif not (pairs := json_object(statistics).integer("successes")):
            yield SkippedRows("shards without a pair")
        else:
            if read:
                _check_count(path, pairs)
            yield Shard(path, pairs)


def _has_end(path: Path) -> bool:
    with readable(path), path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        if size < len(_TAR_END) or size % 512:
            return False
        file.seek(-len(_TAR_END), os.SEEK_END)
        return file.read() == _TAR_END


def _check_count(path: Path, pairs: int) -> None:
    try:
        with tarfile.open(path, "r:") as archive:
            images = sum(member.name.endswith(_IMAGE_SUFFIXES) for member in archive)
    except (OSError, tarfile.TarError) as error:
        raise InputError(f"{path} cannot be read: {error}", ErrorCode.UNREADABLE_FILE) from error
    if images != pairs:
        raise InputError(
            f"{path} has {images} images, but its statistics count {pairs}; create it again",
            ErrorCode.IMAGE_COUNT_MISMATCH,
        )


def shard_patterns(paths: Sequence[Path]) -> list[str]:
    """Numbered files as few patterns: "DIR/{00000..00042}.tar", "DIR/00044.tar"."""
    runs: list[list[Path]] = []
    for path in paths:
        last = runs[-1][-1] if runs else None
        if (
            last is not None
            and (last.parent, len(last.name)) == (path.parent, len(path.name))
            and int(path.stem) == int(last.stem) + 1
        ):
            runs[-1].append(path)
        else:
            runs.append([path])
    return [
        str(run[0] if len(run) == 1 else run[0].with_name(f"{{{run[0].stem}..{run[-1].stem}}}.tar"))
        for run in runs
    ]
