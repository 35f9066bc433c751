"""MMHal-Bench: 96 questions that invite hallucination (arXiv:2309.14525).

The published file names the images by their addresses; here they are files in ``images/``, by
the last part of the address.
"""

from collections.abc import Iterator
from pathlib import PurePosixPath
from urllib.parse import urlsplit

from owl2.eval.readers import Source, each, with_image
from owl2.eval.samples import Broken, Question
from owl2.json_records import JsonRecord, json_rows


def mmhal(source: Source) -> Iterator[Question | Broken]:
    """Ids count the rows from 1, such as "mmhal#1"; kinds are the eight types of questions.

    Raises:
        MissingData: no response_template.json.
        InputError: it is not as published.
    """
    rows = json_rows(source.file("response_template.json"))
    return each(rows, lambda number, row: _question(source, f"mmhal#{number}", row))


def _question(source: Source, identity: str, row: JsonRecord) -> Question | Broken:
    address, words = row.text("image_src"), row.text("question")
    name = PurePosixPath(urlsplit(address).path).name
    image = source.image(f"images/{name}")
    if image is None:
        return Broken(identity, f"the image images/{name} is not there; get it from {address}")
    facts = {"reference": row.text("gt_answer"), "content": ", ".join(row.texts("image_content"))}
    return Question(
        identity,
        words,
        with_image(image, source.ask(words)),
        (),
        kind=row.text("question_type"),
        facts=facts,
    )
