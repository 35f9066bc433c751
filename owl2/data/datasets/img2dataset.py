"""Image-text pairs in the format of img2dataset: numbered tar files with statistics.

::

    00000.tar  00000_stats.json  00000.parquet  00001.tar ...

Training reads them in place (`shards` in a recipe); they are only checked here. img2dataset writes
the statistics last, so a shard without them is not complete. Images without a caption
are not counted: img2dataset writes no .txt without `--caption_col`, and an empty one for a missing
caption.
"""

import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from owl2.data.sample import Sample, SkippedRows
from owl2.data.webdataset import TEXTS, read_shard, to_sample
from owl2.errors import ErrorCode, InputError
from owl2.json_records import json_object, readable

_TAR_END = bytes(1024)  # an archive ends with two empty blocks


class Shard(NamedTuple):
    """A complete shard and its number of image-text pairs."""

    path: Path
    pairs: int


def shards(directory: Path, *, read: bool = False) -> Iterator[Shard | SkippedRows]:
    """The complete shards of a directory, in numerical order.

    A shard is complete if its statistics exist and the archive has its end.

    Args:
        read: Also read every archive, compare its number of images with the statistics, and count
            the images that have a caption. Otherwise a shard is read up to the first caption.

    Raises:
        InputError: No shard in the directory, statistics of another format, or a different number
            of images.
    """
    paths = sorted(path for path in directory.iterdir() if re.fullmatch(r"\d+\.tar", path.name))
    if not paths:
        raise InputError(
            f"{directory} has no shards such as 00000.tar{_other_format(directory)}",
            ErrorCode.EMPTY_DATASET,
        )
    for path in paths:
        statistics = path.with_name(f"{path.stem}_stats.json")
        if not statistics.is_file():
            yield SkippedRows("shards without statistics")
        elif not _has_end(path):
            yield SkippedRows("truncated shards")
        # `count` is the number of requested images, of which some could not be downloaded.
        elif not (images := json_object(statistics).integer("successes")):
            yield SkippedRows("shards without a pair")
        else:
            has_caption = list(_captions(path)) if read else [any(_captions(path))] * images
            if len(has_caption) != images:
                raise InputError(
                    f"{path} has {len(has_caption)} images, but its statistics count {images}; "
                    "create it again",
                    ErrorCode.IMAGE_COUNT_MISMATCH,
                )
            if without := has_caption.count(False):
                yield SkippedRows("images without a caption", without)
            if without < images:
                yield Shard(path, images - without)
            else:
                yield SkippedRows("shards without captions")


def _other_format(directory: Path) -> str:
    """Explains the output of img2dataset in another format than webdataset."""
    names = {path.name for path in directory.iterdir()}
    stems = {name.removesuffix("_stats.json") for name in names if name.endswith("_stats.json")}
    for suffix, name, advice in (
        ("", "files", "pack each directory: tar --sort=name -cf 00000.tar -C 00000 ."),
        (".parquet", "parquet", "download again with --output_format webdataset"),
        (".tfrecord", "tfrecord", "download again with --output_format webdataset"),
    ):
        if any(f"{stem}{suffix}" in names for stem in stems):
            return f". It is img2dataset's output in the format {name!r}; {advice}"
    return ""


def _has_end(path: Path) -> bool:
    with readable(path), path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - len(_TAR_END)))
        return size % tarfile.BLOCKSIZE == 0 and file.read() == _TAR_END


def _captions(path: Path) -> Iterator[bool]:
    """Whether training uses each image of an archive: it has a caption that is not empty."""
    for key, files in read_shard(str(path)):
        if any(extension not in TEXTS for extension, _ in files):
            yield isinstance(to_sample(key, files), Sample)


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
