"""Image files for requests."""

import base64
import io

import numpy as np
from PIL import Image


def noise(seed=0, size=(40, 30), mode="RGB"):
    """An image of random values."""
    width, height = size
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 4), dtype=np.uint8)
    if mode == "I;16":
        return Image.fromarray((values[..., 0].astype(np.uint16) << 8) + values[..., 1])
    values[..., 3] |= 192  # mostly opaque, so that images differ after compositing
    return Image.fromarray(values, "RGBA").convert(mode)


def encode(image, kind="PNG", **options):
    """The bytes of an image file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def data_uri(data, header="data:image/png;base64,"):
    return header + base64.b64encode(data).decode()
