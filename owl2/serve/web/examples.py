"""Images and questions to begin with: drawn, or one's own from a file."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from owl2.errors import InputError

EDGE = 256
# What easy-VQA's images are like, so that a model of the demo can answer, too.
_DRAWN = (
    ("circle", (30, 160, 40), (228, 240, 246), (156, 108, 44), "what shape is in the image?"),
    ("triangle", (240, 25, 25), (246, 240, 226), (116, 140, 54), "what color is the shape?"),
    ("rectangle", (20, 60, 220), (238, 246, 232), (104, 134, 56), "is there a blue shape?"),
)


@dataclass(frozen=True)
class Example:
    """A question about images, which are files."""

    question: str
    images: tuple[Path, ...]


def drawn(folder: Path) -> list[Example]:
    """Three plain images, written into `folder`, each with a question."""
    folder.mkdir(parents=True, exist_ok=True)
    examples = []
    for shape, colour, ground, (x, y, radius), question in _DRAWN:
        path = folder / f"{shape}.png"
        _draw(shape, colour, ground, (x, y, radius)).save(path)
        examples.append(Example(question, (path,)))
    return examples


def read_examples(path: str | Path) -> list[Example]:
    """Those in a JSON file: a list of `{"question": ..., "image": FILE or list of them}`.

    Files are found from the folder of `path`.

    Raises:
        InputError: it cannot be read, or is none of that; names the example.
    """
    path = Path(path)
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"The examples {path} cannot be read: {error}.") from error
    if not isinstance(rows, list):
        raise InputError(f"{path} must hold a list of examples.")
    return [
        _example(row, f"{path}, example {number}", path.parent)
        for number, row in enumerate(rows, 1)
    ]


def _example(row: Any, where: str, folder: Path) -> Example:
    question = row.get("question") if isinstance(row, dict) else None
    if not isinstance(question, str) or not question.strip():
        raise InputError(f'{where} must be {{"question": TEXT, "image": FILE}}.')
    images = row.get("image", [])
    names = [images] if isinstance(images, str) else images
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(f"{where}: 'image' must be a file or a list of files.")
    files = tuple((folder / name).absolute() for name in names)
    for file in files:
        if not file.is_file():
            raise InputError(f"{where}: there is no image at {file}.")
    return Example(question, files)


def _draw(
    shape: str, colour: tuple[int, int, int], ground: tuple[int, int, int], place: tuple[int, ...]
) -> Image.Image:
    """One shape; drawn four times as large first, for smooth edges."""
    x, y, radius = (4 * value for value in place)
    image = Image.new("RGB", (4 * EDGE, 4 * EDGE), ground)
    pen = ImageDraw.Draw(image)
    if shape == "circle":
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
    elif shape == "triangle":
        corners = [(x, y - radius), (x + radius, y + radius), (x - radius, y + radius)]
        pen.polygon(corners, fill=colour)
    else:
        pen.rectangle((x - radius, y - radius // 2, x + radius, y + radius // 2), fill=colour)
    return image.resize((EDGE, EDGE), Image.Resampling.LANCZOS)
