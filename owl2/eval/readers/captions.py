"""Captions of COCO and Flickr30K, in the splits of Karpathy and Fei-Fei (2015).

Each is one file ``{"images": [{"filename", "imgid", "split", "sentences": [{"raw"}, ...]}, ...]}``;
COCO's also says which archive an image is in (`filepath`) and its number there (`cocoid`).
"""

from collections.abc import Iterator

from owl2.data.datasets.prompts import CAPTION_PROMPT
from owl2.errors import InputError
from owl2.eval.metrics.captions import check_installed
from owl2.eval.readers import Source, each, with_image
from owl2.eval.samples import Broken, Question
from owl2.json_records import JsonRecord, json_object


def coco(source: Source) -> Iterator[Question | Broken]:
    """5,000 images of val2014; ids are COCO's numbers. Option `split`: default "test".

    Raises:
        MissingData: no `dataset_coco.json`.
        InputError: it is not as published, or has no such split; CIDEr's package is missing.
    """

    def make(_: int, row: JsonRecord) -> Question | Broken:
        name = row.text("filename")
        path = f"{row.text('filepath')}/{name}"
        return _question(source, row, str(row.integer("cocoid")), path, name)

    return each(_rows(source, "dataset_coco.json"), make)


def flickr30k(source: Source) -> Iterator[Question | Broken]:
    """1,000 images; ids are their file names. Option `split`: default "test".

    Raises:
        MissingData: no `dataset_flickr30k.json`.
        InputError: it is not as published, or has no such split; CIDEr's package is missing.
    """

    def make(_: int, row: JsonRecord) -> Question | Broken:
        name = row.text("filename")
        folders = ("flickr30k-images", "flickr30k_images", "images")
        return _question(source, row, name, *(f"{folder}/{name}" for folder in folders), name)

    return each(_rows(source, "dataset_flickr30k.json"), make)


def _rows(source: Source, name: str) -> list[JsonRecord]:
    split = source.options.get("split", "test")
    path = source.file(name)
    check_installed()
    content = json_object(path)
    rows = [row for row in content.rows("images") if row.value.get("split") == split]
    if not rows:
        raise InputError(f"{content.where} has no image of the split {split!r}.")
    return rows


def _question(source: Source, row: JsonRecord, number: str, *images: str) -> Question | Broken:
    references = tuple(filter(None, (sentence.text("raw") for sentence in row.rows("sentences"))))
    if not references:
        return Broken(number, "nobody's caption is there to compare with")
    image = source.image(*images)
    if image is None:
        return Broken(number, f"the image {images[0]} is not there")
    words = source.ask(CAPTION_PROMPT)
    return Question(number, words, with_image(image, words), references)
