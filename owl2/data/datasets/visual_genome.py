"""Visual Genome: phrases for regions of an image, some fifty an image."""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from owl2.data.datasets.regions import (
    NO_EXTENT,
    Region,
    check_settings,
    region,
    region_samples,
    shuffled,
)
from owl2.data.sample import Sample
from owl2.errors import InputError
from owl2.json_records import JsonRecord, SkippedRows, json_rows, published_file

Images = dict[int, tuple[str, tuple[float, ...]]]


def visual_genome(
    source: Path,
    *,
    direction: str = "both",
    most: int = 10,
    regions: str | None = None,
    images: str | None = None,
    seed: int = 0,
) -> Iterator[Sample | SkippedRows]:
    """Visual Genome: `most` regions an image, drawn by `seed`; see `regions` for the form.

    Reads `region_descriptions.json` and `image_data.json`. Images are in `VG_100K/` and
    `VG_100K_2/`, as in their URLs. It has no splits, and shares images with COCO's.

    Raises:
        InputError: a file that is not as published.
    """
    check_settings(direction, most)
    path = published_file(source, regions, "region_descriptions.json")
    known = _images(published_file(source, images, "image_data.json"))
    for row in json_rows(path):
        yield from _image(row, known, direction, most, seed)


def _images(path: Path) -> Images:
    found: Images = {}
    for row in json_rows(path):
        url = row.text("url")
        parts = PurePosixPath(urlsplit(url).path).parts
        if len(parts) < 2:
            raise InputError(f"{row.where}: 'url' is {url!r:.80}, without a folder and a name.")
        found[row.integer("image_id")] = ("/".join(parts[-2:]), row.numbers("width", "height"))
    return found


def _image(
    row: JsonRecord, known: Images, direction: str, most: int, seed: int
) -> Iterator[Sample | SkippedRows]:
    number = row.integer("id")
    if number not in known:
        raise InputError(f"{row.where}: image {number} is not in the file of images.")
    image, size = known[number]
    found: list[Region] = []
    for each in row.rows("regions"):
        phrase = each.text("phrase")
        here = region(phrase, each.numbers("x", "y", "width", "height"), size)
        if not phrase:
            yield SkippedRows("regions without a phrase")
        elif here is None:
            yield NO_EXTENT
        else:
            found.append(here)
    drawn = shuffled(found, seed, image)[:most]
    if len(found) > most:
        yield SkippedRows(f"regions beyond {most} of an image", len(found) - most)
    if drawn:
        yield from region_samples(image, drawn, direction, row.where)
    else:
        yield SkippedRows("images without a region that can be used")
