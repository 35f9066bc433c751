"""Example questions with images: three drawn shapes, or examples from a file."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from PIL import Image, ImageDraw
from pydantic import BaseModel, BeforeValidator, StringConstraints, TypeAdapter, ValidationError

from owl2.errors import ErrorCode, InputError
from owl2.files import expand_user

EDGE = 256
# Similar to the images of easy-VQA, so that the demo model can answer.
# Name, number of corners, color, background, (x, y, radius), question.
_SHAPES = (
    ("circle", 90, (30, 160, 40), (228, 240, 246), (156, 108, 44), "what shape is in the image?"),
    ("triangle", 3, (240, 25, 25), (246, 240, 226), (116, 140, 62), "what color is the shape?"),
    ("rectangle", 4, (20, 60, 220), (238, 246, 232), (104, 134, 56), "is there a blue shape?"),
)


@dataclass(frozen=True)
class Example:
    """A question about image files."""

    question: str
    images: tuple[Path, ...]


class _Row(BaseModel):
    question: Annotated[str, StringConstraints(pattern=r"\S")]
    image: Annotated[
        list[str], BeforeValidator(lambda image: [image] if isinstance(image, str) else image)
    ] = []


def draw_examples(directory: Path) -> list[Example]:
    """Draw three images into `directory`, each with a question."""
    directory.mkdir(parents=True, exist_ok=True)
    examples = []
    for name, corners, color, background, circle, question in _SHAPES:
        # Drawn at 4 times the size, for smooth edges.
        image = Image.new("RGB", (4 * EDGE, 4 * EDGE), background)
        x, y, radius = (4 * value for value in circle)
        ImageDraw.Draw(image).regular_polygon((x, y, radius), corners, fill=color)
        path = directory / f"{name}.png"
        image.resize((EDGE, EDGE), Image.Resampling.LANCZOS).save(path)
        examples.append(Example(question, (path,)))
    return examples


def read_examples(path: str | Path) -> list[Example]:
    """Read a JSON file: a list of `{"question": ..., "image": FILE or list of FILES}`.

    Relative image paths start at the directory of `path`.

    Raises:
        InputError: The file cannot be read or has another format; names the example by its index.
    """
    path = expand_user(path)
    try:
        rows = TypeAdapter(list[_Row]).validate_json(path.read_bytes())
    except OSError as error:
        code = ErrorCode.UNREADABLE_FILE if path.exists() else ErrorCode.FILE_NOT_FOUND
        raise InputError(f"Cannot read the examples {path}: {error}.", code) from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise InputError(
            f'The examples {path} must be JSON, [{{"question": TEXT, "image": FILE}}, ...]. '
            f"In {where}: {first['msg']}.",
            ErrorCode.INVALID_FORMAT,
        ) from error
    examples = [
        Example(
            row.question, tuple((path.parent / expand_user(name)).absolute() for name in row.image)
        )
        for row in rows
    ]
    missing = [file for example in examples for file in example.images if not file.is_file()]
    if missing:
        raise InputError(
            f"The examples {path} name {missing[0]}, which does not exist.",
            ErrorCode.FILE_NOT_FOUND,
        )
    return examples
