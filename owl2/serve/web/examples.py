"""Example questions with images: three drawn shapes, or examples from a file."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from owl2.errors import ErrorCode, InputError

EDGE = 256
# Similar to the images of easy-VQA, so that the demo model can answer.
# Shape, color, background, (x, y, radius), question.
_SHAPES = (
    ("circle", (30, 160, 40), (228, 240, 246), (156, 108, 44), "what shape is in the image?"),
    ("triangle", (240, 25, 25), (246, 240, 226), (116, 140, 54), "what color is the shape?"),
    ("rectangle", (20, 60, 220), (238, 246, 232), (104, 134, 56), "is there a blue shape?"),
)


@dataclass(frozen=True)
class Example:
    """A question about image files."""

    question: str
    images: tuple[Path, ...]


def draw_examples(directory: Path) -> list[Example]:
    """Draw three images into `directory`, each with a question."""
    directory.mkdir(parents=True, exist_ok=True)
    examples = []
    for shape, color, background, circle, question in _SHAPES:
        x, y, radius = (4 * value for value in circle)  # drawn at 4 times the size for smooth edges
        image = Image.new("RGB", (4 * EDGE, 4 * EDGE), background)
        draw = ImageDraw.Draw(image)
        if shape == "circle":
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=color)
        elif shape == "triangle":
            corners = [(x, y - radius), (x + radius, y + radius), (x - radius, y + radius)]
            draw.polygon(corners, fill=color)
        else:
            draw.rectangle((x - radius, y - radius // 2, x + radius, y + radius // 2), fill=color)
        path = directory / f"{shape}.png"
        image.resize((EDGE, EDGE), Image.Resampling.LANCZOS).save(path)
        examples.append(Example(question, (path,)))
    return examples


def read_examples(path: str | Path) -> list[Example]:
    """Read a JSON file: a list of `{"question": ..., "image": FILE or list of FILES}`.

    Relative image paths start at the directory of `path`.

    Raises:
        InputError: The file cannot be read or has another format; names the example.
    """
    path = Path(path)
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        code = ErrorCode.UNREADABLE_FILE if path.exists() else ErrorCode.FILE_NOT_FOUND
        raise InputError(f"Cannot read the examples {path}: {error}.", code) from error
    except ValueError as error:
        raise InputError(
            f"The examples {path} are not valid JSON: {error}.", ErrorCode.INVALID_FORMAT
        ) from error
    if not isinstance(rows, list):
        raise InputError(f"{path} must contain a list of examples.", ErrorCode.INVALID_FORMAT)
    return [
        _parse_example(row, f"{path}, example {number}", path.parent)
        for number, row in enumerate(rows, 1)
    ]


def _parse_example(row: Any, where: str, directory: Path) -> Example:
    question = row.get("question") if isinstance(row, dict) else None
    if not isinstance(question, str) or not question.strip():
        raise InputError(
            f'{where}: expected {{"question": TEXT, "image": FILE}}.', ErrorCode.INVALID_FORMAT
        )
    images = row.get("image", [])
    names = [images] if isinstance(images, str) else images
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(
            f"{where}: 'image' must be a file or a list of files.", ErrorCode.INVALID_TYPE
        )
    files = tuple((directory / name).absolute() for name in names)
    for file in files:
        if not file.is_file():
            raise InputError(f"{where}: {file} does not exist.", ErrorCode.FILE_NOT_FOUND)
    return Example(question, files)
