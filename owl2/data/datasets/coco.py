"""COCO captions, and the names of COCO's images, which six further data sets use.

The images are one set with two divisions: `train2014` and `val2014`, `train2017` and `val2017`,
whose files are named in another way. All of `train2014` lies in `train2017`; `val2014` is spread
over both of 2017.
"""

from collections.abc import Iterator
from pathlib import Path
from random import Random

from owl2.data.datasets.prompts import CAPTION_PROMPT, about_image, image_and_text
from owl2.data.sample import Sample
from owl2.errors import InputError
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
# What a split is called in the names of COCO's own files.
SPLITS = {
    "train": "train2014",
    "val": "val2014",
    "restval": "",
    "train2017": "train2017",
    "val2017": "val2017",
}
NO_WORDS = SkippedRows("captions without words")


def coco_image(number: int, folder: str) -> str:
    """The path of an image in COCO's archives; `folder`: `train2014`, `train2017`, ..."""
    name = f"{number:012d}.jpg"
    return f"{folder}/COCO_{folder}_{name}" if folder.endswith("2014") else f"{folder}/{name}"


def coco_folder(split: str, year: object) -> str:
    """The folder with the images of a split of 2014, as the user has them: of `year`.

    Raises:
        InputError: another year; the validation split of 2014 in the folders of 2017.
    """
    look_up("year of COCO's images", str(year), {"2014": 0, "2017": 0})
    if split == "val" and str(year) == "2017":
        raise InputError(
            "coco=2017: images of val2014 are spread over train2017 and val2017; "
            "use the archive val2014."
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
    """COCO captions, of `captions_train2014.json` or Karpathy's `dataset_coco.json`.

    `style`: `instruction` (stage 2): the request for a caption and one of the references, drawn by
    `seed` and the image; `pairs` (stage 1): each reference with the image, no request.
    `split`: `train`, `val`, `train2017`, `val2017`; with Karpathy's file `train`, `val`, `restval`
    (COCO's val2014 without what he validates and tests on).

    Raises:
        InputError: a file that is not as published; another style or split.
    """
    make = look_up("style of the data set coco_captions", style, STYLES)
    folder = known_split("coco_captions", split, SPLITS)
    name = f"captions_{folder}.json" if folder else KARPATHY
    if not (source / name).is_file() and (source / KARPATHY).is_file():
        name = KARPATHY
    path = published_file(source, file, name)
    references = _references(path, split, folder)
    for image, captions in references.items():
        said = [caption for caption in captions if caption]
        if len(said) < len(captions):
            yield SkippedRows(NO_WORDS.reason, len(captions) - len(said))
        if said:
            yield from make(image, said, path, seed)


def _references(path: Path, split: str, folder: str) -> dict[str, list[str]]:
    """Image → all its captions, from either of the two formats."""
    content = json_object(path)
    if "annotations" not in content.value:
        return _karpathy(content, split)
    if not folder:
        raise InputError(f"{path}: only Karpathy's {KARPATHY} has a split {split!r}.")
    names = {row.integer("id"): row.text("file_name") for row in content.rows("images")}
    references: dict[str, list[str]] = {}
    for row in content.rows("annotations"):
        number = row.integer("image_id")
        if number not in names:
            raise InputError(f"{row.where}: there is no image {number} in 'images'.")
        if names[number].startswith("COCO_"):  # COCO's names of 2014 tell the split
            require_split(names[number].split("_")[1], folder, row.where)
        references.setdefault(f"{folder}/{names[number]}", []).append(row.text("caption"))
    return references


def _karpathy(content: JsonRecord, split: str) -> dict[str, list[str]]:
    references = {}
    for row in content.rows("images"):
        if row.text("split") == split:
            image = f"{row.text('filepath')}/{row.text('filename')}"
            references[image] = [sentence.text("raw") for sentence in row.rows("sentences")]
    if not references:
        raise InputError(f"{content.where} has no image of the split {split!r}.")
    return references


# ------------------------------------------------------------------ styles


def one_caption(image: str, captions: list[str], path: Path, seed: int) -> Iterator[Sample]:
    """The request for a caption, and one of them, drawn by the seed and the image (SPEC §2)."""
    caption = Random(f"{seed}/{image}").choice(captions)
    yield Sample(about_image(image, [(CAPTION_PROMPT, caption)]), f"{path}, image {image}")


def all_captions(image: str, captions: list[str], path: Path, seed: int) -> Iterator[Sample]:
    """An image-text pair a caption, for stage 1."""
    for caption in captions:
        yield Sample(image_and_text(image, caption), f"{path}, image {image}")


STYLES = {"instruction": one_caption, "pairs": all_captions}
