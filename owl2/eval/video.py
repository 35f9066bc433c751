"""Evenly spaced frames of the videos of a benchmark, decoded on first use.

`owl2.processing.video` decodes the videos. Here their frames become files, because benchmarks ask
several questions about a video, and reports show its frames.
"""

import os
import re
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from owl2.processing.video import ANIMATIONS, Segment, folder_frames, import_av, load_video

JPEG_QUALITY = 95

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


def frame_files(
    video: Path, count: int, segment: Segment | None = None
) -> Sequence[Path | VideoFrame]:
    """The frames of `load_video` as files.

    The frames in a folder are assumed to be those of the segment; a folder without images has no
    frames.

    Raises:
        InputError: The package `av` is required and not installed (MISSING_DEPENDENCY).
    """
    if video.is_dir():
        return folder_frames(video, count)
    if video.suffix.lower() not in ANIMATIONS:
        import_av(str(video))
    return [VideoFrame(video, number, count, segment) for number in range(1, count + 1)]


@cache
def _frame_directory() -> "tempfile.TemporaryDirectory[str]":
    return tempfile.TemporaryDirectory(prefix="owl2-frames-")


@cache
def _decode(video: Path, count: int, segment: Segment | None) -> tuple[Path, ...]:
    folder = Path(tempfile.mkdtemp(dir=_frame_directory().name))
    paths = [folder / f"{number}.jpg" for number in range(1, count + 1)]
    for path, frame in zip(paths, load_video(video, count, segment), strict=True):
        frame.save(path, quality=JPEG_QUALITY, subsampling=0)
    return tuple(paths)
