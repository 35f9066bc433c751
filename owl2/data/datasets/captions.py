"""Captions: COCO, in COCO's own files or Karpathy's, and TextCaps.

The styles are `instruction` (stage 2), the caption prompt and one caption of the image, chosen by
the seed and the image (Specification §2), and `pairs` (stage 1), each caption with the image.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Literal

from owl2.data.datasets.prompts import CAPTION_PROMPT, about_image, image_and_text
from owl2.data.sample import Sample, SkippedRows
from owl2.errors import ErrorCode, InputError
from owl2.json_records import JsonRecord, json_object, require_split

Style = Literal["instruction", "pairs"]

KARPATHY = "dataset_coco.json"
# The split in the names of COCO's own files; `restval` is in Karpathy's file only.
COCO_SPLITS = {
    "train": "train2014",
    "val": "val2014",
    "restval": "restval",
    "train2017": "train2017",
    "val2017": "val2017",
}


def coco_captions(
    path: Path, split: str, *, style: Style = "instruction", seed: int = 0
) -> Iterator[Sample | SkippedRows]:
    """COCO captions from `captions_train2014.json` or Karpathy's `dataset_coco.json`.

    Karpathy's file has the splits `train`, `val` and `restval` (COCO's val2014 without his
    validation and test images).
    """
    content = json_object(path)
    if "annotations" in content.value:
        captions = _coco_captions(content, split)
    else:
        captions = {
            f"{row.text('filepath')}/{row.text('filename')}": [
                sentence.text("raw") for sentence in row.rows("sentences")
            ]
            for row in content.rows("images")
            if row.text("split") == split
        }
        if not captions:
            raise InputError(f"{path} has no image of the split {split!r}", ErrorCode.EMPTY_DATASET)
    return _samples(captions, path, style, seed)


def textcaps(path: Path, split: str, *, seed: int = 0) -> Iterator[Sample | SkippedRows]:
    """TextCaps: captions that require reading the text in the image.

    The file has a row per caption. The images of both splits are in `train_images/` (the archive
    `train_val_images.zip`).
    """
    content = json_object(path)
    require_split(content.value.get("dataset_type"), split, str(path))
    captions: dict[str, list[str]] = defaultdict(list)
    for row in content.rows("data"):
        captions[f"train_images/{row.text('image_id')}.jpg"].append(row.text("caption_str"))
    return _samples(captions, path, "instruction", seed)


def _coco_captions(content: JsonRecord, split: str) -> Mapping[str, list[str]]:
    """The captions of each image from COCO's own file."""
    directory = COCO_SPLITS[split]
    if split == "restval":
        raise InputError(
            f"{content.where}: only Karpathy's {KARPATHY} has the split {split!r}",
            ErrorCode.UNKNOWN_NAME,
        )
    names = {row.integer("id"): row.text("file_name") for row in content.rows("images")}
    captions: dict[str, list[str]] = defaultdict(list)
    for row in content.rows("annotations"):
        number = row.integer("image_id")
        if number not in names:
            raise InputError(
                f"{row.where}: image {number} is not in 'images'", ErrorCode.INVALID_FORMAT
            )
        if names[number].startswith("COCO_"):  # names of 2014 contain the split
            require_split(names[number].split("_")[1], directory, row.where)
        captions[f"{directory}/{names[number]}"].append(row.text("caption"))
    return captions


def _samples(
    captions: Mapping[str, Sequence[str]], path: Path, style: Style, seed: int
) -> Iterator[Sample | SkippedRows]:
    for image, texts in captions.items():
        source = f"{path}, image {image}"
        valid = [text for text in texts if text]
        if len(valid) < len(texts):
            yield SkippedRows("captions without text", len(texts) - len(valid))
        if style == "pairs":
            yield from (Sample(image_and_text(image, text), source) for text in valid)
        elif valid:
            caption = Random(f"{seed}/{image}").choice(valid)
            yield Sample(about_image(image, [(CAPTION_PROMPT, caption)]), source)
