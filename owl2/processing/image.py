"""Pictures → pixels.

::

    path, URL, PIL, bytes, data-URI, array ──load_image──► RGB picture (upright, 8 bits a channel)
    RGB picture ──policy──► square ──bicubic──► (size, size) ──CLIP mean and std──► (3, size, size)

Every error names the picture; `InputError` is raised for all that a user can cause.
"""

import base64
import binascii
import io
import math
import os
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from owl2.errors import InputError

ImagePolicy = Literal["resize", "pad"]
POLICIES: tuple[ImagePolicy, ...] = ("resize", "pad")

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# Pillow's own threshold for a suspicious picture: a quarter of a gigabyte as RGB.
DEFAULT_MAX_PIXELS = 89_478_485

URL_TIMEOUT_SECONDS = 20
URL_MAX_BYTES = 64 * 1024 * 1024

_BICUBIC_CODE = 3  # Pillow's number for bicubic, as `resample` in preprocessor_config.json
_pillow_limit_lock = threading.Lock()


# ------------------------------------------------------------------ sources → RGB pictures


def load_image(source: Any, max_pixels: int = DEFAULT_MAX_PIXELS) -> Image.Image:
    """Any form of picture → an upright RGB `PIL.Image`.

    `source`: a path (`str`, `Path`, `file://`), an http(s) URL, a `PIL.Image`, encoded `bytes`, a data-URI,
    a base64 string, or a numpy/torch array (H,W), (H,W,C) or (C,H,W), C in 1, 3, 4, `uint8`, `uint16`
    or float in 0..1. EXIF rotation is applied, 16-bit pictures are scaled to 8 bits, alpha is dropped
    (what `convert("RGB")` does, and so the authors' pixels).

    Raises `InputError`: no such file, not a picture, broken, empty, or more than `max_pixels` pixels
    (known from the header, before anything is decoded).
    """
    if isinstance(source, Image.Image):
        return _to_rgb(source, max_pixels, "the given PIL picture")
    if isinstance(source, (np.ndarray, torch.Tensor)):
        name = f"the array of shape {tuple(source.shape)}"
        return _to_rgb(_array_to_picture(source, name), max_pixels, name)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _decode(bytes(source), max_pixels, f"the given {len(source)} bytes")
    if isinstance(source, os.PathLike):
        return _read_file(Path(source), max_pixels)
    if isinstance(source, str):
        return _load_string(source, max_pixels)
    raise InputError(
        f"A picture cannot be a {type(source).__name__}: give a path, a URL, a PIL picture, bytes, "
        "a data-URI, a base64 string or an array."
    )


def _load_string(source: str, max_pixels: int) -> Image.Image:
    shown = source if len(source) <= 120 else f"{source[:60]}…({len(source)} characters)"
    scheme = source[:8].lower()
    if scheme.startswith(("http://", "https://")):
        return _decode(_fetch(source), max_pixels, shown)
    if scheme.startswith("data:"):
        return _decode(_decode_data_uri(source, shown), max_pixels, f"the data-URI {shown}")
    if scheme.startswith("file://"):
        path = urllib.request.url2pathname(urllib.parse.urlsplit(source).path)
        return _read_file(Path(path), max_pixels)
    if not os.path.exists(source) and len(source) >= 64:
        # Long enough for a picture, and no such file: a bare base64 string, if it is one.
        try:
            data = base64.b64decode("".join(source.split()), validate=True)
        except (binascii.Error, ValueError):
            pass
        else:
            return _decode(data, max_pixels, f"the base64 string {shown}")
    return _read_file(Path(source), max_pixels)


def _read_file(path: Path, max_pixels: int) -> Image.Image:
    try:
        with path.open("rb") as file:
            return _decode(file, max_pixels, f"the file '{path}'")
    except FileNotFoundError as error:
        raise InputError(
            f"No picture at '{path}': there is no such file (looked from {Path.cwd()}). Check the path."
        ) from error
    except IsADirectoryError as error:
        raise InputError(
            f"'{path}' is a directory, not a picture. Give one of its files."
        ) from error
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"The picture at '{path}' cannot be read: {error}.") from error


def _fetch(url: str) -> bytes:
    request = urllib.request.Request(url, headers={"User-Agent": "owl2"})
    try:
        with urllib.request.urlopen(request, timeout=URL_TIMEOUT_SECONDS) as reply:
            data: bytes = reply.read(URL_MAX_BYTES + 1)
    except (urllib.error.URLError, OSError, ValueError) as error:
        raise InputError(f"The picture at {url} cannot be fetched: {error}.") from error
    if len(data) > URL_MAX_BYTES:
        raise InputError(
            f"The picture at {url} is larger than {URL_MAX_BYTES // 2**20} MiB. "
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
    """Encoded bytes or an open file → RGB. The size is checked between the header and the pixels."""
    stream = io.BytesIO(data) if isinstance(data, bytes) else data
    try:
        with _without_pillow_limit():
            picture = Image.open(stream)
        with picture:
            return _to_rgb(picture, max_pixels, name)
    except UnidentifiedImageError as error:
        raise InputError(
            f"{_sentence(name)} is not a picture in a format that Pillow reads (PNG, JPEG, WebP, ...)."
        ) from error


@contextmanager
def _without_pillow_limit() -> Iterator[None]:
    """Read a header without Pillow's own limit on pixels, so that `max_pixels` can be above or below it.

    Pillow keeps the limit in a module variable; the lock keeps two threads from restoring each other's value.
    """
    with _pillow_limit_lock:
        limit = Image.MAX_IMAGE_PIXELS
        Image.MAX_IMAGE_PIXELS = None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _to_rgb(picture: Image.Image, max_pixels: int, name: str) -> Image.Image:
    _check_size(picture.width, picture.height, max_pixels, name)
    try:
        picture.load()
        picture = ImageOps.exif_transpose(picture)
        if picture.mode == "P" and "transparency" in picture.info:
            # The same colours as straight to RGB, but Pillow warns about the direct way.
            picture = picture.convert("RGBA")
        elif picture.mode.startswith("I;16"):
            picture = _scale_to_8_bits(picture, 65535, name)
        elif picture.mode in ("I", "F"):
            picture = _scale_to_8_bits(picture, None, name)
        return picture.convert("RGB")
    except InputError:
        raise
    # Pillow's decoders raise these (SyntaxError for a broken PNG chunk) when the data ends or makes no sense.
    except (
        OSError,
        SyntaxError,
        ValueError,
        EOFError,
        IndexError,
        Image.DecompressionBombError,
    ) as error:
        raise InputError(
            f"{_sentence(name)} is broken or cut off: {error}. Save it again."
        ) from error


def _check_size(width: int, height: int, max_pixels: int, name: str) -> None:
    if width == 0 or height == 0:
        raise InputError(f"{_sentence(name)} is empty: {width}×{height} pixels.")
    # Both policies go through a square of the longer edge: a 1×50,000 picture is a bomb too.
    square = max(width, height) ** 2
    if square > max_pixels:
        raise InputError(
            f"{_sentence(name)} has {width}×{height} pixels; as a square of its longer edge that is {square:,}, "
            f"and the limit is {max_pixels:,}. Make it smaller, or raise max_pixels if you trust it."
        )


def _scale_to_8_bits(picture: Image.Image, top: int | None, name: str) -> Image.Image:
    """Greys of more than 8 bits → "L". `convert` would clip them at 255, which makes them white.

    `top`: the value of white; None: found from the values (up to 1 for floats, 255, 65535, else the range they have).
    """
    values = np.asarray(picture).astype(np.float64)
    if not np.isfinite(values).all():
        raise InputError(f"{_sentence(name)} holds values that are not finite.")
    low, high = float(values.min()), float(values.max())
    if top is None:
        tops = ([1.0] if picture.mode == "F" else []) + [255.0, 65535.0]
        fitting = [candidate for candidate in tops if low >= 0 and high <= candidate]
        if not fitting:
            values, fitting = values - low, [max(high - low, 1.0)]
        top_value = fitting[0]
    else:
        top_value = float(top)
    return Image.fromarray(np.rint(values * (255.0 / top_value)).astype(np.uint8), mode=None)


def _array_to_picture(source: Any, name: str) -> Image.Image:
    if isinstance(source, torch.Tensor):
        tensor = source.detach().cpu()
        source = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
    array = source
    if array.ndim == 3 and array.shape[-1] not in (1, 3, 4) and array.shape[0] in (1, 3, 4):
        array = array.transpose(1, 2, 0)
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim != 2 and not (array.ndim == 3 and array.shape[-1] in (3, 4)):
        raise InputError(
            f"{_sentence(name)} is no picture: it must be (H,W), (H,W,C) or (C,H,W), C in 1, 3, 4."
        )
    if array.size == 0:
        raise InputError(f"{_sentence(name)} is empty.")
    if np.issubdtype(array.dtype, np.floating):
        if not (np.isfinite(array).all() and array.min() >= 0.0 and array.max() <= 1.0):
            raise InputError(
                f"{_sentence(name)} has float values outside 0..1. Divide by 255 or give uint8 values; "
                "don't normalise: that is done here."
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


# ------------------------------------------------------------------ RGB pictures → pixels


class Owl2ImageProcessor:
    """Pictures → normalised pixels, as `preprocessor_config.json` of a checkpoint says (SPEC 1.5).

    `size`: edge of the square that the model sees, in pixels. `policy`: what happens to a picture that is no
    square: `resize` stretches it to a square of its longer edge, `pad` puts it in the middle of one filled
    with the mean colour. `max_pixels`: the limit of `load_image`.
    """

    model_input_names = ["pixel_values"]

    def __init__(
        self,
        size: int,
        policy: ImagePolicy = "resize",
        image_mean: Sequence[float] = CLIP_MEAN,
        image_std: Sequence[float] = CLIP_STD,
        max_pixels: int = DEFAULT_MAX_PIXELS,
    ) -> None:
        if policy not in POLICIES:
            raise InputError(
                f"image_policy is {policy!r}; it must be one of {', '.join(POLICIES)}."
            )
        if not (isinstance(size, int) and size > 0):
            raise InputError(
                f"The picture size is {size!r}; it must be a number of pixels above 0."
            )
        if len(image_mean) != 3 or len(image_std) != 3 or min(image_std) <= 0:
            raise InputError(
                f"image_mean {image_mean} and image_std {image_std} must hold 3 numbers, std above 0."
            )
        self.size = size
        self.policy = policy
        self.image_mean = tuple(float(value) for value in image_mean)
        self.image_std = tuple(float(value) for value in image_std)
        self.max_pixels = int(max_pixels)
        # One entry a grey level and channel, computed as CLIP's processor computes a pixel (scale, shift, divide, in
        # float32): a look-up instead of three passes over the picture.
        levels = np.arange(256, dtype=np.float32) * np.float32(1 / 255)
        self._levels = [
            ((levels - np.float32(mean)) / np.float32(std)).astype(np.float32)
            for mean, std in zip(self.image_mean, self.image_std, strict=True)
        ]

    def __call__(self, images: Any, return_tensors: str | None = "pt") -> dict[str, Any]:
        """One picture or a list of them → `{"pixel_values": (N, 3, size, size) float32}`.

        `return_tensors`: "pt" (torch) or "np". Raises `InputError` naming the picture's place in the list.
        """
        pictures = list(images) if isinstance(images, (list, tuple)) else [images]
        pixels = np.empty((len(pictures), 3, self.size, self.size), dtype=np.float32)
        for index, source in enumerate(pictures):
            try:
                picture = load_image(source, self.max_pixels)
            except InputError as error:
                if len(pictures) == 1:
                    raise
                raise InputError(f"Picture {index + 1} of {len(pictures)}: {error}") from error
            self._fill(picture, pixels[index])
        if return_tensors == "np":
            return {"pixel_values": pixels}
        if return_tensors in ("pt", None):
            return {"pixel_values": torch.from_numpy(pixels)}
        raise InputError(f"return_tensors is {return_tensors!r}; pictures come as 'pt' or 'np'.")

    def square(self, picture: Image.Image) -> Image.Image:
        """An RGB picture → the (size, size) RGB picture that the model sees."""
        edge = max(picture.size)
        if picture.width != picture.height:
            if self.policy == "resize":
                picture = picture.resize((edge, edge), Image.Resampling.BICUBIC)
            else:
                canvas = Image.new(
                    "RGB", (edge, edge), tuple(int(value * 255) for value in self.image_mean)
                )
                canvas.paste(picture, ((edge - picture.width) // 2, (edge - picture.height) // 2))
                picture = canvas
        if edge == self.size:
            return picture
        return picture.resize((self.size, self.size), Image.Resampling.BICUBIC)

    def _fill(self, picture: Image.Image, pixels: np.ndarray) -> None:
        colours = np.asarray(self.square(picture))  # (size, size, 3)
        for channel, levels in enumerate(self._levels):
            np.take(levels, colours[..., channel], out=pixels[channel], mode="clip")

    # -------------------------------------------------------------- preprocessor_config.json

    def to_dict(self) -> dict[str, Any]:
        """The keys of the released `preprocessor_config.json` (a CLIPImageProcessor reads them), and our two."""
        return {
            "image_processor_type": "CLIPImageProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"shortest_edge": self.size},
            "resample": _BICUBIC_CODE,
            "do_center_crop": True,
            "crop_size": {"height": self.size, "width": self.size},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.image_mean),
            "image_std": list(self.image_std),
            "image_policy": self.policy,
            "max_pixels": self.max_pixels,
        }

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "Owl2ImageProcessor":
        """`preprocessor_config.json` → the processor; without our keys the policy is `resize`, as the authors advise.

        Raises `InputError` for settings that would give other pixels than this class computes.
        """
        expected = {
            "do_resize": True,
            "do_rescale": True,
            "do_normalize": True,
            "resample": _BICUBIC_CODE,
        }
        for key, value in expected.items():
            if config.get(key, value) != value:
                raise InputError(
                    f"preprocessor_config.json: {key} is {config[key]!r}; only {value!r} is supported."
                )
        if not math.isclose(config.get("rescale_factor", 1 / 255), 1 / 255, rel_tol=1e-6):
            raise InputError(
                f"preprocessor_config.json: rescale_factor is {config['rescale_factor']}, not 1/255."
            )
        return cls(
            size=_edge(config),
            policy=config.get("image_policy", "resize"),
            image_mean=config.get("image_mean", CLIP_MEAN),
            image_std=config.get("image_std", CLIP_STD),
            max_pixels=config.get("max_pixels", DEFAULT_MAX_PIXELS),
        )


def _edge(config: Mapping[str, Any]) -> int:
    """The edge of the square from `crop_size`, or `size` where there is none (both come as a number or a dict)."""
    given = config.get("crop_size", config.get("size"))
    edges = set(given.values()) if isinstance(given, Mapping) else {given}
    if len(edges) != 1 or not isinstance(edge := edges.pop(), int):
        raise InputError(
            f"preprocessor_config.json: crop_size is {given!r}; it must be one square's edge in pixels."
        )
    return edge
