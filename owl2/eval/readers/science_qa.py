"""ScienceQA: school questions with options, those of the test split that have an image (IMG)."""

from collections.abc import Iterator

from owl2.data.datasets.prompts import LETTERS
from owl2.eval.metrics.choices import listed
from owl2.eval.readers import Source, each, with_image
from owl2.eval.readers.vqa import as_text
from owl2.eval.samples import Broken, Question
from owl2.json_records import JsonRecord, json_entries, json_object


def image_only(source: Source) -> Iterator[Question | Broken]:
    """2,017 questions; the kind is the subject. Option `split` of `pid_splits.json`: "test".

    The hint, which many a question needs, comes first: "Context: ...", as in LLaVA's evaluation.

    Raises:
        MissingData: no `problems.json` or `pid_splits.json`.
        InputError: one is not as published, or the two do not belong together.
    """
    problems = dict(json_entries(source.file("problems.json", "data/scienceqa/problems.json")))
    splits = json_object(source.file("pid_splits.json", "data/scienceqa/pid_splits.json"))
    split = str(source.options.get("split", "test"))
    known = [number for number in splits.texts(split) if number in problems]
    imaged = [number for number in known if problems[number].value.get("image")]
    rows = [problems[number] for number in imaged]
    yield from each(rows, lambda place, row: _question(source, imaged[place - 1], row, split))
    for number in splits.texts(split):
        if number not in problems:
            yield Broken(number, f"{splits.where}: {split!r} has it, problems.json does not")


def _question(source: Source, number: str, row: JsonRecord, split: str) -> Question | Broken:
    text, options, place = row.text("question"), row.texts("choices"), row.integer("answer")
    if not 0 <= place < len(options):
        return Broken(number, f"answer {place} is none of the {len(options)} choices")
    name = f"{number}/{row.text('image')}"
    image = source.image(f"{split}/{name}", f"images/{split}/{name}", f"images/{name}", name)
    if image is None:
        return Broken(number, f"the image {split}/{name} is not there")
    hint = as_text(row.value, "hint").strip()
    asked = listed(f"Context: {hint}\n{text}" if hint else text, options)
    return Question(
        number,
        text,
        with_image(image, source.ask(asked)),
        (LETTERS[place],),
        as_text(row.value, "subject"),
        {"options": options},
    )
