"""Tar shards for tests."""

import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path

from PIL import Image

# Name and content.
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
    """Files as img2dataset writes them: image, metadata, caption."""
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
    """`000.tar`, ... with `sizes` captions each, numbered from 0."""
    first = 0
    for shard, size in enumerate(sizes):
        write_tar(directory / f"{shard:03}.tar", captions(range(first, first + size)))
        first += size
    return directory
