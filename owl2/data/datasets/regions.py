"""Descriptions and locations of image regions: RefCOCO, RefCOCO+, RefCOCOg and Visual Genome.

The paper only mentions "regions"; this format is our choice. A box is `[left, top, right, bottom]`,
each a fraction of the image's width or height with two decimals (a hundredth of 448 pixels is less
than a third of a patch). With the image policy `resize` these are positions in the square that the
model sees, so train regions with `resize`, not `pad`, and without crops and flips.
"""

import pickle
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from random import Random
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import PositiveInt

from owl2.data.datasets.coco import Year, coco_directory, coco_image
from owl2.data.datasets.prompts import conversations
from owl2.data.sample import Sample, SkippedRows
from owl2.errors import ErrorCode, InputError, shorten
from owl2.json_records import JsonRecord, as_record, json_object, json_rows, readable

Direction = Literal["describe", "locate", "both"]
Region = tuple[str, str]  # phrase and box, see `format_box`

DESCRIBE = "Describe the region {box} of the image in a short phrase."
LOCATE = 'Where in the image is "{phrase}"? Give the region as [left, top, right, bottom].'
EMPTY_BOX = SkippedRows("regions with an empty box after rounding")


def format_box(box: Sequence[float], size: Sequence[float]) -> str | None:
    """A box in pixels, clipped to the image, as text: "[0.12, 0.34, 0.56, 0.78]".

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
    return f"[{x0:.2f}, {y0:.2f}, {x1:.2f}, {y1:.2f}]" if x0 < x1 and y0 < y1 else None


def region_samples(
    image: str, regions: Sequence[Region], direction: Direction, max_rounds: int, source: str
) -> Iterator[Sample]:
    """Conversations about the regions of an image, with at most `max_rounds` regions each.

    `both` gives separate conversations, because each direction reveals the answers of the other.
    """
    if direction in ("describe", "both"):
        pairs = [(DESCRIBE.replace("{box}", box), phrase) for phrase, box in regions]
        yield from conversations(image, pairs, f"{source}, describe", max_rounds)
    if direction in ("locate", "both"):
        pairs = [(LOCATE.replace("{phrase}", phrase), box) for phrase, box in regions]
        yield from conversations(image, pairs, f"{source}, locate", max_rounds)


# ------------------------------------------------------------------ RefCOCO


def refcoco(
    refs: Path,
    instances: Path,
    split: str,
    *,
    coco: Year = 2014,
    direction: Direction = "both",
    max_rounds: PositiveInt = 10,
    seed: int = 0,
) -> Iterator[Sample | SkippedRows]:
    """RefCOCO: referring expressions for objects in COCO's images, one per object, by `seed`.

    Args:
        refs: The file of the expressions in the directory of one of the three datasets (`refcoco`,
            `refcoco+`, `refcocog`); `refs(umd).p` for RefCOCOg.
        max_rounds: Objects per conversation; further objects of the image start another one.

    Raises:
        InputError: The pickle contains other types than lists, dicts, strings and numbers.
    """
    content = json_object(instances)
    sizes = {row.integer("id"): row.numbers("width", "height") for row in content.rows("images")}
    boxes = {row.integer("id"): row for row in content.rows("annotations")}
    images: dict[int, list[Region]] = {}
    for row in _pickled_rows(refs):
        if row.text("split") != split:
            continue
        number, box = row.integer("image_id"), row.integer("ann_id")
        if number not in sizes or box not in boxes:
            raise InputError(
                f"{row.where}: {instances.name} has no image {number} or no box {box}",
                ErrorCode.INVALID_FORMAT,
            )
        phrases = [phrase for each in row.rows("sentences") if (phrase := each.text("sent"))]
        text = format_box(_box(boxes[box]), sizes[number])
        if not phrases:
            yield SkippedRows("objects without an expression")
        elif text is None:
            yield EMPTY_BOX
        else:
            phrase = Random(f"{seed}/{row.integer('ref_id')}").choice(phrases)
            images.setdefault(number, []).append((phrase, text))
    directory = coco_directory("train", coco)  # it also has the validation images
    for number, regions in images.items():
        image = coco_image(number, directory)
        yield from region_samples(image, regions, direction, max_rounds, f"{refs}, image {image}")


def _box(row: JsonRecord) -> list[float]:
    box = row.value.get("bbox")
    if isinstance(box, list) and [type(edge) in (int, float) for edge in box] == [True] * 4:
        return box
    raise InputError(
        f"{row.where}: 'bbox' is {shorten(box)}, not left, top, width, height",
        ErrorCode.INVALID_FORMAT,
    )


class _PlainUnpickler(pickle.Unpickler):
    """Refuses classes and functions, which could execute code."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it contains {module}.{name}")


def _pickled_rows(path: Path) -> Iterator[JsonRecord]:
    try:
        with readable(path), path.open("rb") as file:
            rows = _PlainUnpickler(file, encoding="utf-8").load()
    except InputError:
        raise
    except Exception as error:  # a damaged pickle raises nearly any type
        raise InputError(
            f"{path} is not a pickle of lists, dicts, strings and numbers: {error}",
            ErrorCode.INVALID_FORMAT,
        ) from error
    if not isinstance(rows, list) or not rows:
        raise InputError(f"{path} must contain a list of objects", ErrorCode.INVALID_FORMAT)
    return (as_record(row, f"{path}, row {number}") for number, row in enumerate(rows, start=1))


# ------------------------------------------------------------------ Visual Genome


def visual_genome(
    regions: Path,
    images: Path,
    *,
    direction: Direction = "both",
    max_rounds: PositiveInt = 10,
    seed: int = 0,
) -> Iterator[Sample | SkippedRows]:
    """Visual Genome: `max_rounds` of about fifty regions per image, chosen by `seed`.

    The images are in `VG_100K/` and `VG_100K_2/`, as in their URLs. The dataset has no splits, and
    shares images with COCO.
    """
    paths: dict[int, tuple[str, tuple[float, ...]]] = {}  # with width and height
    for row in json_rows(images):
        parts = PurePosixPath(urlsplit(row.text("url")).path).parts
        if len(parts) < 2:
            raise InputError(
                f"{row.where}: 'url' is {row.text('url')!r:.80}, without a directory and a file "
                "name",
                ErrorCode.INVALID_FORMAT,
            )
        paths[row.integer("image_id")] = "/".join(parts[-2:]), row.numbers("width", "height")
    for row in json_rows(regions):
        number = row.integer("id")
        if number not in paths:
            raise InputError(
                f"{row.where}: image {number} is not in {images.name}", ErrorCode.INVALID_FORMAT
            )
        image, size = paths[number]
        found: list[Region] = []
        for region in row.rows("regions"):
            phrase = region.text("phrase")
            box = format_box(region.numbers("x", "y", "width", "height"), size)
            if not phrase:
                yield SkippedRows("regions without a phrase")
            elif box is None:
                yield EMPTY_BOX
            else:
                found.append((phrase, box))
        if not found:
            yield SkippedRows("images without a usable region")
        if len(found) > max_rounds:
            yield SkippedRows(f"regions beyond {max_rounds} per image", len(found) - max_rounds)
        chosen = Random(f"{seed}/{image}").sample(found, len(found))[:max_rounds]
        yield from region_samples(image, chosen, direction, max_rounds, row.where)
