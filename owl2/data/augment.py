"""What images undergo in training: an image and a source of chance → an image.

The chance is given, so that the same (seed, epoch, sample) makes the same image in any process.
"""

import math
from collections.abc import Callable
from random import Random

from PIL import Image

Augmentation = Callable[[Image.Image, Random], Image.Image]

# Random resized crops keep this share of the area at least; less often cuts away what the caption
# tells of.
MIN_AREA = 0.5
RATIOS = (3 / 4, 4 / 3)
CROP_ATTEMPTS = 10

_TURNS = (None, *Image.Transpose)


def none(image: Image.Image, chance: Random) -> Image.Image:
    """The image as it is (SPEC §2, stage 2)."""
    return image


def crop_flip(image: Image.Image, chance: Random) -> Image.Image:
    """A random part, stretched to a square, and in half of the cases mirrored (SPEC §2, stage 1).

    The part has `MIN_AREA` to all of the area, evenly, and a ratio of width to height in `RATIOS`,
    evenly in its logarithm. The square has the part's longer edge, so both image policies take
    it as it is.
    """
    left, top, width, height = _random_box(image.width, image.height, chance)
    edge = max(width, height)
    part = image.resize(
        (edge, edge), Image.Resampling.BICUBIC, box=(left, top, left + width, top + height)
    )
    return flip(part, chance)


def flip(image: Image.Image, chance: Random) -> Image.Image:
    """Mirrored, left and right exchanged, in half of the cases."""
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if chance.random() < 0.5 else image


def dihedral(image: Image.Image, chance: Random) -> Image.Image:
    """One of the eight symmetries of the square, each as likely: turned by quarters, mirrored."""
    turn = chance.choice(_TURNS)
    return image if turn is None else image.transpose(turn)


AUGMENTATIONS: dict[str, Augmentation] = {
    "none": none,
    "crop_flip": crop_flip,
    "flip": flip,
    "dihedral": dihedral,
}


def _random_box(width: int, height: int, chance: Random) -> tuple[int, int, int, int]:
    """(left, top, width, height) of a random part; the whole where none fits in some attempts."""
    for _ in range(CROP_ATTEMPTS):
        area = width * height * chance.uniform(MIN_AREA, 1)
        ratio = math.exp(chance.uniform(math.log(RATIOS[0]), math.log(RATIOS[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return chance.randint(0, width - w), chance.randint(0, height - h), w, h
    return 0, 0, width, height
