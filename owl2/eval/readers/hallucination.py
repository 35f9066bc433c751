"""POPE and MMHal-Bench: questions about objects that an image may not contain."""

from collections.abc import Iterator
from pathlib import PurePosixPath
from urllib.parse import urlsplit

from owl2.eval.readers import EvalData, invalid_value, numbered, read_each, read_jsonl
from owl2.eval.samples import EvalSample, InvalidEvalSample
from owl2.json_records import JsonRecord, json_rows


def pope(data: EvalData) -> Iterator[EvalSample | InvalidEvalSample]:
    """3,000 questions per split about objects in images of COCO (arXiv:2305.10355).

    Ids are the published ones. Option `split`: random, popular or adversarial.

    Raises:
        InputError: The file is missing or has another format.
    """

    def make(identifier: str, row: JsonRecord) -> EvalSample:
        question, label = row.text("text"), row.text("label").lower()
        image = data.image(f"val2014/{row.text('image')}")
        if label not in ("yes", "no"):
            raise invalid_value(f"The label is {label!r:.40}, not yes or no.")
        return data.sample(identifier, question, [image], [label])

    name = f"coco_pope_{data.options['split']}.json"
    rows = read_jsonl(data.file(name, f"pope/{name}"))
    return read_each(rows, lambda _, row: str(row.integer("question_id")), make)


def mmhal(data: EvalData) -> Iterator[EvalSample | InvalidEvalSample]:
    """96 questions that provoke hallucinations (arXiv:2309.14525).

    Ids are the numbers of the rows, such as "mmhal#1"; categories are the eight types of questions.
    The published file has the URLs of the images; here they are files in ``images/`` with the last
    part of the URL as their name.

    Raises:
        InputError: `response_template.json` is missing or has another format.
    """

    def make(identifier: str, row: JsonRecord) -> EvalSample:
        url = row.text("image_src")
        image = data.image(f"images/{PurePosixPath(urlsplit(url).path).name}")
        content = ", ".join(row.texts("image_content"))
        metadata = {"reference": row.text("gt_answer"), "content": content}
        category = row.text("question_type")
        return data.sample(identifier, row.text("question"), [image], (), category, metadata)

    rows = json_rows(data.file("response_template.json"))
    return read_each(rows, numbered("mmhal"), make)
