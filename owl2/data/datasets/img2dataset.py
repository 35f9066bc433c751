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
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from owl2.data.sample import SkippedRows
from owl2.errors import ErrorCode, InputError
from owl2.json_records import json_object, readable

_TAR_END = bytes(1024)  # an archive ends with two empty blocks
_IMAGE_SUFFIXES = (".jpg", ".png", ".webp")


class Shard(NamedTuple):
    """A complete shard and its number of image-text pairs."""

    path: Path
    pairs: int


def shards(directory: Path, *, read: bool = False) -> Iterator[Shard | SkippedRows]:
    """The complete shards of a directory, in numerical order.

    A shard is complete if its statistics exist and the archive has its end.

    Args:
        read: Also read every archive and compare its number of images with the statistics.

    Raises:
        InputError: No shard in the directory, statistics of another format, or a different number
            of images.
    """
    paths = sorted(path for path in directory.iterdir() if re.fullmatch(r"\d+\.tar", path.name))
    if not paths:
        raise InputError(f"{directory} has no shards such as 00000.tar", ErrorCode.EMPTY_DATASET)
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
        file.seek(max(0, size - len(_TAR_END)))
        return size % tarfile.BLOCKSIZE == 0 and file.read() == _TAR_END


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
    # Consecutive files with names of the same length have the same key.
    groups = groupby(enumerate(paths), lambda e: (len(e[1].name), int(e[1].stem) - e[0]))
    patterns = []
    for _, group in groups:
        run = [path for _, path in group]
        span = f"{{{run[0].stem}..{run[-1].stem}}}" if len(run) > 1 else run[0].stem
        patterns.append(str(run[0].with_name(f"{span}.tar")))
    return patterns
