"""POPE: is such a thing in the image? 3,000 questions a split, on COCO (arXiv:2305.10355)."""

from collections.abc import Iterator

from owl2.eval.readers import Source, each, lines, with_image
from owl2.eval.samples import Broken, Question
from owl2.json_records import JsonRecord


def pope(source: Source) -> Iterator[Question | Broken]:
    """Ids are the published numbers. The option `split`: random, popular or adversarial.

    Raises:
        MissingData: no such file.
        InputError: it is not as published.
    """
    name = f"coco_pope_{source.options['split']}.json"
    path = source.file(name, f"pope/{name}")
    return each(lines(path), lambda _, row: _question(source, row))


def _question(source: Source, row: JsonRecord) -> Question | Broken:
    identity = str(row.integer("question_id"))
    words, label = row.text("text"), row.text("label").lower()
    image = source.image(f"val2014/{row.text('image')}")
    if image is None:
        return Broken(identity, f"the image {row.text('image')} is not there")
    if label not in ("yes", "no"):
        return Broken(identity, f"its label is {label!r:.40}, not yes or no")
    return Question(identity, words, with_image(image, source.ask(words)), (label,))
