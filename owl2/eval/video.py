"""Frames of a video, evenly spaced, decoded when they are looked at.

A video is a folder with its frames as images (in the order of the numbers in their names), an
animated GIF or WebP (Pillow decodes them), or any other file (the package `av` does).
"""

import os
import re
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from PIL import Image, ImageSequence

from owl2.errors import InputError
from owl2.eval.readers import MissingData

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
ANIMATIONS = (".gif", ".webp")
JPEG_QUALITY = 95  # of a decoded frame on its way to the model

Segment = tuple[float, float]  # seconds from the video's start

_NAME = re.compile(r"(.+), frame (\d+) of (\d+)(?: from (\S+) to (\S+) s)?", re.DOTALL)

_decoding = threading.Lock()


@dataclass(frozen=True)
class Frame(os.PathLike[str]):
    """A frame of a video, as a file that is made when somebody asks for its path.

    So a benchmark's videos can all be named before any of them is decoded. Its video's frames are
    decoded together, once for each process, into a folder that goes when the process ends.

    Attributes:
        number: from 1 to `count`.
        segment: the part of the video that the frames are of; None: all of it.
    """

    video: Path
    number: int
    count: int
    segment: Segment | None = None

    def __fspath__(self) -> str:
        """The image's path. Raises `InputError`: the video cannot be decoded."""
        with _decoding:
            return str(_decoded(self.video, self.count, self.segment)[self.number - 1])

    def __str__(self) -> str:
        part = "" if self.segment is None else " from {} to {} s".format(*self.segment)
        return f"{self.video}, frame {self.number} of {self.count}{part}"


def named(name: str) -> Frame | str:
    """The frame that `str(frame)` named, as in a file of answers; any other name as it is."""
    found = _NAME.fullmatch(name)
    if found is None:
        return name
    video, number, count, start, end = found.groups()
    segment = None if start is None else (float(start), float(end))
    return Frame(Path(video), int(number), int(count), segment)


def frames_of(video: Path, count: int, segment: Segment | None = None) -> Sequence[Path | Frame]:
    """`count` frames of a video: the middles of as many equal parts of it, in order.

    Of a video with fewer frames, some come twice. A folder's frames are taken to be of the segment
    already; one without images gives none.

    Raises:
        MissingData: a file for which the package `av` is needed, and it is not installed.
    """
    if video.is_dir():
        images = sorted(
            (path for path in video.iterdir() if path.suffix.lower() in IMAGES), key=_by_number
        )
        return [images[place] for place in spread(len(images), count)] if images else []
    if video.suffix.lower() not in ANIMATIONS:
        _av(video)
    return [Frame(video, number, count, segment) for number in range(1, count + 1)]


def spread(total: int, count: int) -> list[int]:
    """Places of `count` of `total` things: the middles of `count` equal parts.

    >>> spread(10, 4)
    [1, 3, 6, 8]
    """
    return [(2 * number + 1) * total // (2 * count) for number in range(count)]


def _by_number(path: Path) -> list[tuple[int, str]]:
    """So that frame 2 comes before frame 10."""
    return [
        (int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", path.name)
    ]


def _av(video: Path) -> ModuleType:
    try:
        import av
    except ModuleNotFoundError as error:
        raise MissingData(
            f"{video}: the package av is needed to decode it (pip install av). Without it, give a "
            "folder of the same name, less its ending, with the video's frames as images."
        ) from error
    module: ModuleType = av
    return module


@cache
def _folder() -> "tempfile.TemporaryDirectory[str]":
    return tempfile.TemporaryDirectory(prefix="owl2-frames-")


@cache
def _decoded(video: Path, count: int, segment: Segment | None) -> tuple[Path, ...]:
    try:
        animated = video.suffix.lower() in ANIMATIONS
        frames = (_animation if animated else _film)(video, count, segment)
        folder = Path(tempfile.mkdtemp(dir=_folder().name))
        paths = []
        for number, frame in enumerate(frames, start=1):
            paths.append(folder / f"{number}.jpg")
            frame.convert("RGB").save(paths[-1], quality=JPEG_QUALITY, subsampling=0)
    except Exception as error:  # foreign decoders on files from anywhere: they raise anything
        raise InputError(f"The video {video} cannot be decoded: {error}.") from error
    return tuple(paths)


def _animation(video: Path, count: int, segment: Segment | None) -> list[Image.Image]:
    with Image.open(video) as image:
        times, now = [], 0.0
        for frame in ImageSequence.Iterator(image):
            times.append(now)
            now += frame.info.get("duration", 0) / 1000
        found = []
        for place in _chosen(times, count, segment):
            image.seek(place)
            found.append(image.convert("RGB"))
        return found


def _film(video: Path, count: int, segment: Segment | None) -> list[Image.Image]:
    av = _av(video)
    with av.open(str(video)) as container:
        wanted = _chosen(_times(container), count, segment)
    found: dict[int, Image.Image] = {}
    with av.open(str(video)) as container:
        for place, frame in enumerate(container.decode(video=0)):
            if place in wanted or place == 0:
                found[place] = frame.to_image()
            if place == wanted[-1]:
                break
    # Of a damaged end, fewer frames are decoded than there are packets.
    return [found[max(place for place in found if place <= want)] for want in wanted]


def _times(container: Any) -> list[float]:
    """Seconds from the start of an opened video's frames, in order, without decoding them."""
    stream = container.streams.video[0]
    stamps = [packet.pts for packet in container.demux(stream) if packet.size]
    if None in stamps:  # AVI may have no times; its frames are as long as each other
        return [place / float(stream.average_rate or 25) for place in range(len(stamps))]
    return [float((stamp - min(stamps)) * stream.time_base) for stamp in sorted(stamps)]


def _chosen(times: Sequence[float], count: int, segment: Segment | None) -> list[int]:
    """Places of the frames to take, of those whose times are in the segment, or nearest to it."""
    if not times:
        raise ValueError("it has no frames")
    places = list(range(len(times)))
    if segment is not None:
        start, end = segment
        middle = (start + end) / 2
        inside = [place for place in places if start <= times[place] <= end]
        places = inside or [min(places, key=lambda place: abs(times[place] - middle))]
    return [places[place] for place in spread(len(places), count)]
