"""Any form of image → an upright RGB image of 8 bits a channel.

Every error names the image, and whatever a user can cause is an `InputError`.
"""

import base64
import binascii
import http.client
import io
import os
import re
import sys
import threading
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from owl2.errors import ErrorCode, InputError

# Pillow's own threshold for a suspicious image: a quarter of a gigabyte as RGB.
DEFAULT_MAX_PIXELS = 89_478_485
# Both policies go through a square of the longer edge; a 1×50,000 image would be a bomb by that.
SQUARE_FACTOR = 4

URL_TIMEOUT_SECONDS = 20
URL_MAX_BYTES = 64 * 1024 * 1024

# Not all that Pillow knows: bytes come from anywhere, and for some formats (EPS) Pillow starts
# other programs, for others its decoders are little used. MPO (cameras') is read as JPEG.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "ICO", "AVIF", "JPEG2000")

# Two letters at least: one is a drive.
_SCHEME = re.compile(r"([a-z][a-z0-9+.-]+)://", re.IGNORECASE)

_pillow_limit_lock = threading.Lock()


def load_image(source: Any, max_pixels: int = DEFAULT_MAX_PIXELS) -> Image.Image:
    """Any form of image → an upright RGB `PIL.Image`.

    `source`: a path (`str`, `Path`, `file://`), an http(s) URL, a `PIL.Image`, encoded `bytes`, a
    data-URI, a base64 string, or a numpy/torch array (H,W), (H,W,C) or (C,H,W), C in 1, 3, 4,
    `uint8`, `uint16` or float in 0..1. EXIF rotation is applied, 16-bit images are scaled to 8
    bits, alpha is dropped (what `convert("RGB")` does, and so the authors' pixels).

    Raises `InputError`: no such file, not an image, broken, empty, or more than `max_pixels`
    pixels (known from the header, before anything is decoded).
    """
    max_pixels = check_max_pixels(max_pixels)
    try:
        return _load(source, max_pixels)
    except InputError as error:
        kept = (ErrorCode.IMAGE_TOO_LARGE, ErrorCode.OUT_OF_MEMORY)
        code = error.code if error.code in kept else ErrorCode.BROKEN_IMAGE
        raise InputError(str(error), code) from error


def check_max_pixels(value: Any) -> int:
    """`value` as an int. Raises `InputError` unless it is a whole number above 0."""
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < 1:
        raise InputError(f"max_pixels is {value!r}; it must be a whole number above 0.")
    return int(value)


def _load(source: Any, max_pixels: int) -> Image.Image:
    if isinstance(source, Image.Image):
        return _to_rgb(source, max_pixels, "the given PIL image")
    if isinstance(source, np.ndarray) or _is_tensor(source):
        name = f"the array of shape {tuple(source.shape)}"
        return _to_rgb(_array_to_image(source, name), max_pixels, name)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _decode(bytes(source), max_pixels, f"the given {len(source)} bytes")
    if isinstance(source, os.PathLike):
        return _read_file(Path(source), max_pixels)
    if isinstance(source, str):
        return _load_string(source, max_pixels)
    raise InputError(
        f"An image cannot be a {type(source).__name__}: give a path, a URL, a PIL image, bytes, "
        "a data-URI, a base64 string or an array."
    )


def _load_string(source: str, max_pixels: int) -> Image.Image:
    if not source.strip():
        raise InputError("The path of the image is empty: give a path or a URL.")
    shown = source if len(source) <= 120 else f"{source[:60]}…({len(source)} characters)"
    scheme = source[:8].lower()
    if scheme.startswith(("http://", "https://")):
        return _decode(_fetch(source), max_pixels, shown)
    if scheme.startswith("data:"):
        return _decode(_decode_data_uri(source, shown), max_pixels, f"the data-URI {shown}")
    if scheme.startswith("file://"):
        return _read_file(_file_url_path(source), max_pixels)
    if found := _SCHEME.match(source):
        raise InputError(
            f"{shown} cannot be read: {found[1]}:// is none of http://, https://, file:// and "
            "data:. Download the image and give its path."
        )
    if not os.path.exists(source) and len(source) >= 64:
        # Long enough for an image, and no such file: a bare base64 string, if it is one.
        try:
            data = base64.b64decode("".join(source.split()), validate=True)
        except (binascii.Error, ValueError):
            pass
        else:
            return _decode(data, max_pixels, f"the base64 string {shown}")
    return _read_file(Path(source), max_pixels)


def _file_url_path(url: str) -> Path:
    try:
        parts = urllib.parse.urlsplit(url)
    except ValueError as error:
        raise InputError(f"{url} is no valid URL: {error}.") from error
    if parts.netloc not in ("", "localhost"):
        raise InputError(
            f"{url} names a file of the computer '{parts.netloc}': only file:///... of this one is "
            "read."
        )
    return Path(urllib.request.url2pathname(parts.path))


def _read_file(path: Path, max_pixels: int) -> Image.Image:
    try:
        with path.open("rb") as file:
            return _decode(file, max_pixels, f"the file '{path}'")
    except FileNotFoundError as error:
        raise InputError(
            f"No image at '{path}': there is no such file (looked from {Path.cwd()}). "
            "Check the path.",
            ErrorCode.MISSING_IMAGE,
        ) from error
    except IsADirectoryError as error:
        raise InputError(
            f"'{path}' is a directory, not an image. Give one of its files."
        ) from error
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"The image at '{path}' cannot be read: {error}.") from error


def _fetch(url: str) -> bytes:
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "owl2"})
        with urllib.request.urlopen(request, timeout=URL_TIMEOUT_SECONDS) as reply:
            data: bytes = reply.read(URL_MAX_BYTES + 1)
    except (http.client.HTTPException, OSError, ValueError) as error:  # URLError is an OSError
        raise InputError(
            f"The image at {url} cannot be fetched: {error}.", ErrorCode.MISSING_IMAGE
        ) from error
    if len(data) > URL_MAX_BYTES:
        raise InputError(
            f"The image at {url} is larger than {URL_MAX_BYTES // 2**20} MiB. "
            "Download it and give its path."
        )
    return data


def _decode_data_uri(uri: str, shown: str) -> bytes:
    header, comma, payload = uri.partition(",")
    if not comma:
        raise InputError(
            f"{shown} is not a data-URI: no comma. Expected data:image/png;base64,...."
        )
    if not header.lower().endswith(";base64"):
        return urllib.parse.unquote_to_bytes(payload)
    try:
        return base64.b64decode("".join(urllib.parse.unquote(payload).split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError(f"The data-URI {shown} holds no valid base64: {error}.") from error


def _decode(data: Any, max_pixels: int, name: str) -> Image.Image:
    """Encoded bytes or an open file → RGB; the size is checked between header and pixels."""
    stream = io.BytesIO(data) if isinstance(data, bytes) else data
    if not stream.read(1):
        raise InputError(f"{_sentence(name)} is empty: it holds 0 bytes.")
    stream.seek(0)
    try:
        with _without_pillow_limit():
            image = Image.open(stream, formats=_formats())
    except UnidentifiedImageError as error:
        raise InputError(
            f"{_sentence(name)} is not an image in a format that is read ({', '.join(_formats())})."
        ) from error
    except Exception as error:  # a foreign decoder on bytes from anywhere: it raises anything
        raise _undecodable(name, error) from error
    with image:
        return _to_rgb(image, max_pixels, name)


@cache
def _formats() -> tuple[str, ...]:
    Image.init()  # Pillow knows the rarer formats only after this
    return tuple(name for name in FORMATS if name in Image.OPEN)


@contextmanager
def _without_pillow_limit() -> Iterator[None]:
    """Read a header without Pillow's own limit on pixels: `max_pixels` may be above or below it.

    Pillow keeps the limit in a module variable; the lock keeps two threads from restoring each
    other's value.
    """
    with _pillow_limit_lock:
        limit = Image.MAX_IMAGE_PIXELS
        Image.MAX_IMAGE_PIXELS = None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _to_rgb(image: Image.Image, max_pixels: int, name: str) -> Image.Image:
    _check_size(image.width, image.height, max_pixels, name)
    try:
        image.load()
        image = _upright(image)
        if image.mode.startswith("I;16"):
            image = _scale_to_8_bits(image, 65535.0, name)
        elif image.mode in ("I", "F"):
            image = _scale_to_8_bits(image, None, name)
        elif image.mode == "P" and "transparency" in image.info:
            # The same colours as straight to RGB, but Pillow warns about the direct way.
            image = image.convert("RGBA")
        return image if image.mode == "RGB" else image.convert("RGB")
    except InputError:
        raise
    except Exception as error:  # as in `_decode`: most formats are decoded only here
        raise _undecodable(name, error) from error


def _undecodable(name: str, error: Exception) -> InputError:
    return InputError(
        f"{_sentence(name)} cannot be decoded: {error}. It may be broken or cut off: get it again, "
        "or save it as PNG.",
        ErrorCode.OUT_OF_MEMORY if isinstance(error, MemoryError) else ErrorCode.BROKEN_IMAGE,
    )


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:
        # Spoilt EXIF is common in images from the web and says nothing about the pixels. Pillow
        # raises anything for it.
        return image
    return image if orientation == 1 else ImageOps.exif_transpose(image)


def _check_size(width: int, height: int, max_pixels: int, name: str) -> None:
    if width == 0 or height == 0:
        raise InputError(f"{_sentence(name)} is empty: {width}×{height} pixels.")
    if width * height > max_pixels or max(width, height) ** 2 > SQUARE_FACTOR * max_pixels:
        edge = int((SQUARE_FACTOR * max_pixels) ** 0.5)
        raise InputError(
            f"{_sentence(name)} has {width}×{height} = {width * height:,} pixels; the limit is "
            f"{max_pixels:,}, and {edge:,} for an edge. Make it smaller, or raise max_pixels if "
            "you trust it.",
            ErrorCode.IMAGE_TOO_LARGE,
        )


def _scale_to_8_bits(image: Image.Image, top: float | None, name: str) -> Image.Image:
    """Greys of more than 8 bits → "L". `convert` would clip them at 255, which makes them white.

    `top`: the value of white; None: found from the values (up to 1 for floats, 255, 65535, else the
    range they have).
    """
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise InputError(f"{_sentence(name)} holds values that are not finite.")
    if top is None:
        low, high = float(values.min()), float(values.max())
        tops = [1.0, 255.0, 65535.0] if image.mode == "F" else [255.0, 65535.0]
        fitting = [white for white in tops if low >= 0 and high <= white]
        if not fitting:
            values, fitting = values - low, [max(high - low, 1.0)]
        top = fitting[0]
    return Image.fromarray(np.rint(values * (255.0 / top)).astype(np.uint8))


def _is_tensor(source: Any) -> bool:
    # Who has a tensor has loaded torch; the server's decoders never do, which are many and small.
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(source, torch.Tensor)


def _array_to_image(source: Any, name: str) -> Image.Image:
    if _is_tensor(source):
        tensor = source.detach().cpu()
        source = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
    array = source
    if array.dtype.kind not in "buif":
        raise InputError(
            f"{_sentence(name)} has values of the type {array.dtype}. Give uint8 values, or floats "
            "in 0..1."
        )
    if array.ndim == 3 and array.shape[-1] not in (1, 3, 4) and array.shape[0] in (1, 3, 4):
        array = array.transpose(1, 2, 0)
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim != 2 and not (array.ndim == 3 and array.shape[-1] in (3, 4)):
        raise InputError(
            f"{_sentence(name)} is no image: it must be (H,W), (H,W,C) or (C,H,W), C in 1, 3, 4."
        )
    if array.size == 0:
        raise InputError(f"{_sentence(name)} is empty.")
    if np.issubdtype(array.dtype, np.floating):
        if not (np.isfinite(array).all() and array.min() >= 0.0 and array.max() <= 1.0):
            raise InputError(
                f"{_sentence(name)} has float values outside 0..1. Divide by 255 or give uint8 "
                "values; don't normalise: that is done here."
            )
        array = np.rint(array.astype(np.float64) * 255.0)
    elif array.dtype == np.uint16:
        array = np.rint(array / 257.0)
    elif array.dtype == np.bool_:
        array = array * 255
    elif array.dtype != np.uint8 and (array.min() < 0 or array.max() > 255):
        raise InputError(
            f"{_sentence(name)} has {array.dtype} values outside 0..255. Give uint8 values."
        )
    return Image.fromarray(np.ascontiguousarray(array.astype(np.uint8)))


def _sentence(name: str) -> str:
    return name[0].upper() + name[1:]
