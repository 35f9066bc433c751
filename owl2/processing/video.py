"""Videos to frames: evenly spaced, or one a second.

A video is a folder with its frames as images (ordered by the numbers in their names), an animated
GIF or WebP (decoded by Pillow), another file (decoded by the package `av`), or a list of frames.
A file is a path, a URL, a data URI, a base64 string or bytes, as for `load_image`.

Does not import torch or transformers, so that the image decoders of the server start fast.
"""

import math
import os
import re
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image, ImageSequence

from owl2.constants import MAX_NUM_FRAMES
from owl2.errors import ErrorCode, InputError, shorten
from owl2.files import expand_user
from owl2.processing.image_io import (
    DEFAULT_MAX_PIXELS,
    LazyImage,
    check_size,
    open_image,
)
from owl2.processing.media_file import image_error, image_files, open_file

DEFAULT_NUM_FRAMES = 8
PER_SECOND = "per_second"  # as a number of frames: see `frames_per_second`
ANIMATIONS = (".gif", ".webp")
# Decoded by `av`.
VIDEO_SUFFIXES = (".mp4", ".avi", ".mkv", ".webm", ".mov", ".m4v", ".mpeg", ".mpg")
URL_MAX_BYTES = 512 * 2**20
MAX_PATH_LENGTH = 4096

# Containers of video files. FFmpeg also reads playlists, which name other files and URLs.
_CONTAINERS = "mov,mp4,m4a,3gp,3g2,matroska,webm,avi,mpeg,mpegts,flv,asf,ogg"
_OPTIONS = {"format_whitelist": _CONTAINERS, "protocol_whitelist": "none", "enable_drefs": "0"}

Segment = tuple[float, float]  # seconds from the start of the video
Select = Callable[[Sequence[float], float], Sequence[int]]


@dataclass(frozen=True)
class VideoLimits:
    """Limits of a video that is decoded.

    Attributes:
        max_pixels: Of a frame, width x height.
        max_seconds: Time of the last frame.
        max_frames: Frames of the file, before frames are selected.
    """

    max_pixels: int = DEFAULT_MAX_PIXELS
    max_seconds: float = math.inf
    max_frames: float = math.inf


NO_LIMITS = VideoLimits()


class SampledVideo:
    """Evenly spaced frames of a video, which is decoded when the first frame is loaded.

    Args:
        source: As for `load_video`; not a folder or a list.
        count: Number of frames.
    """

    def __init__(self, source: Any, count: int) -> None:
        self.source, self.count = source, count
        self._images: list[Image.Image] | None = None
        self._lock = threading.Lock()

    def images(self, max_pixels: int) -> list[Image.Image]:
        """The frames in RGB. Raises as `load_video`."""
        with self._lock:
            if self._images is None:
                limits = VideoLimits(max_pixels)
                self._images = load_video(self.source, self.count, limits=limits)
            return self._images


@dataclass(frozen=True, eq=False)
class SampledFrame(LazyImage):
    """A frame of a `SampledVideo`."""

    video: SampledVideo
    index: int

    def load(self, max_pixels: int) -> Image.Image:
        return self.video.images(max_pixels)[self.index]

    def __str__(self) -> str:
        source = self.video.source
        is_data = isinstance(source, str) and source[:5].lower() == "data:"
        is_name = isinstance(source, (str, os.PathLike)) and not is_data
        name = shorten(source, 200, str) if is_name else "a video"
        return f"{name}, frame {self.index + 1} of {self.video.count}"


def sample_frames(video: Any, count: int | str = DEFAULT_NUM_FRAMES) -> list[Any]:
    """The frames of a video as `load_image` takes them; no file is decoded, except `PER_SECOND`.

    Args:
        video: A video as for `load_video`, or a list or an array (T, ...) of its frames.
        count: Number of frames, up to `MAX_NUM_FRAMES`, or `PER_SECOND`. All frames of a list or an
            array are used, as in transformers' processors.

    Raises:
        InputError: The package `av` is required and not installed (MISSING_DEPENDENCY), a folder
            or a list has no images (MISSING_IMAGE), or `count` is out of its range.
    """
    if isinstance(video, (list, tuple)) or getattr(video, "ndim", 0) == 4:
        if not len(video):
            raise InputError("The video has no frames.", ErrorCode.MISSING_IMAGE)
        return list(video)
    if count == PER_SECOND:
        return list(frames_per_second(video))
    if type(count) is not int or not 1 <= count <= MAX_NUM_FRAMES:
        raise InputError(
            f"num_frames is {count!r}; it must be an integer from 1 to {MAX_NUM_FRAMES}, "
            f"or {PER_SECOND!r}.",
            ErrorCode.INVALID_VALUE,
        )
    if isinstance(video, (str, os.PathLike)) and len(os.fspath(video)) < MAX_PATH_LENGTH:
        path = expand_user(os.fspath(video))
        if os.path.isdir(path):  # False for text that is no path, such as base64
            if not (images := folder_frames(path, count)):
                raise InputError(f"{path} contains no images.", ErrorCode.MISSING_IMAGE)
            return list(images)
        if path.suffix.lower() in VIDEO_SUFFIXES:
            import_av(str(video))
    sampled = SampledVideo(video, count)
    return [SampledFrame(sampled, index) for index in range(count)]


def folder_frames(folder: Path, count: int | None = None) -> list[Path]:
    """`count` of the images in a folder, at the centers of equal parts, or all; in order."""
    images = sorted(image_files(folder), key=_natural_order)
    if count is None or not images:
        return images
    return [images[index] for index in centers(len(images), count)]


def load_video(
    source: Any,
    count: int = DEFAULT_NUM_FRAMES,
    segment: Segment | None = None,
    limits: VideoLimits = NO_LIMITS,
) -> list[Image.Image]:
    """`count` frames of a video in RGB: the centers of as many parts of equal length, in order.

    A video with fewer frames repeats some. Frames are rotated as the file requests.

    Args:
        source: A path, a URL, a data URI, a base64 string, or bytes.
        segment: The part of the video with the frames; the nearest frame if it contains none.

    Raises:
        InputError: The video is missing (MISSING_IMAGE), exceeds a limit (IMAGE_TOO_LARGE), cannot
            be read (UNREADABLE_FILE) or decoded (BROKEN_IMAGE), or needs the package `av`
            (MISSING_DEPENDENCY). The message names the video.
    """
    return _load(source, lambda times, rate: _select(times, count, segment), limits)


def frames_per_second(video: Any) -> Sequence[Image.Image | Path]:
    """One frame a second: the frames int(fps * i) for i < frames / fps (Model family §1.3).

    A video shorter than a second has one frame. Of a folder, all images are frames, which are not
    opened. Raises as `load_video`.
    """
    if isinstance(video, (str, os.PathLike)) and len(os.fspath(video)) < MAX_PATH_LENGTH:
        path = expand_user(os.fspath(video))
        if os.path.isdir(path):  # False for text that is no path, such as base64
            return folder_frames(path)
    return _load(video, lambda times, rate: _every_second(len(times), rate), NO_LIMITS)


def centers(total: int, count: int) -> list[int]:
    """Indices of the centers of `count` equal parts of `total` items.

    >>> centers(10, 4)
    [1, 3, 6, 8]
    """
    return [(2 * number + 1) * total // (2 * count) for number in range(count)]


def import_av(name: str) -> Any:
    """The package `av`.

    Raises:
        InputError: It is not installed; the message contains `name`, the video.
    """
    try:
        return import_module("av")
    except ModuleNotFoundError as error:
        raise InputError(
            f"{name} needs the package av: pip install 'owl2-vlm[video]'. Alternatively, provide "
            "its frames as images in a folder.",
            ErrorCode.MISSING_DEPENDENCY,
        ) from error


# ------------------------------------------------------------------ selection


def _select(times: Sequence[float], count: int, segment: Segment | None) -> list[int]:
    """Indices of frames within the segment, or of the nearest frame if it contains none."""
    indices = list(range(len(times)))
    if segment is not None:
        start, end = segment
        inside = [index for index in indices if start <= times[index] <= end]
        middle = (start + end) / 2
        indices = inside or [min(indices, key=lambda index: abs(times[index] - middle))]
    return [indices[index] for index in centers(len(indices), count)]


def _every_second(count: int, rate: float) -> list[int]:
    """One index per second of `count` frames at a frame rate of `rate`."""
    return [int(rate * index) for index in range(max(1, int(count / rate)))]


def _natural_order(path: Path) -> list[tuple[int, str]]:
    """Sorts frame 2 before frame 10."""
    parts = re.split(r"(\d+)", path.name)
    return [(int(part), "") if part.isdecimal() else (0, part) for part in parts]


# ------------------------------------------------------------------ decoding


def _load(source: Any, select: Select, limits: VideoLimits) -> list[Image.Image]:
    file, name = open_file(source, "video", URL_MAX_BYTES)
    try:
        with file:
            head = file.read(12)
            file.seek(0)
            is_animation = head[:4] == b"GIF8" or (head[:4], head[8:]) == (b"RIFF", b"WEBP")
            decode = _decode_animation if is_animation else _decode_video
            return list(decode(file, select, limits, name))
    except InputError:
        raise
    except Exception as error:  # decoders raise any exception for files from any source
        code = ErrorCode.OUT_OF_MEMORY if isinstance(error, MemoryError) else None
        raise image_error(
            name, f"cannot be decoded: {error}.", code or ErrorCode.BROKEN_IMAGE
        ) from error


def _check_timeline(times: Sequence[float], limits: VideoLimits, name: str) -> None:
    if not times:
        raise ValueError("it has no frames")
    for found, limit, unit in (
        (len(times), limits.max_frames, "frames"),
        (times[-1], limits.max_seconds, "seconds"),
    ):
        if found > limit:
            raise image_error(
                name,
                f"is longer than the limit of {limit:,g} {unit}. Shorten it.",
                ErrorCode.IMAGE_TOO_LARGE,
            )


def _decode_animation(
    file: BinaryIO, select: Select, limits: VideoLimits, name: str
) -> Iterator[Image.Image]:
    with open_image(file, name, ("GIF", "WEBP")) as image:
        check_size(*image.size, limits.max_pixels, name)
        durations: list[float] = []
        for frame in ImageSequence.Iterator(image):
            frame.load()  # WebP has the duration afterwards
            durations.append(frame.info.get("duration", 0))
            if len(durations) > limits.max_frames:
                break
        times = [total / 1000 for total in accumulate(durations[:-1], initial=0)]
        _check_timeline(times, limits, name)
        for index in select(times, len(durations) * 1000 / max(sum(durations), 1)):
            image.seek(index)
            yield image.convert("RGB")


def _decode_video(
    file: BinaryIO, select: Select, limits: VideoLimits, name: str
) -> Iterator[Image.Image]:
    av = import_av(name)
    with av.open(file, options=_OPTIONS) as container:
        stream = _video_stream(container)
        check_size(stream.width, stream.height, limits.max_pixels, name)
        rate = float(stream.average_rate or 25)
        stamps, keys = _read_stamps(container, stream, limits.max_frames)
        has_stamps = None not in stamps
        # AVI may lack timestamps; its frames have equal durations.
        positions = sorted(stamps) if has_stamps else list(range(len(stamps)))
        scale = stream.time_base if has_stamps else 1 / rate
        times = [float((position - positions[0]) * scale) for position in positions]
        _check_timeline(times, limits, name)
        wanted = [positions[index] for index in select(times, rate)]
    file.seek(0)
    with av.open(file, options=_OPTIONS) as container:
        for frame in _decode_at(container, wanted, sorted(keys) if has_stamps else None):
            check_size(frame.width, frame.height, limits.max_pixels, name)
            image = frame.to_image()
            # Counterclockwise, in degrees. Cameras rotate by multiples of 90, which is exact.
            yield image.rotate(frame.rotation, expand=True) if frame.rotation else image


def _video_stream(container: Any) -> Any:
    if not container.streams.video:
        raise ValueError("it has no video stream")
    return container.streams.video[0]


def _read_stamps(container: Any, stream: Any, max_frames: float) -> tuple[list[Any], list[Any]]:
    """The timestamps of all frames, at most one more than `max_frames`, and of key frames."""
    stamps, keys = [], []
    for packet in container.demux(stream):
        if packet.size:
            stamps.append(packet.pts)
            if packet.is_keyframe:
                keys.append(packet.pts)
        if len(stamps) > max_frames:
            break
    return stamps, keys


def _decode_at(container: Any, wanted: Sequence[int], keys: Sequence[int] | None) -> Iterator[Any]:
    """For each of ascending positions, the last frame at or before it.

    A damaged file has fewer frames than packets.

    Args:
        wanted: Timestamps; indices of frames if `keys` is None.
        keys: Timestamps of the frames at which decoding can start, ascending. Frames between the
            wanted ones are skipped.
    """
    stream = _video_stream(container)
    frames = enumerate(container.decode(stream))
    last: Any = None
    following: tuple[int, Any] | None = None  # the next frame and its position
    position = keys[0] if keys else 0
    for target in wanted:
        key = keys[max(0, bisect_right(keys, target) - 1)] if keys else 0
        if key > position and (following is None or key > following[0]):
            with suppress(OSError):  # the container cannot seek
                container.seek(key, stream=stream)
                frames, following = enumerate(container.decode(stream)), None
        while (last is None or position < target) and (following is None or following[0] <= target):
            if following is not None:
                position, last = following
                if position == target:
                    break
            index, frame = next(frames, (0, None))
            following = None
            if frame is None:
                break
            stamp = index if keys is None else frame.pts
            following = (position if stamp is None else stamp, frame)
        if last is None and following is None:
            raise ValueError("none of its frames can be decoded")
        yield last if last is not None or following is None else following[1]


def requested_num_frames(options: Mapping[str, Any], default: int) -> int:
    """The option `num_frames` of a processor's call; others that select frames are refused."""
    if options.get("fps") is not None:
        raise InputError(
            "Frames are selected by num_frames; fps is not supported.", ErrorCode.UNSUPPORTED
        )
    return default if (count := options.get("num_frames")) is None else count
