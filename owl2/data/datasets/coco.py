"""COCO captions, and the names of COCO's pictures, which six further data sets use.

The pictures are one set with two divisions: `train2014` and `val2014`, `train2017` and `val2017`,
whose files are named in another way. All of `train2014` lies in `train2017`; `val2014` is spread
over both of 2017.
"""

from collections.abc import Iterator
from pathlib import Path
from random import Random

from owl2.data.datasets.prompts import CAPTION_PROMPT, about_picture, picture_and_text
from owl2.data.datasets.published import (
    LeftOut,
    Row,
    json_object,
    known_split,
    published_file,
    require_split,
)
from owl2.data.names import look_up
from owl2.data.sample import Sample
from owl2.errors import InputError

KARPATHY = "dataset_coco.json"
# What a split is called in the names of COCO's own files.
SPLITS = {
    "train": "train2014",
    "val": "val2014",
    "restval": "",
    "train2017": "train2017",
    "val2017": "val2017",
}
NO_WORDS = LeftOut("captions without words")


def coco_picture(number: int, folder: str) -> str:
    """The path of a picture in COCO's archives; `folder`: `train2014`, `train2017`, ..."""
    name = f"{number:012d}.jpg"
    return f"{folder}/COCO_{folder}_{name}" if folder.endswith("2014") else f"{folder}/{name}"


def coco_folder(split: str, year: object) -> str:
    """The folder with the pictures of a split of 2014, as the user has them: of `year`.

    Raises:
        InputError: another year; the validation split of 2014 in the folders of 2017.
    """
    look_up("year of COCO's pictures", str(year), {"2014": 0, "2017": 0})
    if split == "val" and str(year) == "2017":
        raise InputError(
            "coco=2017: pictures of val2014 are spread over train2017 and val2017; "
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
) -> Iterator[Sample | LeftOut]:
    """COCO captions, of `captions_train2014.json` or Karpathy's `dataset_coco.json`.

    `style`: `instruction` (stage 2): the request for a caption and one of the references, drawn by
    `seed` and the picture; `pairs` (stage 1): each reference with the picture, no request.
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
    for picture, captions in references.items():
        said = [caption for caption in captions if caption]
        if len(said) < len(captions):
            yield LeftOut(NO_WORDS.reason, len(captions) - len(said))
        if said:
            yield from make(picture, said, path, seed)


def _references(path: Path, split: str, folder: str) -> dict[str, list[str]]:
    """Picture → all its captions, from either of the two formats."""
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
            raise InputError(f"{row.where}: there is no picture {number} in 'images'.")
        if names[number].startswith("COCO_"):  # COCO's names of 2014 tell the split
            require_split(names[number].split("_")[1], folder, row.where)
        references.setdefault(f"{folder}/{names[number]}", []).append(row.text("caption"))
    return references


def _karpathy(content: Row, split: str) -> dict[str, list[str]]:
    references = {}
    for row in content.rows("images"):
        if row.text("split") == split:
            picture = f"{row.text('filepath')}/{row.text('filename')}"
            references[picture] = [sentence.text("raw") for sentence in row.rows("sentences")]
    if not references:
        raise InputError(f"{content.where} has no picture of the split {split!r}.")
    return references


# ------------------------------------------------------------------ styles


def one_caption(picture: str, captions: list[str], path: Path, seed: int) -> Iterator[Sample]:
    """The request for a caption, and one of them, drawn by the seed and the picture (SPEC §2)."""
    caption = Random(f"{seed}/{picture}").choice(captions)
    yield Sample(about_picture(picture, [(CAPTION_PROMPT, caption)]), f"{path}, picture {picture}")


def all_captions(picture: str, captions: list[str], path: Path, seed: int) -> Iterator[Sample]:
    """An image-text pair a caption, for stage 1."""
    for caption in captions:
        yield Sample(picture_and_text(picture, caption), f"{path}, picture {picture}")


STYLES = {"instruction": one_caption, "pairs": all_captions}
