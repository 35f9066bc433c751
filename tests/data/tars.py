"""Tar shards for tests: what lies in them is written here, file by file."""

import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path

from PIL import Image

# One name and what the file holds.
File = tuple[str, bytes]


def image(color: str = "red", kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), color).save(file, kind)
    return file.getvalue()


PNG = image()


def write_tar(path: Path, files: Iterable[File], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, content in files:
            header = tarfile.TarInfo(name)
            header.size = len(content)
            archive.addfile(header, io.BytesIO(content))
    return path


def captions(numbers: Iterable[int]) -> list[File]:
    """As img2dataset writes: image, caption, and what else is known."""
    return [
        file
        for number in numbers
        for file in (
            (f"{number:06}.jpg", PNG),
            (f"{number:06}.json", json.dumps({"caption": "not this one", "url": "u"}).encode()),
            (f"{number:06}.txt", f"{number}".encode()),
        )
    ]


def write_shards(directory: Path, sizes: Iterable[int]) -> Path:
    """`000.tar`, ... with so many captions each, which are numbers from 0 on."""
    first = 0
    for shard, size in enumerate(sizes):
        write_tar(directory / f"{shard:03}.tar", captions(range(first, first + size)))
        first += size
    return directory
