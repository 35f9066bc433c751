"""Loads an image in any form as an upright RGB image with 8 bits per channel.

Does not import torch or transformers, so that the image decoders of the server start fast.
"""

import io
import os
import re
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, BinaryIO, Literal

import numpy as np
from PIL import ExifTags, Image, ImageOps, PngImagePlugin, UnidentifiedImageError

from owl2.errors import ErrorCode, InputError
from owl2.processing.media_file import image_error, open_file

# Pillow's own threshold for a suspicious image: a quarter of a gigabyte as RGB.
DEFAULT_MAX_PIXELS = 89_478_485
# Both image policies compute a square of the longer edge, which is large for a 1×50,000 image. The
# cost of an image is the size of this square; it may be larger than `max_pixels` by this factor.
SQUARE_FACTOR = 4
# Decoders that are slower than this computation: their cost per pixel.
JPEG2000_COST, JPEG_SCAN_COST = 8.0, 1 / 16

# Image generators store long texts in PNG files. Their total is limited to 64 MiB.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY

Alpha = Literal["white", "drop"]
ImagePolicy = Literal["resize", "pad", "crop"]
POLICIES: tuple[ImagePolicy, ...] = ("resize", "pad", "crop")

# Not all formats of Pillow, because images are untrusted: for EPS Pillow starts another program,
# and some decoders are little used. MPO (cameras) is read as JPEG.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "ICO", "AVIF", "JPEG2000")

# All but restart markers and others without a length.
_JPEG_MARKER = re.compile(rb"\xff[\x02-\xcf\xd8-\xfe]")

_pillow_limit_lock = threading.Lock()


class LazyImage(ABC):
    """An image that is decoded when it is loaded, such as a frame of a video."""

    @abstractmethod
    def load(self, max_pixels: int) -> Image.Image:
        """The image in RGB. Raises as `load_image`."""


def load_image(
    source: Any, max_pixels: int = DEFAULT_MAX_PIXELS, alpha: Alpha = "white"
) -> Image.Image:
    """Load an image as an upright RGB `PIL.Image`.

    EXIF rotation is applied, and 16-bit images are scaled to 8 bits. An http(s) URL is requested
    again after a transient error.

    Args:
        source: A path (`str`, `Path`, ``file://``), an http(s) URL, a `PIL.Image`, encoded `bytes`,
            a data URI, a base64 string, a `LazyImage`, or a NumPy array or tensor of shape (H, W),
            (H, W, C) or (C, H, W) with C = 1, 3 or 4, in `uint8`, `uint16`, or float between 0
            and 1.
        max_pixels: Limit on width x height. It is checked before pixels are decoded.
        alpha: For transparent images. "white": composite on white, as viewers show them. "drop":
            use the colors without the transparency, as `convert("RGB")` in the authors' scripts.

    Raises:
        InputError: The image is missing (`MISSING_IMAGE`), too large (`IMAGE_TOO_LARGE`), is not a
            regular file or cannot be read (`UNREADABLE_FILE`), or cannot be decoded
            (`BROKEN_IMAGE`). The message names the image.
    """
    max_pixels = check_max_pixels(max_pixels)
    if alpha not in ("white", "drop"):
        raise InputError(f"alpha is {alpha!r}; choose white or drop.", ErrorCode.INVALID_VALUE)
    torch = sys.modules.get("torch")  # imported already if the source is a tensor
    if torch is not None and isinstance(source, torch.Tensor):
        source = source.detach().cpu()
        source = (source.float() if source.is_floating_point() else source).numpy()
    if isinstance(source, (str, os.PathLike, bytes, bytearray, memoryview)):
        file, name = open_file(source)
    elif isinstance(source, LazyImage):
        return source.load(max_pixels)
    elif isinstance(source, np.ndarray):
        name = f"the array of shape {tuple(source.shape)}"
        return _to_rgb(_array_to_image(source, name), max_pixels, alpha, name)
    elif isinstance(source, Image.Image):
        return _to_rgb(source, max_pixels, alpha, "the given PIL image")
    else:
        raise image_error(
            f"an object of type {type(source).__name__}",
            "is not an image: pass a path, a URL, a PIL image, bytes, a data URI, a base64 string "
            "or an array.",
        )
    with file:
        return _decode(file, max_pixels, alpha, name)


def check_max_pixels(value: Any) -> int:
    """`value` as an int. Raises `InputError` unless it is an integer of at least 1."""
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < 1:
        raise InputError(
            f"max_pixels is {value!r}; it must be an integer of at least 1.",
            ErrorCode.INVALID_VALUE,
        )
    return int(value)


def image_cost(data: bytes, max_pixels: int = DEFAULT_MAX_PIXELS) -> int:
    """The cost of loading an encoded image and of its square, from its header, in pixels.

    Raises:
        InputError: As `load_image`, unless only the pixels are invalid.
    """
    name = f"the given file of {len(data)} bytes"
    with open_image(io.BytesIO(data), name) as image:
        return _check_size(image, max_pixels, name)


def _decode(stream: BinaryIO, max_pixels: int, alpha: Alpha, name: str) -> Image.Image:
    """Decode a file as RGB. The size is checked after the header and before the pixels."""
    with open_image(stream, name) as image:
        return _to_rgb(image, max_pixels, alpha, name)


def open_image(stream: BinaryIO, name: str, formats: tuple[str, ...] | None = None) -> Image.Image:
    """An image whose header is read.

    Args:
        formats: Of Pillow; default: `supported_formats`.

    Raises:
        InputError: It is in no such format, or corrupt (BROKEN_IMAGE).
    """
    formats = formats or supported_formats()
    try:
        if not stream.read(1):
            raise image_error(name, "is empty: 0 bytes.")
        stream.seek(0)
        with _without_pillow_limit():
            return Image.open(stream, formats=formats)
    except UnidentifiedImageError as error:
        raise image_error(
            name, f"is not an image in a supported format ({', '.join(formats)})."
        ) from error
    except InputError:
        raise
    except Exception as error:  # a decoder raises exceptions of any type for untrusted bytes
        raise _undecodable(name, error) from error


@cache
def supported_formats() -> tuple[str, ...]:
    """Those of `FORMATS` that the installed Pillow can open."""
    Image.init()  # registers the less common formats
    return tuple(name for name in FORMATS if name in Image.OPEN)


@contextmanager
def _without_pillow_limit() -> Iterator[None]:
    """Disable Pillow's limit on pixels, because `max_pixels` may be above or below it.

    The limit is a module variable of Pillow, so a lock is required between threads.
    """
    with _pillow_limit_lock:
        limit = Image.MAX_IMAGE_PIXELS
        Image.MAX_IMAGE_PIXELS = None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _check_size(image: Image.Image, max_pixels: int, name: str) -> int:
    return check_size(*image.size, max_pixels, name, _decoder_cost(image))


def check_size(width: int, height: int, max_pixels: int, name: str, factor: float = 1.0) -> int:
    """The cost of an image, see `image_cost`. Raises `InputError` if it is empty or too large.

    Args:
        factor: The cost of a pixel for the decoder.
    """
    if width == 0 or height == 0:
        raise image_error(name, f"is empty: {width}×{height} pixels.")
    cost = int(max(max(width, height) ** 2, width * height * factor))
    if width * height > max_pixels or cost > SQUARE_FACTOR * max_pixels:
        limit = int(min(max_pixels, SQUARE_FACTOR * max_pixels / factor))
        edge = int((SQUARE_FACTOR * max_pixels) ** 0.5)
        raise image_error(
            name,
            f"has {width}×{height} = {width * height:,} pixels; the limits are {limit:,} pixels "
            f"and an edge of {edge:,}. Resize it, or raise max_pixels if you trust it.",
            ErrorCode.IMAGE_TOO_LARGE,
        )
    return cost


def _decoder_cost(image: Image.Image) -> float:
    """The cost of a pixel for the decoder of an image whose header is read."""
    file = getattr(image, "fp", None)
    if image.format not in ("JPEG", "MPO") or file is None:
        return JPEG2000_COST if image.format == "JPEG2000" else 1.0
    # A progressive JPEG can contain thousands of empty scans, each of which updates all pixels.
    # Pillow has read the file up to the first scan.
    start = file.tell()
    data, position, scans = file.read(), 0, 1
    file.seek(start)
    while marker := _JPEG_MARKER.search(data, position):
        if marker[0] == b"\xff\xd9":  # the end of the image
            break
        scans += marker[0] == b"\xff\xda"
        position = marker.end() + int.from_bytes(data[marker.end() : marker.end() + 2], "big")
    return max(1.0, scans * JPEG_SCAN_COST)


def _to_rgb(image: Image.Image, max_pixels: int, alpha: Alpha, name: str) -> Image.Image:
    _check_size(image, max_pixels, name)
    try:
        image.load()
        _check_size(image, max_pixels, name)  # the size in an ICO file can be another one
        image = _upright(image)
        if image.mode.startswith("I;16"):
            image = _scale_to_8_bits(image, 65535.0, name)
        elif image.mode in ("I", "F"):
            image = _scale_to_8_bits(image, None, name)
        elif image.has_transparency_data:
            # A palette is converted in two steps, because Pillow warns about a direct conversion.
            image = image.convert("LA" if image.mode == "La" else "RGBA").convert("RGBA")
            if alpha == "white":
                white = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(white, image)
        return image if image.mode == "RGB" else image.convert("RGB")
    except InputError:
        raise
    except Exception as error:  # as in `_decode`: most formats are decoded here
        raise _undecodable(name, error) from error


def _undecodable(name: str, error: Exception) -> InputError:
    code = ErrorCode.BROKEN_IMAGE
    if isinstance(error, ValueError) and "MAX_TEXT" in str(error):
        return image_error(
            name,
            f"has more than {PngImagePlugin.MAX_TEXT_MEMORY // 2**20} MiB of text beside its "
            "pixels. Save it again without the text.",
            ErrorCode.IMAGE_TOO_LARGE,
        )
    if isinstance(error, MemoryError):
        code = ErrorCode.OUT_OF_MEMORY
    elif isinstance(error, OSError) and error.errno:  # of the disk or a file server, not of Pillow
        code = ErrorCode.UNREADABLE_FILE
    return image_error(name, f"cannot be decoded: {error}. It may be corrupt or truncated.", code)


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # corrupt EXIF, which raises any exception, does not affect the pixels
        return image
    return image if orientation == 1 else ImageOps.exif_transpose(image)


# ------------------------------------------------------------------ arrays, more than 8 bits


def _scale_to_8_bits(image: Image.Image, white: float | None, name: str) -> Image.Image:
    """Scale a grayscale image with more than 8 bits to "L", which `convert` would clip at 255.

    Args:
        white: The value of white. By default it is derived from the values: 1 (floats only), 255 or
            65535 if they fit, else the range of the values.
    """
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise image_error(name, "contains values that are not finite.")
    if white is None:
        low, high = float(values.min()), float(values.max())
        candidates = [1.0, 255.0, 65535.0] if image.mode == "F" else [255.0, 65535.0]
        fitting = [value for value in candidates if low >= 0 and high <= value]
        if not fitting:
            values, fitting = values - low, [max(high - low, 1.0)]
        white = fitting[0]
    return Image.fromarray(np.rint(values * (255.0 / white)).astype(np.uint8))


def _array_to_image(array: np.ndarray, name: str) -> Image.Image:
    if array.dtype.kind not in "buif":
        raise image_error(
            name, f"has the dtype {array.dtype}. Pass uint8, or floats between 0 and 1."
        )
    if array.ndim == 3 and array.shape[-1] not in (1, 3, 4) and array.shape[0] in (1, 3, 4):
        array = array.transpose(1, 2, 0)
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim != 2 and not (array.ndim == 3 and array.shape[-1] in (3, 4)):
        raise image_error(
            name, "is not an image: pass (H, W), (H, W, C) or (C, H, W), C in 1, 3, 4."
        )
    if array.size == 0:
        raise image_error(name, "is empty.")
    if array.dtype.kind == "f":
        # Written so that NaN fails.
        if not (array.min() >= 0.0 and array.max() <= 1.0):
            raise image_error(
                name,
                "has float values outside 0..1. Pass uint8, or floats that are not normalized.",
            )
        array = np.rint(array.astype(np.float64) * 255.0)
    elif array.dtype == np.uint16:
        array = np.rint(array / 257.0)
    elif array.dtype == np.bool_:
        array = array * 255
    elif array.dtype != np.uint8 and (array.min() < 0 or array.max() > 255):
        raise image_error(name, f"has {array.dtype} values outside 0..255. Pass uint8.")
    return Image.fromarray(np.ascontiguousarray(array.astype(np.uint8)))
