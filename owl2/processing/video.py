"""Evenly spaced frames of videos, decoded on first use.

A video is a folder with its frames as images (ordered by the numbers in their names), an animated
GIF or WebP (decoded by Pillow), or another file (decoded by the package `av`).
"""

import os
import re
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from itertools import accumulate
from pathlib import Path
from typing import Any

from PIL import Image, ImageSequence

from owl2.errors import ErrorCode, InputError

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
ANIMATIONS = (".gif", ".webp")
JPEG_QUALITY = 95

Segment = tuple[float, float]  # seconds from the start of the video

_NAME = re.compile(r"(.+), frame (\d+) of (\d+)(?: from (\S+) to (\S+) s)?", re.DOTALL)
_decoder_lock = threading.Lock()


@dataclass(frozen=True)
class VideoFrame(os.PathLike[str]):
    """A frame of a video as the path of an image file, which is created on first use.

    All videos of a benchmark can be listed before one of them is decoded. All frames of a video are
    decoded together, once per process, into a directory that is removed when the process ends.

    Attributes:
        number: From 1 to `count`.
        segment: The part of the video with the frames; None for all of it.
    """

    video: Path
    number: int
    count: int
    segment: Segment | None = None

    def __fspath__(self) -> str:
        """The path of the image. Raises `InputError` if the video cannot be decoded."""
        with _decoder_lock:
            return str(_decode(self.video, self.count, self.segment)[self.number - 1])

    def __str__(self) -> str:
        part = "" if self.segment is None else " from {} to {} s".format(*self.segment)
        return f"{self.video}, frame {self.number} of {self.count}{part}"


def parse_frame(name: str) -> VideoFrame | str:
    """The frame with the name `str(frame)`; any other name is returned unchanged."""
    found = _NAME.fullmatch(name)
    if found is None:
        return name
    video, number, count, start, end = found.groups()
    segment = None if start is None else (float(start), float(end))
    return VideoFrame(Path(video), int(number), int(count), segment)


def sample_frames(
    video: Path, count: int, segment: Segment | None = None
) -> Sequence[Path | VideoFrame]:
    """`count` frames of a video: the centers of as many parts of equal length, in order.

    A video with fewer frames repeats some. The frames in a folder are assumed to be those of the
    segment; a folder without images has no frames.

    Raises:
        InputError: The package `av` is required and not installed (MISSING_DEPENDENCY).
    """
    if video.is_dir():
        images = sorted(
            (path for path in video.iterdir() if path.suffix.lower() in IMAGES), key=_natural_order
        )
        return [images[index] for index in centers(len(images), count)] if images else []
    if video.suffix.lower() not in ANIMATIONS:
        _import_av(video)
    return [VideoFrame(video, number, count, segment) for number in range(1, count + 1)]


def frames_per_second(video: Path) -> list[Image.Image]:
    """One frame a second: the frames int(fps * i) for i < frames / fps (Model family §1.3).

    A video shorter than a second has one frame. Of a folder, all images are frames.

    Raises:
        InputError: The package `av` is required and not installed, or the video cannot be decoded.
    """
    if video.is_dir():
        images = [path for path in video.iterdir() if path.suffix.lower() in IMAGES]
        return [Image.open(path) for path in sorted(images, key=_natural_order)]
    is_animation = video.suffix.lower() in ANIMATIONS
    if not is_animation:
        _import_av(video)
    read = _animation_frames if is_animation else _video_frames
    try:
        if not video.is_file():  # opening a named pipe would block
            raise OSError("It is not a regular file")
        return read(video)
    except Exception as error:  # decoders raise any exception for files from any source
        raise InputError(
            f"The video {video} cannot be decoded: {error}.", ErrorCode.BROKEN_IMAGE
        ) from error


def _animation_frames(video: Path) -> list[Image.Image]:
    frames = []
    with Image.open(video) as image:
        durations = _durations(image)
        rate = len(durations) * 1000 / max(sum(durations), 1)
        for index in _every_second(len(durations), rate):
            image.seek(index)
            frames.append(image.convert("RGB"))
    return frames


def _video_frames(video: Path) -> list[Image.Image]:
    av = _import_av(video)
    with av.open(str(video)) as container:
        rate = float(container.streams.video[0].average_rate or 25)
        count = len(_frame_times(container))
    selected = set(_every_second(count, rate))
    with av.open(str(video)) as container:
        return [
            frame.to_image()
            for index, frame in enumerate(container.decode(video=0))
            if index in selected
        ]


def _durations(image: Image.Image) -> list[float]:
    """The durations of all frames of an animation in milliseconds."""
    durations = []
    for frame in ImageSequence.Iterator(image):
        frame.load()  # WebP has the duration afterwards
        durations.append(frame.info.get("duration", 0))
    return durations


def _every_second(count: int, rate: float) -> list[int]:
    """Indices of `count` frames, of which a second has `rate`."""
    return [int(rate * index) for index in range(max(1, int(count / rate)))]


def centers(total: int, count: int) -> list[int]:
    """Indices of the centers of `count` equal parts of `total` items.

    >>> centers(10, 4)
    [1, 3, 6, 8]
    """
    return [(2 * number + 1) * total // (2 * count) for number in range(count)]


def _natural_order(path: Path) -> list[tuple[int, str]]:
    """Sorts frame 2 before frame 10."""
    parts = re.split(r"(\d+)", path.name)
    return [(int(part), "") if part.isdecimal() else (0, part) for part in parts]


def _import_av(video: Path) -> Any:
    try:
        return import_module("av")
    except ModuleNotFoundError as error:
        raise InputError(
            f"{video} needs the package av: pip install av. Alternatively, provide its frames as "
            "images in a folder with the same name without extension.",
            ErrorCode.MISSING_DEPENDENCY,
        ) from error


@cache
def _frame_directory() -> "tempfile.TemporaryDirectory[str]":
    return tempfile.TemporaryDirectory(prefix="owl2-frames-")


@cache
def _decode(video: Path, count: int, segment: Segment | None) -> tuple[Path, ...]:
    read = _read_animation if video.suffix.lower() in ANIMATIONS else _read_video
    try:
        if not video.is_file():  # opening a named pipe would block
            raise OSError("It is not a regular file")
        folder = Path(tempfile.mkdtemp(dir=_frame_directory().name))
        paths = [folder / f"{number}.jpg" for number in range(1, count + 1)]
        for path, frame in zip(paths, read(video, count, segment), strict=True):
            frame.convert("RGB").save(path, quality=JPEG_QUALITY, subsampling=0)
    except Exception as error:  # decoders raise any exception for files from any source
        raise InputError(
            f"The video {video} cannot be decoded: {error}.", ErrorCode.BROKEN_IMAGE
        ) from error
    return tuple(paths)


def _read_animation(video: Path, count: int, segment: Segment | None) -> Iterator[Image.Image]:
    with Image.open(video) as image:
        durations = _durations(image)
        times = [total / 1000 for total in accumulate(durations[:-1], initial=0)]
        for index in _select(times, count, segment):
            image.seek(index)
            yield image


def _read_video(video: Path, count: int, segment: Segment | None) -> list[Image.Image]:
    av = _import_av(video)
    with av.open(str(video)) as container:
        selected = _select(_frame_times(container), count, segment)
    found: dict[int, Image.Image] = {}
    with av.open(str(video)) as container:
        for index, frame in enumerate(container.decode(video=0)):
            if index in selected or index == 0:
                found[index] = frame.to_image()
            if index == selected[-1]:
                break
    # A damaged file has fewer frames than packets.
    return [found[max(index for index in found if index <= wanted)] for wanted in selected]


def _frame_times(container: Any) -> list[float]:
    """The times of all frames in seconds from the start, in order, without decoding."""
    stream = container.streams.video[0]
    stamps = [packet.pts for packet in container.demux(stream) if packet.size]
    if None in stamps:  # AVI may lack timestamps; its frames have equal durations
        return [index / float(stream.average_rate or 25) for index in range(len(stamps))]
    return [float((stamp - min(stamps)) * stream.time_base) for stamp in sorted(stamps)]


def _select(times: Sequence[float], count: int, segment: Segment | None) -> list[int]:
    """Indices of frames within the segment, or of the nearest frame if it contains none."""
    if not times:
        raise ValueError("it has no frames")
    indices = list(range(len(times)))
    if segment is not None:
        start, end = segment
        inside = [index for index in indices if start <= times[index] <= end]
        middle = (start + end) / 2
        indices = inside or [min(indices, key=lambda index: abs(times[index] - middle))]
    return [indices[index] for index in centers(len(indices), count)]
