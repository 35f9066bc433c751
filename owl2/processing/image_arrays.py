"""Arrays and images with more than 8 bits per channel, as images with 8 bits."""

import numpy as np
from PIL import Image

from owl2.errors import ErrorCode, InputError


def image_error(name: str, problem: str, code: ErrorCode = ErrorCode.BROKEN_IMAGE) -> InputError:
    """The error about an image; the message starts with its name."""
    return InputError(f"{name[0].upper()}{name[1:]} {problem}", code)


def scale_to_8_bits(image: Image.Image, white: float | None, name: str) -> Image.Image:
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


def array_to_image(array: np.ndarray, name: str) -> Image.Image:
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
