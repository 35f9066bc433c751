"""LLaVA-Instruct-150K: conversations, descriptions and reasoning about COCO's images."""

from collections.abc import Iterator
from pathlib import Path

from owl2.data.row_parsers import ImagePathResolver, parse_row
from owl2.data.sample import Sample
from owl2.json_records import SkippedRows, json_rows, published_file


def llava_instruct(source: Path, *, file: str | None = None) -> Iterator[Sample | SkippedRows]:
    """LLaVA-Instruct, with the text as the authors' training code reads it (see `row_parsers`).

    Reads `llava_instruct_150k.json`, whose images are file names in COCO's `train2017`.

    Raises:
        InputError: The file differs from the published one.
    """
    path = published_file(source, file, "llava_instruct_150k.json")
    resolve = ImagePathResolver(Path("train2017"))
    for row in json_rows(path):
        yield parse_row(row.value, row.where, resolve)
