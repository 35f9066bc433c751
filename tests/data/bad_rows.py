"""Rows with every kind of error and valid rows, for the tests of `owl2 data check`."""

import json
from pathlib import Path

from PIL import Image

from owl2.errors import ErrorCode
from owl2.processing.processor import Owl2Processor

MAX_LENGTH = 40
MAX_PIXELS = 10_000


def turns(question: object, answer: object = "red", first: str = "human") -> list[dict]:
    return [{"from": first, "value": question}, {"from": "gpt", "value": answer}]


def row(question: object, image: object = None, answer: object = "red", **more: object) -> dict:
    record = {"conversations": turns(question, answer)}
    return (record if image is None else record | {"image": image}) | more


LONG = "what color is the circle? " * 10
# What the rows are, and the code that the check is to find; None: a good row.
ROWS: list[tuple[object, str | None]] = [
    (row("<image>what color?", "good.png"), None),
    (row("<image>what color?", "gone.png"), ErrorCode.MISSING_IMAGE),
    (row("<image>what color?", "cut.png"), ErrorCode.BROKEN_IMAGE),
    (row("<image>what color?", "words.png"), ErrorCode.BROKEN_IMAGE),
    (row("<image>what color?", "bomb.png"), ErrorCode.IMAGE_TOO_LARGE),
    (row("what color?", "good.png"), ErrorCode.IMAGE_COUNT_MISMATCH),
    (row("<image> or <image>?", "good.png"), ErrorCode.IMAGE_COUNT_MISMATCH),
    (row("what?", "good.png", answer="<image>red"), ErrorCode.IMAGE_COUNT_MISMATCH),
    ({"conversations": turns("a", first="gpt")}, ErrorCode.INVALID_ROLE),
    ({"conversations": turns("a")[:1]}, ErrorCode.INVALID_ROLE),
    ({"conversations": turns("a", first="robot")}, ErrorCode.INVALID_ROLE),
    (row("what color?", answer=" "), ErrorCode.EMPTY_MESSAGE),
    (row("what color?", answer=3), ErrorCode.INVALID_TYPE),
    (row(LONG + "<image>" + LONG + "<image>", ["good.png"] * 2), ErrorCode.TOO_LONG),
    (row(LONG), ErrorCode.NO_LABELS),
    (row("what color?", answer="red " * 60), None),  # cut
    ("no object", ErrorCode.INVALID_FORMAT),
    (row("<image>what color?", "good.png"), None),  # the first one again
]
BAD = {f"row {number}": code for number, (_, code) in enumerate(ROWS, start=1) if code}


def write_rows(folder: Path) -> Path:
    """A file of `ROWS`, and their images in the same directory."""
    Image.effect_noise((30, 20), 50).save(folder / "good.png")
    data = (folder / "good.png").read_bytes()
    (folder / "cut.png").write_bytes(data[: len(data) // 2])
    (folder / "words.png").write_text("no image")
    Image.new("1", (300, 300)).save(folder / "bomb.png")
    path = folder / "chat.json"
    path.write_text(json.dumps([record for record, _ in ROWS]), encoding="utf-8")
    return path


def save_checkpoint(folder: Path, processor: Owl2Processor) -> Path:
    """A checkpoint whose processor refuses images larger than `MAX_PIXELS`."""
    directory = folder / "model"
    directory.mkdir()
    processor.image_processor = processor.image_processor.replace(max_pixels=MAX_PIXELS)
    processor.save_pretrained(directory)
    return directory
