"""Rows → samples, by the Jinja expressions of a task."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from pkgutil import resolve_name
from typing import Any

from jinja2 import Environment, StrictUndefined, TemplateError, UndefinedError

from owl2.data.datasets.prompts import LETTERS, with_options
from owl2.errors import ErrorCode, InputError
from owl2.eval.readers import EvalData
from owl2.eval.readers.rows import Row
from owl2.eval.samples import EvalSample, InvalidEvalSample
from owl2.eval.task_config import SampleFields, TaskConfig
from owl2.eval.video import frame_files
from owl2.json_records import JsonRecord
from owl2.processing.messages import user_message

# Errors of one row in a file of the right format.
ROW_ERRORS = (ErrorCode.INVALID_VALUE, ErrorCode.MISSING_IMAGE)
# Errors that all rows would have.
DATASET_ERRORS = (ErrorCode.FILE_NOT_FOUND, ErrorCode.MISSING_DEPENDENCY)
ERROR_CODES = {UndefinedError: ErrorCode.MISSING_VALUE, ValueError: ErrorCode.INVALID_VALUE}

_JINJA = Environment(undefined=StrictUndefined)
_JINJA.filters["letter_index"] = LETTERS.index


def read_samples(config: TaskConfig, data: EvalData) -> Iterator[EvalSample | InvalidEvalSample]:
    """One item per row: a sample, or an invalid sample if the row has an error.

    Raises:
        InputError: One of `DATASET_ERRORS`; or no row has the published format, which means that
            this is another file.
    """
    reader = resolve_name(f"owl2.eval.readers.{config.reader}")
    builder = SampleBuilder(config.sample, data)
    patterns = data.published.files[: data.published.num_row_files]
    for paths in [data.paths(alternatives) for alternatives in patterns] or [[]]:
        yield from _read_each(reader(paths, data), builder, paths)


def _read_each(
    rows: Iterable[Row], builder: "SampleBuilder", paths: list[Path]
) -> Iterator[EvalSample | InvalidEvalSample]:
    first: InputError | None = None
    is_empty, is_published_format = True, False
    for row in rows:
        if isinstance(row, InvalidEvalSample):
            is_empty = False
            first = first or InputError(row.reason, ErrorCode.INVALID_FORMAT)
            yield row
            continue
        identifier = row.where.split(", ")[-1]
        try:
            sample_id = builder.identify(row)
            if sample_id is None:
                continue
            identifier = sample_id
            item: EvalSample | InvalidEvalSample = builder.build(identifier, row)
            is_published_format = True
        except (ValueError, TypeError, AttributeError, TemplateError) as error:
            code = error.code if isinstance(error, InputError) else ERROR_CODES.get(type(error))
            if code in DATASET_ERRORS:
                raise
            error = InputError(f"{row.where}: {error}", code or ErrorCode.INVALID_TYPE)
            is_published_format |= code in ROW_ERRORS
            first = first or error
            item = InvalidEvalSample(identifier, str(error))
        is_empty = False
        yield item
    if first is not None and not is_published_format:
        raise first
    if is_empty:
        names, rule = ", ".join(map(str, paths[:1])), builder.fields.filter
        raise InputError(f"No row of {names} is selected by {rule!r}.", ErrorCode.EMPTY_DATASET)


class SampleBuilder:
    """The compiled expressions of a task."""

    def __init__(self, fields: SampleFields, data: EvalData) -> None:
        self.fields, self.data = fields, data
        self._head = _compile({"filter": fields.filter, "id": fields.id})
        heads = {"filter", "id", "question", "show_choices", "frames", "folders"}
        values = {name: value for name, value in fields if name not in heads}
        self._values = _compile({"question": fields.question or "none", **values})

    def identify(self, row: JsonRecord) -> str | None:
        """The id of the sample; None if the row is not part of the benchmark."""
        head = self._head(row.value)
        if not head["filter"]:
            return None
        return str(head["id"]) if isinstance(head["id"], int) else _text("id", head["id"])

    def build(self, identifier: str, row: JsonRecord) -> EvalSample:
        """The sample; no separator is between images and text (Specification §1.5).

        Raises:
            InputError: A value has another type; a text is empty; an image does not exist.
        """
        values = self._values(row.value)
        metadata = values["metadata"]
        json.dumps(metadata, default=str)  # raises for an undefined column
        if self.fields.question is None:
            question = text = self.data.prompt
        else:
            text = values["question"]
            question = _text("question", text)
        hint = values["hint"] or ""
        if hint and "{hint}" not in self.data.prompt:
            question = text = f"{hint}\n{text}"
        choices = [] if values["choices"] is None else _texts("choices", values["choices"])
        answers = values["expected"] if values["expected"] is not None else []
        answers = answers if isinstance(answers, list) else [answers]
        if self.fields.show_choices and choices:
            question, text = with_options(question, choices), with_options(text, values["choices"])
            metadata = {**metadata, "options": choices}
            expected = [LETTERS[_index(answer, choices)] for answer in answers]
        elif values["choices"] is not None:
            expected = [choices[_index(answer, choices)] for answer in answers]
        else:
            expected = _texts("expected", answers)
        if not question or (values["expected"] is not None and not any(expected)):
            reason = "The answers are empty." if question else "The question is empty."
            raise InputError(reason, ErrorCode.INVALID_VALUE)
        text = text if self.data.has_task_format else question
        filled = {"question": text, "hint": hint or "N/A", "request": values["request"]}
        text = re.sub(r"\{(\w+)\}", lambda m: filled.get(m[1], m[0]), self.data.prompt)
        message = user_message(text, self._images(values))
        parts = [_image_part(p) if p["type"] == "image" else p for p in message["content"]]
        messages = [{"role": "user", "content": parts}]
        category = _text("category", values["category"])
        return EvalSample(identifier, question, messages, tuple(expected), category, metadata)

    def _images(self, values: Mapping[str, Any]) -> Sequence[Any]:
        """Paths, frames of a video, or mappings."""
        if values["image"] is not None:
            images = values["image"] if isinstance(values["image"], list) else [values["image"]]
            return [
                image if isinstance(image, Mapping) else self._find([_text("image", image)])
                for image in images
            ]
        if values["file"] is not None:
            return [self._find(_alternatives("file", values["file"]))]
        video, segment = values["video"], values["segment"]
        if video is None:
            return []
        names = _alternatives("video", video)
        folders = [str(PurePath(name).with_suffix("")) for name in names]
        pairs = zip(folders, names, strict=True)
        path = self._find([name for pair in pairs for name in pair])
        if segment is not None:
            if not isinstance(segment, list) or len(segment) != 2:
                raise ValueError(f"the segment {segment!r:.60} is not a pair of numbers")
            fps = values["segment_fps"] or 1
            segment = (float(segment[0]) / fps, float(segment[1]) / fps)
        frames = frame_files(path, self.fields.frames, segment)
        if not frames:
            raise InputError(f"{path} contains no images.", ErrorCode.MISSING_IMAGE)
        return frames

    def _find(self, names: list[str]) -> Path:
        folders = self.fields.folders
        path = self.data.find(names, folders) if all(names) else None
        if path is None:
            paths = [str(PurePath(folder, name)) for name in names for folder in folders]
            found = f"None of {', '.join(paths)} exists."
            reason = found if all(names) else "The image or video has no name."
            raise InputError(reason, ErrorCode.MISSING_IMAGE)
        return path


def _image_part(part: Mapping[str, Any]) -> dict[str, Any]:
    image = part["image"]
    if isinstance(image, Mapping):
        return {"type": "image", **image}
    if isinstance(image, Path):
        return {"type": "image", "path": str(image)}
    return {"type": "image", "image": image}


def _compile(expression: str | dict[str, Any]) -> Any:
    return _JINJA.compile_expression(_source(expression), undefined_to_none=False)


def _source(expression: str | dict[str, Any]) -> str:
    if isinstance(expression, str):
        return f"({expression})"
    return "{" + ", ".join(f"{key!r}: {_source(value)}" for key, value in expression.items()) + "}"


def _text(name: str, value: Any) -> str:
    """The stripped text. Raises `TypeError` for another type, `UndefinedError` for no value."""
    if not isinstance(value, str):
        raise TypeError(f"the {name} is {str(value)!r:.80}, not text")
    return value.strip()


def _texts(name: str, values: Any) -> list[str]:
    if isinstance(values, str | Mapping):
        raise TypeError(f"the {name} is {values!r:.80}, not a list")
    return [_text(name, value) for value in values]


def _alternatives(name: str, value: Any) -> list[str]:
    return _texts(name, value if isinstance(value, list) else [value])


def _index(answer: Any, choices: list[str]) -> int:
    """The index of the choice with this text or index."""
    if isinstance(answer, int) and 0 <= answer < len(choices):
        return answer
    if isinstance(answer, str) and answer.strip() in choices:
        return choices.index(answer.strip())
    raise ValueError(f"the answer {str(answer)!r:.60} is not one of the choices {choices}")
