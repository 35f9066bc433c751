"""Q-Bench's first task, LLVisionQA: questions on an image's quality (arXiv:2309.14181)."""

from collections.abc import Iterator

from owl2.data.datasets.prompts import LETTERS
from owl2.eval.metrics.choices import listed
from owl2.eval.readers import Source, each, with_image
from owl2.eval.samples import Broken, Question
from owl2.json_records import JsonRecord, json_rows

TYPES = ("yes or no", "what", "how")


def q_bench(source: Source) -> Iterator[Question | Broken]:
    """Ids count the rows from 1; kinds are the three types of questions.

    Raises:
        MissingData: no llvisionqa_dev.json.
        InputError: it is not as published.
    """
    rows = json_rows(source.file("llvisionqa_dev.json"))
    return each(rows, lambda number, row: _question(source, f"q_bench#{number}", row))


def _question(source: Source, identity: str, row: JsonRecord) -> Question | Broken:
    name, options, answer = row.text("img_path"), row.texts("candidates"), row.text("correct_ans")
    image = source.image(f"images/{name}")
    if image is None:
        return Broken(identity, f"the image images/{name} is not there")
    if answer not in options:
        return Broken(identity, f"its answer {answer!r:.60} is none of its options")
    words = listed(row.text("question"), options)
    kind = row.integer("type")
    return Question(
        identity,
        words,
        with_image(image, source.ask(words)),
        (LETTERS[options.index(answer)],),
        kind=TYPES[kind] if kind in range(len(TYPES)) else str(kind),
        facts={"options": options},
    )
