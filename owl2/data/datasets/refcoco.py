"""RefCOCO, RefCOCO+ and RefCOCOg: referring expressions for objects in COCO's images."""

import pickle
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

from owl2.data.datasets.coco import coco_directory, coco_image
from owl2.data.datasets.regions import (
    EMPTY_BOX,
    Region,
    check_region_options,
    make_region,
    region_samples,
)
from owl2.data.sample import Sample
from owl2.errors import ErrorCode, InputError
from owl2.json_records import (
    JsonRecord,
    SkippedRows,
    as_record,
    json_object,
    known_split,
    published_file,
    readable,
)


def refcoco(
    source: Path,
    *,
    split: str = "train",
    coco: int = 2014,
    direction: str = "both",
    max_rounds: int = 10,
    refs: str = "refs(unc).p",
    instances: str = "instances.json",
    seed: int = 0,
) -> Iterator[Sample | SkippedRows]:
    """RefCOCO: one expression per object, chosen by `seed`; see `regions` for the format.

    Args:
        source: The directory of one of the three datasets (`refcoco`, `refcoco+`, `refcocog`).
        max_rounds: Objects per conversation; further objects of the image start another one.
        refs: The file of the expressions; `refs(umd).p` for RefCOCOg.

    Raises:
        InputError: A file differs from the published one, or a pickle contains other types than
            lists, dicts, strings and numbers.
    """
    check_region_options(direction, max_rounds)
    wanted = known_split("refcoco", split, {"train": "train", "val": "val"})
    path = published_file(source, refs, "refs(unc).p")
    boxes = published_file(source, instances, "instances.json")
    directory = coco_directory("train", coco)  # the validation images are in train2014, too
    images: dict[int, list[Region]] = {}
    for item in _regions(path, wanted, boxes, seed):
        if isinstance(item, SkippedRows):
            yield item
        else:
            number, region = item
            images.setdefault(number, []).append(region)
    for number, regions in images.items():
        image = coco_image(number, directory)
        for start in range(0, len(regions), max_rounds):
            rounds = regions[start : start + max_rounds]
            yield from region_samples(image, rounds, direction, f"{path}, image {image}")


def _regions(
    path: Path, split: str, boxes: Path, seed: int
) -> Iterator[tuple[int, Region] | SkippedRows]:
    """(image number, region) of each object of the split."""
    content = json_object(boxes)
    sizes = {row.integer("id"): row.numbers("width", "height") for row in content.rows("images")}
    annotations = {row.integer("id"): row for row in content.rows("annotations")}
    for row in _pickled_rows(path):
        if row.text("split") != split:
            continue
        number, annotation = row.integer("image_id"), row.integer("ann_id")
        if number not in sizes or annotation not in annotations:
            raise InputError(
                f"{row.where}: {boxes.name} has no image {number} or no box {annotation}",
                ErrorCode.INVALID_FORMAT,
            )
        phrases = [phrase for each in row.rows("sentences") if (phrase := each.text("sent"))]
        if not phrases:
            yield SkippedRows("objects without an expression")
            continue
        phrase = Random(f"{seed}/{row.integer('ref_id')}").choice(phrases)
        region = make_region(phrase, _box(annotations[annotation]), sizes[number])
        yield EMPTY_BOX if region is None else (number, region)


def _box(row: JsonRecord) -> tuple[float, ...]:
    box = row.value.get("bbox")
    if not isinstance(box, list) or len(box) != 4:
        raise InputError(
            f"{row.where}: 'bbox' is {box!r:.80}, not left, top, width, height",
            ErrorCode.INVALID_FORMAT,
        )
    named = dict(zip(("left", "top", "width", "height"), box, strict=True))
    return JsonRecord(named, row.where).numbers(*named)


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
