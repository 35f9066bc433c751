"""Visual Genome: phrases for about fifty regions per image."""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from owl2.data.datasets.regions import (
    EMPTY_BOX,
    check_region_options,
    make_region,
    region_samples,
    shuffled,
)
from owl2.data.sample import Sample
from owl2.errors import ErrorCode, InputError
from owl2.json_records import JsonRecord, SkippedRows, json_rows, published_file

# Image number → path and (width, height).
Images = dict[int, tuple[str, tuple[float, ...]]]


def visual_genome(
    source: Path,
    *,
    direction: str = "both",
    max_rounds: int = 10,
    regions: str | None = None,
    images: str | None = None,
    seed: int = 0,
) -> Iterator[Sample | SkippedRows]:
    """Visual Genome: `max_rounds` regions per image, chosen by `seed`; see `regions`.

    Reads `region_descriptions.json` and `image_data.json`. The images are in `VG_100K/` and
    `VG_100K_2/`, as in their URLs. The dataset has no splits, and shares images with COCO.

    Raises:
        InputError: A file differs from the published one.
    """
    check_region_options(direction, max_rounds)
    path = published_file(source, regions, "region_descriptions.json")
    known = _images(published_file(source, images, "image_data.json"))
    for row in json_rows(path):
        yield from _image_samples(row, known, direction, max_rounds, seed)


def _images(path: Path) -> Images:
    images: Images = {}
    for row in json_rows(path):
        url = row.text("url")
        parts = PurePosixPath(urlsplit(url).path).parts
        if len(parts) < 2:
            raise InputError(
                f"{row.where}: 'url' is {url!r:.80}, without a directory and a file name",
                ErrorCode.INVALID_FORMAT,
            )
        images[row.integer("image_id")] = ("/".join(parts[-2:]), row.numbers("width", "height"))
    return images


def _image_samples(
    row: JsonRecord, images: Images, direction: str, max_rounds: int, seed: int
) -> Iterator[Sample | SkippedRows]:
    number = row.integer("id")
    if number not in images:
        raise InputError(
            f"{row.where}: image {number} is not in the file of images", ErrorCode.INVALID_FORMAT
        )
    image, size = images[number]
    regions = []
    for item in row.rows("regions"):
        phrase = item.text("phrase")
        region = make_region(phrase, item.numbers("x", "y", "width", "height"), size)
        if not phrase:
            yield SkippedRows("regions without a phrase")
        elif region is None:
            yield EMPTY_BOX
        else:
            regions.append(region)
    if len(regions) > max_rounds:
        yield SkippedRows(f"regions beyond {max_rounds} per image", len(regions) - max_rounds)
    if regions:
        chosen = shuffled(regions, seed, image)[:max_rounds]
        yield from region_samples(image, chosen, direction, row.where)
    else:
        yield SkippedRows("images without a usable region")
