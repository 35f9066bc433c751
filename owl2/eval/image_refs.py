"""Names under which the images of answers are found again, for whoever wants to look at them.

An image that is a file, a URL or a frame of a video has a name. One that came within a benchmark's
file (MMBench's, in base64) has none: a small copy is kept beside the answers, in
``answers/images``, and named from there, so that the folder of a run can be moved.
"""

import sys
from pathlib import Path
from typing import Any

from PIL import Image

from owl2.eval.generate import Asked
from owl2.eval.video import Frame, named
from owl2.processing.chat_template import parse_messages
from owl2.processing.image_io import load_image

FOLDER = "images"
EDGE = 320  # pixels of a copy's longer edge


def named_images(asked: Asked, answers: Path) -> list[list[str]]:
    """The names of each answer's images, in order; copies are made of those that have none."""
    return [
        [
            _name(image, fingerprint, answers)
            for image, fingerprint in zip(
                parse_messages(answer.question.messages).images, fingerprints, strict=True
            )
        ]
        for answer, fingerprints in zip(asked.answers, asked.images, strict=True)
    ]


def find_image(name: str, answers: Path) -> Frame | Path | str:
    """What a name in a file of answers means."""
    copy = answers / name
    return copy if name.startswith(f"{FOLDER}/") and copy.is_file() else named(name)


def _name(image: Any, fingerprint: str, answers: Path) -> str:
    if isinstance(image, str):
        if not image.startswith("data:"):
            return image
    elif isinstance(image, Path) or hasattr(image, "__fspath__"):
        return str(image)
    path = answers / FOLDER / f"{fingerprint}.jpg"
    if not path.is_file():
        path.parent.mkdir(exist_ok=True)
        # The model has seen it, so it is no bomb, whatever its size.
        copy = load_image(image, sys.maxsize)
        copy.thumbnail((EDGE, EDGE), Image.Resampling.BICUBIC)
        copy.save(path, quality=85)
    return path.relative_to(answers).as_posix()
