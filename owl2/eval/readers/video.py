"""Questions about videos: MSRVTT-QA, MSVD-QA (Xu et al., 2017) and FrameQA of TGIF-QA (1704.04497).

A video is a published file, or a folder with its frames that has the same name without extension,
in the same directory or in ``frames/``. Folders are preferred, as they need no decoder.
"""

from collections.abc import Callable, Iterator
from typing import Any

from owl2.errors import ErrorCode, InputError
from owl2.eval.readers import EvalData, image_message, numbered, read_csv, read_each, read_text
from owl2.eval.samples import EvalSample, InvalidEvalSample
from owl2.eval.video import Segment, sample_frames
from owl2.json_records import JsonRecord, json_rows

QUESTION_WORDS = ("what", "who", "how", "when", "where")  # the categories of the first two
TGIF_CATEGORIES = {"0": "object", "1": "number", "2": "color", "3": "location"}
TGIF_COLUMNS = ("gif_name", "question", "answer", "type")


def msrvtt_qa(data: EvalData) -> Iterator[EvalSample | InvalidEvalSample]:
    """Ids are the published ones; categories are the first words of the questions.

    Option `frames`: the number of frames per video.

    Raises:
        InputError: `test_qa.json` is missing or has another format; a package for videos is
            missing.
    """
    return _xu(data, lambda number: _names("TestVideo", f"video{number}", ".mp4"))


def msvd_qa(data: EvalData) -> Iterator[EvalSample | InvalidEvalSample]:
    """As `msrvtt_qa`; ``youtube_mapping.txt`` contains the file name of each video id."""
    path = data.file("youtube_mapping.txt")
    clips = {}  # vid1 → -4wsuPCjDBc_5_15
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        cells = line.split()
        if cells and len(cells) != 2:
            raise InputError(
                f"{path}, line {number}: {line!r:.80} is not a file name and an id.",
                ErrorCode.INVALID_FORMAT,
            )
        if cells:
            clips[cells[1]] = cells[0]

    def names(number: int) -> tuple[str, ...]:
        name = f"vid{number}"
        published = (clips[name],) if name in clips else ()
        return tuple(
            path for own in (*published, name) for path in _names("YouTubeClips", own, ".avi")
        )

    return _xu(data, names)


def tgif_qa(data: EvalData) -> Iterator[EvalSample | InvalidEvalSample]:
    """Ids are the numbers of the rows; categories are the types. Otherwise as `msrvtt_qa`."""

    def make(identifier: str, row: JsonRecord) -> EvalSample:
        names = _names("gifs", row.text("gif_name"), ".gif")
        kind = row.text("type")
        return _sample(data, identifier, row, names, TGIF_CATEGORIES.get(kind, kind))

    path = data.file("Test_frameqa_question.csv")
    cells = read_csv(path, TGIF_COLUMNS, delimiter="\t")
    rows = (JsonRecord(row, f"{path}, row {number}") for number, row in enumerate(cells, start=1))
    return read_each(rows, numbered("tgif_qa"), make)


def video_images(
    data: EvalData, names: tuple[str, ...], segment: Segment | None = None
) -> list[Any]:
    """The frames of the first of these files or folders that exists; option `frames`.

    Raises:
        InputError: None exists or it has no frames (MISSING_IMAGE); see `sample_frames`.
    """
    video = data.find(*names)
    frames = [] if video is None else sample_frames(video, data.options["frames"], segment)
    if not frames:
        raise InputError(f"The video {names[-1]} does not exist.", ErrorCode.MISSING_IMAGE)
    return [*frames]


def _names(folder: str, name: str, suffix: str) -> tuple[str, ...]:
    return f"frames/{name}", f"{folder}/{name}", f"{folder}/{name}{suffix}"


def _xu(
    data: EvalData, names: Callable[[int], tuple[str, ...]]
) -> Iterator[EvalSample | InvalidEvalSample]:
    """The format of MSRVTT-QA and MSVD-QA."""

    def make(identifier: str, row: JsonRecord) -> EvalSample:
        first = row.text("question").partition(" ")[0].lower()
        category = first if first in QUESTION_WORDS else "other"
        return _sample(data, identifier, row, names(row.integer("video_id")), category)

    rows = json_rows(data.file("test_qa.json"))
    return read_each(rows, lambda _, row: str(row.integer("id")), make)


def _sample(
    data: EvalData, identifier: str, row: JsonRecord, names: tuple[str, ...], category: str
) -> EvalSample:
    question, answer = row.text("question"), row.text("answer")
    messages = image_message(video_images(data, names), data.ask(question))
    return EvalSample(identifier, question, messages, (answer,), category)
