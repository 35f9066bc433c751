"""COCO captions, and the paths of COCO's images, which six other datasets use.

The images are published in two divisions with different file names: `train2014` and `val2014`,
`train2017` and `val2017`. `train2017` contains all of `train2014`; `val2014` is distributed over
both directories of 2017.
"""

from collections.abc import Iterator
from pathlib import Path
from random import Random

from owl2.data.datasets.prompts import CAPTION_PROMPT, about_image, image_and_text
from owl2.data.sample import Sample
from owl2.errors import ErrorCode, InputError
from owl2.json_records import (
    JsonRecord,
    SkippedRows,
    json_object,
    known_split,
    published_file,
    require_split,
)
from owl2.registry import look_up

KARPATHY = "dataset_coco.json"
# The split in the names of COCO's own files; "" for splits of Karpathy's file only.
SPLITS = {
    "train": "train2014",
    "val": "val2014",
    "restval": "",
    "train2017": "train2017",
    "val2017": "val2017",
}
EMPTY_CAPTION = "captions without text"


def coco_image(number: int, directory: str) -> str:
    """The path of an image in COCO's archives; `directory`: `train2014`, `train2017`, ..."""
    name = f"{number:012d}.jpg"
    prefix = f"COCO_{directory}_" if directory.endswith("2014") else ""
    return f"{directory}/{prefix}{name}"


def coco_directory(split: str, year: object) -> str:
    """The directory with the images of a split of 2014 in the archives of `year`.

    Raises:
        InputError: An unknown year, or the validation split of 2014 in the directories of 2017.
    """
    look_up("year of COCO's images", str(year), {"2014": 0, "2017": 0})
    if split == "val" and str(year) == "2017":
        raise InputError(
            "coco=2017: the images of val2014 are distributed over train2017 and val2017; use the "
            "archive val2014",
            ErrorCode.UNSUPPORTED,
        )
    return f"{split}{year}"


def coco_captions(
    source: Path,
    *,
    split: str = "train",
    style: str = "instruction",
    file: str | None = None,
    seed: int = 0,
) -> Iterator[Sample | SkippedRows]:
    """COCO captions from `captions_train2014.json` or Karpathy's `dataset_coco.json`.

    Args:
        split: `train`, `val`, `train2017`, `val2017`; with Karpathy's file `train`, `val`,
            `restval` (COCO's val2014 without his validation and test images).
        style: `instruction` (stage 2): the caption prompt and one reference caption, chosen by
            `seed` and the image. `pairs` (stage 1): each caption with the image, without a prompt.

    Raises:
        InputError: The file differs from the published one; an unknown style or split.
    """
    make_samples = look_up("style of the dataset coco_captions", style, STYLES)
    coco_split = known_split("coco_captions", split, SPLITS)
    name = f"captions_{coco_split}.json" if coco_split else KARPATHY
    if not (source / name).is_file() and (source / KARPATHY).is_file():
        name = KARPATHY
    path = published_file(source, file, name)
    for image, captions in _captions(path, split, coco_split).items():
        texts = [caption for caption in captions if caption]
        if len(texts) < len(captions):
            yield SkippedRows(EMPTY_CAPTION, len(captions) - len(texts))
        if texts:
            yield from make_samples(image, texts, path, seed)


def _captions(path: Path, split: str, coco_split: str) -> dict[str, list[str]]:
    """The captions of each image, from either of the two formats."""
    content = json_object(path)
    if "annotations" not in content.value:
        return _karpathy_captions(content, split)
    if not coco_split:
        raise InputError(
            f"{path}: only Karpathy's {KARPATHY} has the split {split!r}", ErrorCode.UNKNOWN_NAME
        )
    names = {row.integer("id"): row.text("file_name") for row in content.rows("images")}
    captions: dict[str, list[str]] = {}
    for row in content.rows("annotations"):
        number = row.integer("image_id")
        if number not in names:
            raise InputError(
                f"{row.where}: image {number} is not in 'images'", ErrorCode.INVALID_FORMAT
            )
        if names[number].startswith("COCO_"):  # names of 2014 contain the split
            require_split(names[number].split("_")[1], coco_split, row.where)
        captions.setdefault(f"{coco_split}/{names[number]}", []).append(row.text("caption"))
    return captions


def _karpathy_captions(content: JsonRecord, split: str) -> dict[str, list[str]]:
    captions = {
        f"{row.text('filepath')}/{row.text('filename')}": [
            sentence.text("raw") for sentence in row.rows("sentences")
        ]
        for row in content.rows("images")
        if row.text("split") == split
    }
    if not captions:
        raise InputError(
            f"{content.where} has no image of the split {split!r}", ErrorCode.EMPTY_DATASET
        )
    return captions


def one_caption(image: str, captions: list[str], path: Path, seed: int) -> Iterator[Sample]:
    """The caption prompt and one caption, chosen by the seed and the image (Specification §2)."""
    caption = Random(f"{seed}/{image}").choice(captions)
    yield Sample(about_image(image, [(CAPTION_PROMPT, caption)]), f"{path}, image {image}")


def all_captions(image: str, captions: list[str], path: Path, seed: int) -> Iterator[Sample]:
    """An image-text pair per caption, for stage 1."""
    for caption in captions:
        yield Sample(image_and_text(image, caption), f"{path}, image {image}")


STYLES = {"instruction": one_caption, "pairs": all_captions}
