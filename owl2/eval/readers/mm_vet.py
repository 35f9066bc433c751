"""MM-Vet: 218 open questions, each of which needs several capabilities (arXiv:2308.02490)."""

from collections.abc import Iterator

from owl2.data.datasets.published import json_entries
from owl2.eval.questions import Broken, Question
from owl2.eval.readers import Source, with_picture


def mm_vet(source: Source) -> Iterator[Question | Broken]:
    """Ids such as "v1_17". `<AND>` and `<OR>` in the reference are for the judge.

    Raises:
        MissingData: no mm-vet.json.
        InputError: it is not as published.
    """
    path = source.file("mm-vet.json")
    for identity, row in json_entries(path):
        name, words = row.text("imagename"), row.text("question")
        picture = source.picture(f"images/{name}")
        if picture is None:
            yield Broken(identity, f"the picture {name} is not there")
            continue
        facts = {"reference": row.text("answer"), "capabilities": row.texts("capability")}
        yield Question(identity, words, with_picture(picture, source.ask(words)), (), facts=facts)
