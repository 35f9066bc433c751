"""Regions of an image in words: what is there, and where is that.

The paper says "regions" only; this form is our choice. A box is `[left, top, right, bottom]`, each
a share of the image's own width or height with two decimals (a hundredth of 448 pixels is less
than a third of a patch). With the image policy `resize` that is a place in the square that the
model sees, so train regions with `resize`, not `pad`, and without crops and flips.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random

from owl2.data.datasets.prompts import Pair, about_image
from owl2.data.sample import Sample
from owl2.json_records import SkippedRows, check_max_rounds
from owl2.registry import look_up

NO_EXTENT = SkippedRows("regions without extent, or smaller than can be written")

DESCRIBE = "Describe the region {box} of the image in a short phrase."
LOCATE = 'Where in the image is "{phrase}"? Give the region as [left, top, right, bottom].'


@dataclass(frozen=True)
class Region:
    """A phrase and the box it is about: left, top, right, bottom as shares of the image."""

    phrase: str
    box: tuple[float, float, float, float]


def region(phrase: str, box: Sequence[float], size: Sequence[float]) -> Region | None:
    """`box`: left, top, width, height, and `size`: width, height, in pixels.

    A box that reaches over the edge ends at the edge. None for what cannot be written: no extent
    after rounding, or nothing inside the image.
    """
    left, top, width, height = box
    if min(size) <= 0:
        return None
    shares = (left / size[0], top / size[1], (left + width) / size[0], (top + height) / size[1])
    first, second, third, fourth = (round(min(max(share, 0.0), 1.0), 2) for share in shares)
    if first >= third or second >= fourth:
        return None
    return Region(phrase, (first, second, third, fourth))


def written(box: Sequence[float]) -> str:
    """A box as text: "[0.12, 0.34, 0.56, 0.78]"."""
    return f"[{', '.join(f'{share:.2f}' for share in box)}]"


def describe(given: Region) -> Pair:
    """Box → phrase."""
    return DESCRIBE.replace("{box}", written(given.box)), given.phrase


def locate(given: Region) -> Pair:
    """Phrase → box."""
    return LOCATE.replace("{phrase}", given.phrase), written(given.box)


DIRECTIONS = {"describe": (describe,), "locate": (locate,), "both": (describe, locate)}


def check_settings(direction: object, most: object) -> None:
    """Raises `InputError` for an unknown direction, or a `most` that is no number from 1 on."""
    look_up("direction of regions", direction, DIRECTIONS)
    check_max_rounds(most)


def region_samples(
    image: str, given: Sequence[Region], direction: str, source: str
) -> Iterator[Sample]:
    """The regions of an image in one conversation a direction.

    With `both` they are two conversations, as each direction gives the other's answers away.
    """
    for way in DIRECTIONS[direction]:
        pairs = [way(each) for each in given]
        yield Sample(about_image(image, pairs), f"{source}, {way.__name__}")


def shuffled(given: Sequence[Region], seed: int, image: str) -> list[Region]:
    """The regions in an order drawn by the seed and the image."""
    return Random(f"{seed}/{image}").sample(given, len(given))
