"""What pictures undergo in training: a picture and a source of chance → a picture.

The chance is given, so that the same (seed, epoch, sample) makes the same picture in any process.
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


def none(picture: Image.Image, chance: Random) -> Image.Image:
    """The picture as it is (SPEC §2, stage 2)."""
    return picture


def crop_flip(picture: Image.Image, chance: Random) -> Image.Image:
    """A random part, stretched to a square, and in half of the cases mirrored (SPEC §2, stage 1).

    The part has `MIN_AREA` to all of the area, evenly, and a ratio of width to height in `RATIOS`,
    evenly in its logarithm. The square has the part's longer edge, so both image policies take
    it as it is.
    """
    left, top, width, height = _random_box(picture.width, picture.height, chance)
    edge = max(width, height)
    part = picture.resize(
        (edge, edge), Image.Resampling.BICUBIC, box=(left, top, left + width, top + height)
    )
    return flip(part, chance)


def flip(picture: Image.Image, chance: Random) -> Image.Image:
    """Mirrored, left and right exchanged, in half of the cases."""
    return picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if chance.random() < 0.5 else picture


def dihedral(picture: Image.Image, chance: Random) -> Image.Image:
    """One of the eight symmetries of the square, each as likely: turned by quarters, mirrored."""
    turn = chance.choice(_TURNS)
    return picture if turn is None else picture.transpose(turn)


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
