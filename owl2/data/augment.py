"""Image augmentation for training.

An augmentation is a function of an image and a random generator, so the same (seed, epoch, sample)
gives the same image in every process.
"""

import math
from collections.abc import Callable
from random import Random

from PIL import Image

Augmentation = Callable[[Image.Image, Random], Image.Image]

# A random resized crop keeps at least this share of the area. A smaller crop would often remove
# what the caption describes.
MIN_AREA = 0.5
ASPECT_RATIOS = (3 / 4, 4 / 3)
CROP_ATTEMPTS = 10

_SYMMETRIES = (None, *Image.Transpose)


def none(image: Image.Image, rng: Random) -> Image.Image:
    """The unchanged image (Specification §2, stage 2)."""
    return image


def crop_flip(image: Image.Image, rng: Random) -> Image.Image:
    """A random resized crop, mirrored with probability 0.5 (Specification §2, stage 1).

    The crop has a share of the area uniform in [`MIN_AREA`, 1] and an aspect ratio log-uniform in
    `ASPECT_RATIOS`. It is stretched to a square with the longer edge of the crop, so the image
    policies `resize` and `pad` give the same pixels.
    """
    left, top, width, height = random_crop_box(image.width, image.height, rng)
    edge = max(width, height)
    crop = image.resize(
        (edge, edge), Image.Resampling.BICUBIC, box=(left, top, left + width, top + height)
    )
    return flip(crop, rng)


def flip(image: Image.Image, rng: Random) -> Image.Image:
    """The image, mirrored left to right with probability 0.5."""
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else image


def dihedral(image: Image.Image, rng: Random) -> Image.Image:
    """One of the eight rotations and reflections of the square, each with the same probability."""
    symmetry = rng.choice(_SYMMETRIES)
    return image if symmetry is None else image.transpose(symmetry)


AUGMENTATIONS: dict[str, Augmentation] = {
    "none": none,
    "crop_flip": crop_flip,
    "flip": flip,
    "dihedral": dihedral,
}


def random_crop_box(width: int, height: int, rng: Random) -> tuple[int, int, int, int]:
    """(left, top, width, height) of a random crop; the full image if no attempt fits into it."""
    for _ in range(CROP_ATTEMPTS):
        area = width * height * rng.uniform(MIN_AREA, 1)
        ratio = math.exp(rng.uniform(math.log(ASPECT_RATIOS[0]), math.log(ASPECT_RATIOS[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return rng.randint(0, width - w), rng.randint(0, height - h), w, h
    return 0, 0, width, height
