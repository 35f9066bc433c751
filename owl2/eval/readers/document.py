"""Rows of DocDownstream-1.0, the test files of DocOwl1.5 (Model family §8).

``test/NAME_test.jsonl`` has the conversations. For the benchmarks of DUE, the answers are in
``meta/NAME/test/document.jsonl``, and ``metadata.jsonl`` has the document of each conversation.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from owl2.errors import ErrorCode, InputError
from owl2.eval.readers import EvalData
from owl2.eval.readers.rows import Row, read_jsonl
from owl2.eval.samples import InvalidEvalSample
from owl2.json_records import JsonRecord
from owl2.processing.message_parts import IMAGE_TOKEN

# The categories of DeepForm and of Kleister Charity; a question contains the name of its category.
CATEGORIES = (
    *("advertiser", "flight_from", "flight_to", "gross_amount", "contract_num"),
    *("address__post_town", "address__postcode", "address__street_line"),
    *("charity_name", "charity_number", "report_date"),
    *("income_annually_in_british_pounds", "spending_annually_in_british_pounds"),
)
SAME_KEY = 100  # characters of a question that must agree


def conversations(paths: list[Path], data: EvalData) -> Iterator[Row]:
    """The rows of a test file. Columns: `id`, `question`, `answers`, `image`."""
    for number, row in enumerate(read_jsonl(paths[0]), start=1):
        if isinstance(row, InvalidEvalSample):
            yield row
            continue
        try:
            yield JsonRecord({"id": number, **_read_turns(row)}, row.where)
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            yield InvalidEvalSample(str(number), f"{row.where}: not a conversation: {error!r}")


def _read_turns(row: JsonRecord) -> dict[str, Any]:
    user, assistant = row.value["messages"]
    return {
        "question": user["content"].replace(IMAGE_TOKEN, ""),
        "answers": [assistant["content"]],
        "image": list(row.value["image"]),
    }


def due(paths: list[Path], data: EvalData) -> Iterator[Row]:
    """`conversations` with the answers of the document.

    Further columns: `document`, `key` (a category, or the question) and `annotations` (of the
    document). `answers` are the accepted variants, and `values` all values of the question.

    Raises:
        InputError: The files have other numbers of rows, or another form.
    """
    files = [data.paths(pattern)[0] for pattern in data.published.files[1:]]
    described, documents = map(_objects, files)
    rows = list(conversations(paths, data))
    if len(rows) != len(described):
        raise InputError(
            f"{paths[0]} has {len(rows)} rows, but its metadata.jsonl has {len(described)}.",
            ErrorCode.INVALID_FORMAT,
        )
    try:
        yield from _join(rows, described, {one["name"]: one for one in documents})
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise InputError(
            f"{files[0]} or {files[1].name} is not of DocDownstream-1.0: {error!r}",
            ErrorCode.INVALID_FORMAT,
        ) from error


def _join(
    rows: Sequence[Row], described: Sequence[dict[str, Any]], documents: dict[str, dict[str, Any]]
) -> Iterator[Row]:
    """The rows with the answers of their documents."""
    unused = {name: list(one["annotations"]) for name, one in documents.items()}
    for row, description in zip(rows, described, strict=True):
        if isinstance(row, InvalidEvalSample):
            yield row
            continue
        name = description["file_name"].split("/")[-1].split(".pdf")[0]
        question = json.loads(description["ground_truth"])["gt_parses"][0]["question"]
        category = next((one for one in CATEGORIES if one in question), None)
        value: dict[str, Any] = {**row.value, "document": name}
        if name not in documents:
            yield InvalidEvalSample(str(value["id"]), f"{row.where}: no document {name}.")
            continue
        value["annotations"] = documents[name]["annotations"]
        own = [one for one in value["annotations"] if one["key"] == category]
        if category and (own or _has_only_categories(value["annotations"])):
            value["key"] = category
        else:
            value["key"] = question
            own = [one for one in unused[name] if one["key"][:SAME_KEY] == question[:SAME_KEY]][:1]
            if not own:
                reason = f"{row.where}: the document {name} has no answer to {question!r:.80}."
                yield InvalidEvalSample(str(value["id"]), reason)
                continue
            unused[name].remove(own[0])
        values = [one for annotation in own for one in annotation["values"]]
        value["values"] = [one["value"] for one in values] or ["None"]
        variants = [text for one in values for text in one.get("value_variants", ())]
        value["answers"] = variants or value["values"]
        yield JsonRecord(value, row.where)


def _has_only_categories(annotations: list[dict[str, Any]]) -> bool:
    return all(annotation["key"] in CATEGORIES for annotation in annotations)


def _objects(path: Path) -> list[Any]:
    rows = list(read_jsonl(path))
    invalid = [row for row in rows if isinstance(row, InvalidEvalSample)]
    if invalid:
        raise InputError(invalid[0].reason, ErrorCode.INVALID_FORMAT)
    return [row.value for row in rows if isinstance(row, JsonRecord)]
