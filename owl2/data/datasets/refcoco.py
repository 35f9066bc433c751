"""RefCOCO, RefCOCO+ and RefCOCOg: things in COCO's images, as people tell them from others."""

import pickle
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

from owl2.data.datasets.coco import coco_folder, coco_image
from owl2.data.datasets.regions import NO_EXTENT, Region, check_settings, region, region_samples
from owl2.data.sample import Sample
from owl2.errors import InputError
from owl2.json_records import (
    JsonRecord,
    SkippedRows,
    as_record,
    json_object,
    known_split,
    published_file,
)


def refcoco(
    source: Path,
    *,
    split: str = "train",
    coco: int = 2014,
    direction: str = "both",
    most: int = 10,
    refs: str = "refs(unc).p",
    instances: str = "instances.json",
    seed: int = 0,
) -> Iterator[Sample | SkippedRows]:
    """RefCOCO: for each thing one of its phrases, drawn by `seed`; see `regions` for the form.

    Up to `most` things of an image are one conversation, the others go on to further ones.
    `source` is the folder of one of the three data sets (`refcoco`, `refcoco+`, `refcocog`);
    RefCOCOg's file is `refs=refs(umd).p`.

    Raises:
        InputError: a file that is not as published, or a pickle with more than plain values.
    """
    check_settings(direction, most)
    wanted = known_split("refcoco", split, {"train": "train", "val": "val"})
    path = published_file(source, refs, "refs(unc).p")
    boxes = published_file(source, instances, "instances.json")
    folder = coco_folder("train", coco)  # its validation images, too, are of train2014
    things: dict[int, list[Region]] = {}
    for thing in _things(path, wanted, boxes, seed):
        if isinstance(thing, SkippedRows):
            yield thing
        else:
            number, found = thing
            things.setdefault(number, []).append(found)
    for number, regions in things.items():
        image = coco_image(number, folder)
        for start in range(0, len(regions), most):
            part = regions[start : start + most]
            yield from region_samples(image, part, direction, f"{path}, image {image}")


def _things(
    path: Path, split: str, boxes: Path, seed: int
) -> Iterator[tuple[int, Region] | SkippedRows]:
    """(number of the image, region) for each thing of the split."""
    content = json_object(boxes)
    sizes = {row.integer("id"): row.numbers("width", "height") for row in content.rows("images")}
    found = {row.integer("id"): row for row in content.rows("annotations")}
    for row in _pickled_rows(path):
        if row.text("split") != split:
            continue
        number, thing = row.integer("image_id"), row.integer("ann_id")
        if number not in sizes or thing not in found:
            raise InputError(f"{row.where}: {boxes.name} lacks image {number} or box {thing}.")
        phrases = [phrase for each in row.rows("sentences") if (phrase := each.text("sent"))]
        if not phrases:
            yield SkippedRows("things without a phrase")
            continue
        phrase = Random(f"{seed}/{row.integer('ref_id')}").choice(phrases)
        here = region(phrase, _box(found[thing]), sizes[number])
        yield NO_EXTENT if here is None else (number, here)


def _box(row: JsonRecord) -> list[float]:
    box = row.value.get("bbox")
    if not isinstance(box, list) or len(box) != 4:
        raise InputError(f"{row.where}: 'bbox' is {box!r:.80}, not left, top, width, height.")
    named = JsonRecord(dict(zip(("left", "top", "width", "height"), box, strict=True)), row.where)
    return list(named.numbers(*named.value))


# ------------------------------------------------------------------ the pickle


class _PlainUnpickler(pickle.Unpickler):
    """Reads lists, dicts, strings and numbers; a pickle that names anything else could run it."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it holds {module}.{name}")


def _pickled_rows(path: Path) -> Iterator[JsonRecord]:
    try:
        with path.open("rb") as file:
            rows = _PlainUnpickler(file, encoding="utf-8").load()
    except Exception as error:  # a damaged pickle raises nearly anything
        raise InputError(
            f"{path} is not a pickle of plain lists, dicts, texts and numbers: {error}"
        ) from error
    if not isinstance(rows, list) or not rows:
        raise InputError(f"{path} must hold a list, with one thing at least.")
    return (as_record(row, f"{path}, row {number}") for number, row in enumerate(rows, start=1))
