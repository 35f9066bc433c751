"""Captions of COCO and Flickr30K, in the splits of Karpathy and Fei-Fei (2015).

The file is ``{"images": [{"filename", "imgid", "split", "sentences": [{"raw"}, ...]}, ...]}``;
that of COCO also has the archive (`filepath`) and the id (`cocoid`) of an image.
"""

from collections.abc import Iterator, Sequence

from owl2.data.datasets.prompts import CAPTION_PROMPT
from owl2.errors import ErrorCode, InputError
from owl2.eval.metrics.captions import require_pycocoevalcap
from owl2.eval.readers import EvalData, invalid_value, read_each
from owl2.eval.samples import EvalSample, InvalidEvalSample
from owl2.json_records import JsonRecord, json_object


def coco(data: EvalData) -> Iterator[EvalSample | InvalidEvalSample]:
    """5,000 images of val2014; ids are those of COCO. Option `split`: "test" by default.

    Raises:
        InputError: `dataset_coco.json` is missing, has another format or no such split; the
            package for CIDEr is missing.
    """

    def make(identifier: str, row: JsonRecord) -> EvalSample:
        name = row.text("filename")
        return _sample(data, identifier, row, [f"{row.text('filepath')}/{name}", name])

    rows = _rows(data, "dataset_coco.json")
    return read_each(rows, lambda _, row: str(row.integer("cocoid")), make)


def flickr30k(data: EvalData) -> Iterator[EvalSample | InvalidEvalSample]:
    """1,000 images; ids are their file names. Otherwise as `coco`."""

    def make(name: str, row: JsonRecord) -> EvalSample:
        folders = ("flickr30k-images", "flickr30k_images", "images")
        return _sample(data, name, row, [*(f"{folder}/{name}" for folder in folders), name])

    return read_each(
        _rows(data, "dataset_flickr30k.json"), lambda _, row: row.text("filename"), make
    )


def _rows(data: EvalData, name: str) -> list[JsonRecord]:
    split = data.options.get("split", "test")
    path = data.file(name)
    require_pycocoevalcap()
    content = json_object(path)
    rows = [row for row in content.rows("images") if row.value.get("split") == split]
    if not rows:
        raise InputError(f"{content.where} has no split {split!r}.", ErrorCode.UNKNOWN_NAME)
    return rows


def _sample(data: EvalData, identifier: str, row: JsonRecord, images: Sequence[str]) -> EvalSample:
    references = [text for item in row.rows("sentences") if (text := item.text("raw"))]
    if not references:
        raise invalid_value("There is no reference caption.")
    prompt = data.ask(CAPTION_PROMPT)
    return data.sample(identifier, prompt, [data.image(*images)], references, text=prompt)
