"""LLaVA-Instruct-150K: conversations, descriptions and reasoning about COCO's images."""

from collections.abc import Iterator
from pathlib import Path

from owl2.data.row_parsers import ImagePathResolver, parse_row
from owl2.data.sample import Sample
from owl2.json_records import SkippedRows, json_rows, published_file


def llava_instruct(source: Path, *, file: str | None = None) -> Iterator[Sample | SkippedRows]:
    """LLaVA-Instruct, as it is; the text as the authors' training reads it (see `readers`).

    Reads `llava_instruct_150k.json`, whose images are names in COCO's `train2017`.

    Raises:
        InputError: a file that is not as published.
    """
    path = published_file(source, file, "llava_instruct_150k.json")
    images = ImagePathResolver(Path("train2017"))
    for row in json_rows(path):
        yield parse_row(row.value, row.where, images)
