"""MM-Vet: 218 open questions, each of which needs several capabilities (arXiv:2308.02490)."""

from collections.abc import Iterator

from owl2.eval.readers import Source, each, with_image
from owl2.eval.samples import Broken, Question
from owl2.json_records import JsonRecord, json_entries


def mm_vet(source: Source) -> Iterator[Question | Broken]:
    """Ids such as "v1_17". `<AND>` and `<OR>` in the reference are for the judge.

    Raises:
        MissingData: no mm-vet.json.
        InputError: it is not as published.
    """
    rows = dict(json_entries(source.file("mm-vet.json")))
    names = list(rows)
    return each(rows.values(), lambda number, row: _question(source, names[number - 1], row))


def _question(source: Source, identity: str, row: JsonRecord) -> Question | Broken:
    name, words = row.text("imagename"), row.text("question")
    image = source.image(f"images/{name}")
    if image is None:
        return Broken(identity, f"the image {name} is not there")
    facts = {"reference": row.text("answer"), "capabilities": row.texts("capability")}
    return Question(identity, words, with_image(image, source.ask(words)), (), facts=facts)
