"""Questions on videos: MSRVTT-QA, MSVD-QA (Xu et al., 2017) and TGIF-QA's FrameQA (1704.04497).

A video is a file as published, or a folder with its frames of the same name without ending, in the
same place or in ``frames/``. Folders come first, as they need no decoder.
"""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from owl2.errors import InputError
from owl2.eval.readers import Source, each
from owl2.eval.samples import Broken, Question
from owl2.eval.video import Segment, frames_of
from owl2.json_records import JsonRecord, json_rows

ASKED_BY = ("what", "who", "how", "when", "where")  # the kinds of MSRVTT-QA and MSVD-QA
TGIF_KINDS = {"0": "object", "1": "number", "2": "colour", "3": "location"}
TGIF_COLUMNS = ("gif_name", "question", "answer", "type")


def msrvtt_qa(source: Source) -> Iterator[Question | Broken]:
    """Ids are the published ones; kinds are the questions' first words. Option `frames`: how many.

    Raises:
        MissingData: no test_qa.json.
        InputError: it is not as published; a video cannot be decoded here at all.
    """

    def make(_: int, row: JsonRecord) -> Question | Broken:
        name = f"video{row.integer('video_id')}"
        video = _find(source, "TestVideo", name, ".mp4")
        identity, words = str(row.integer("id")), row.text("question")
        return _question(source, identity, words, row.text("answer"), video, name)

    return each(json_rows(source.file("test_qa.json")), make)


def msvd_qa(source: Source) -> Iterator[Question | Broken]:
    """As `msrvtt_qa`; ``youtube_mapping.txt`` says which file a video's number means."""
    clips = _clips(source.file("youtube_mapping.txt"))

    def make(_: int, row: JsonRecord) -> Question | Broken:
        name = f"vid{row.integer('video_id')}"
        video = _find(source, "YouTubeClips", name, ".avi")
        if video is None and name in clips:
            video = _find(source, "YouTubeClips", clips[name], ".avi")
        identity, words = str(row.integer("id")), row.text("question")
        missing = clips.get(name, name)
        return _question(source, identity, words, row.text("answer"), video, missing)

    return each(json_rows(source.file("test_qa.json")), make)


def tgif_qa(source: Source) -> Iterator[Question | Broken]:
    """Ids count the rows from 1; kinds are what is asked for. Otherwise as `msrvtt_qa`."""
    path = source.file("Test_frameqa_question.csv")
    for number, row in enumerate(_tabbed(path), start=1):
        name = row["gif_name"].strip()
        video = _find(source, "gifs", name, ".gif")
        kind = TGIF_KINDS.get(row["type"].strip(), row["type"].strip())
        words, answer = row["question"].strip(), row["answer"].strip()
        yield _question(source, f"tgif_qa#{number}", words, answer, video, name, kind)


def with_video(
    video: Path | None, frames: int, words: str, segment: Segment | None = None
) -> list[dict[str, Any]] | None:
    """A user's turn: so many frames of the video, then the words; None where there are no frames.

    Raises:
        InputError: see `frames_of`.
    """
    found = [] if video is None else frames_of(video, frames, segment)
    if not found:
        return None
    parts: list[dict[str, Any]] = [
        {"type": "image", "path": str(frame)}
        if isinstance(frame, Path)
        else {"type": "image", "image": frame}
        for frame in found
    ]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": words}]}]


def _find(source: Source, place: str, name: str, suffix: str) -> Path | None:
    return source.image(f"frames/{name}", f"{place}/{name}", f"{place}/{name}{suffix}")


def _question(
    source: Source,
    identity: str,
    words: str,
    answer: str,
    video: Path | None,
    name: str,
    kind: str | None = None,
) -> Question | Broken:
    messages = with_video(video, source.options["frames"], source.ask(words))
    if messages is None:
        return Broken(identity, f"the video {name} is not there, nor a folder with its frames")
    if kind is None:
        first = words.split(maxsplit=1)[0].lower() if words else ""
        kind = first if first in ASKED_BY else "other"
    return Question(identity, words, messages, (answer,), kind)


def _clips(path: Path) -> dict[str, str]:
    """The names of MSVD's files by the names that the questions use: vid1 → -4wsuPCjDBc_5_15."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}.") from error
    clips = {}
    for number, line in enumerate(lines, start=1):
        words = line.split()
        if words and len(words) != 2:
            raise InputError(f"{path}, line {number}: {line!r:.80} is not a file and its number.")
        if words:
            clips[words[1]] = words[0]
    return clips


def _tabbed(path: Path) -> Iterator[dict[str, str]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter="\t", restval="")
            missing = [name for name in TGIF_COLUMNS if name not in (reader.fieldnames or ())]
            if missing:
                raise InputError(f"{path} has no column {', '.join(missing)} (tabs between them).")
            yield from reader
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
