"""Descriptions and locations of image regions.

The paper only mentions "regions"; this format is our choice. A box is `[left, top, right, bottom]`,
each a fraction of the image's width or height with two decimals (a hundredth of 448 pixels is less
than a third of a patch). With the image policy `resize` these are positions in the square that the
model sees, so train regions with `resize`, not `pad`, and without crops and flips.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random

from owl2.data.datasets.prompts import Pair, about_image
from owl2.data.sample import Sample
from owl2.json_records import SkippedRows, check_max_rounds
from owl2.registry import look_up

EMPTY_BOX = SkippedRows("regions with an empty box after rounding")

DESCRIBE = "Describe the region {box} of the image in a short phrase."
LOCATE = 'Where in the image is "{phrase}"? Give the region as [left, top, right, bottom].'


@dataclass(frozen=True)
class Region:
    """A phrase and its box: left, top, right, bottom as fractions of the image."""

    phrase: str
    box: tuple[float, float, float, float]


def make_region(phrase: str, box: Sequence[float], size: Sequence[float]) -> Region | None:
    """A region from a box in pixels, clipped to the image.

    Args:
        box: Left, top, width, height.
        size: Width and height of the image.

    Returns:
        None if the box is empty after clipping and rounding.
    """
    left, top, width, height = box
    if min(size) <= 0:
        return None
    edges = (left / size[0], top / size[1], (left + width) / size[0], (top + height) / size[1])
    x0, y0, x1, y1 = (round(min(max(edge, 0.0), 1.0), 2) for edge in edges)
    return Region(phrase, (x0, y0, x1, y1)) if x0 < x1 and y0 < y1 else None


def format_box(box: Sequence[float]) -> str:
    """A box as text: "[0.12, 0.34, 0.56, 0.78]"."""
    return f"[{', '.join(f'{edge:.2f}' for edge in box)}]"


def describe(region: Region) -> Pair:
    """Box → phrase."""
    return DESCRIBE.replace("{box}", format_box(region.box)), region.phrase


def locate(region: Region) -> Pair:
    """Phrase → box."""
    return LOCATE.replace("{phrase}", region.phrase), format_box(region.box)


DIRECTIONS = {"describe": (describe,), "locate": (locate,), "both": (describe, locate)}


def check_region_options(direction: object, max_rounds: object) -> None:
    """Raises `InputError` for an unknown direction or an invalid `max_rounds`."""
    look_up("direction of regions", direction, DIRECTIONS)
    check_max_rounds(max_rounds)


def region_samples(
    image: str, regions: Sequence[Region], direction: str, source: str
) -> Iterator[Sample]:
    """A conversation about the regions of an image per direction.

    `both` gives two conversations, because each direction reveals the answers of the other.
    """
    for to_pair in DIRECTIONS[direction]:
        pairs = [to_pair(region) for region in regions]
        yield Sample(about_image(image, pairs), f"{source}, {to_pair.__name__}")


def shuffled(regions: Sequence[Region], seed: int, image: str) -> list[Region]:
    """The regions in an order that depends on the seed and the image."""
    return Random(f"{seed}/{image}").sample(regions, len(regions))
