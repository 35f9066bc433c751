"""Names under which the pictures of answers are found again, for whoever wants to look at them.

A picture that is a file, a URL or a frame of a video has a name. One that came within a benchmark's
file (MMBench's, in base64) has none: a small copy is kept beside the answers, in
``answers/pictures``, and named from there, so that the folder of a run can be moved.
"""

import sys
from pathlib import Path
from typing import Any

from PIL import Image

from owl2.eval.answering import Asked
from owl2.eval.video import Frame, named
from owl2.processing.chat import read_messages
from owl2.processing.sources import load_image

FOLDER = "pictures"
EDGE = 320  # pixels of a copy's longer edge


def named_pictures(asked: Asked, answers: Path) -> list[list[str]]:
    """The names of each answer's pictures, in order; copies are made of those that have none."""
    return [
        [
            _name(picture, fingerprint, answers)
            for picture, fingerprint in zip(
                read_messages(answer.question.messages).pictures, fingerprints, strict=True
            )
        ]
        for answer, fingerprints in zip(asked.answers, asked.pictures, strict=True)
    ]


def find_picture(name: str, answers: Path) -> Frame | Path | str:
    """What a name in a file of answers means."""
    copy = answers / name
    return copy if name.startswith(f"{FOLDER}/") and copy.is_file() else named(name)


def _name(picture: Any, fingerprint: str, answers: Path) -> str:
    if isinstance(picture, str):
        if not picture.startswith("data:"):
            return picture
    elif isinstance(picture, Path) or hasattr(picture, "__fspath__"):
        return str(picture)
    path = answers / FOLDER / f"{fingerprint}.jpg"
    if not path.is_file():
        path.parent.mkdir(exist_ok=True)
        # The model has seen it, so it is no bomb, whatever its size.
        copy = load_image(picture, sys.maxsize)
        copy.thumbnail((EDGE, EDGE), Image.Resampling.BICUBIC)
        copy.save(path, quality=85)
    return path.relative_to(answers).as_posix()
