"""MM-Vet: 218 open questions, each of which needs several capabilities (arXiv:2308.02490)."""

from collections.abc import Iterator

from owl2.data.datasets.published import Row, json_entries
from owl2.eval.questions import Broken, Question
from owl2.eval.readers import Source, each, with_picture


def mm_vet(source: Source) -> Iterator[Question | Broken]:
    """Ids such as "v1_17". `<AND>` and `<OR>` in the reference are for the judge.

    Raises:
        MissingData: no mm-vet.json.
        InputError: it is not as published.
    """
    rows = dict(json_entries(source.file("mm-vet.json")))
    names = list(rows)
    return each(rows.values(), lambda number, row: _question(source, names[number - 1], row))


def _question(source: Source, identity: str, row: Row) -> Question | Broken:
    name, words = row.text("imagename"), row.text("question")
    picture = source.picture(f"images/{name}")
    if picture is None:
        return Broken(identity, f"the picture {name} is not there")
    facts = {"reference": row.text("answer"), "capabilities": row.texts("capability")}
    return Question(identity, words, with_picture(picture, source.ask(words)), (), facts=facts)
