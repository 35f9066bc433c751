"""One row of every kind of badness, and good ones between; what tests of the check share."""

import json
from pathlib import Path

from PIL import Image

from owl2.processing.processor import Owl2Processor

MAX_LENGTH = 40
MAX_PIXELS = 10_000


def turns(question: object, answer: object = "red", first: str = "human") -> list[dict]:
    return [{"from": first, "value": question}, {"from": "gpt", "value": answer}]


def row(question: object, picture: object = None, answer: object = "red", **more: object) -> dict:
    made = {"conversations": turns(question, answer)}
    return (made if picture is None else made | {"image": picture}) | more


LONG = "what color is the circle? " * 10
# What the rows are, and the fault that the check is to find; None: a good row.
ROWS: list[tuple[object, str | None]] = [
    (row("<image>what color?", "good.png"), None),
    (row("<image>what color?", "gone.png"), "missing picture"),
    (row("<image>what color?", "cut.png"), "broken picture"),
    (row("<image>what color?", "words.png"), "broken picture"),
    (row("<image>what color?", "bomb.png"), "huge picture"),
    (row("what color?", "good.png"), "placeholder count"),
    (row("<image> or <image>?", "good.png"), "placeholder count"),
    (row("what?", "good.png", answer="<image>red"), "placeholder count"),
    ({"conversations": turns("a", first="gpt")}, "roles"),
    ({"conversations": turns("a")[:1]}, "roles"),
    ({"conversations": turns("a", first="robot")}, "roles"),
    (row("what color?", answer=" "), "empty turn"),
    (row("what color?", answer=3), "not a string"),
    (row(LONG + "<image>" + LONG + "<image>", ["good.png"] * 2), "too long"),
    (row(LONG), "nothing to learn"),
    (row("what color?", answer="red " * 60), None),  # cut
    ("no object", "format"),
    (row("<image>what color?", "good.png"), None),  # the first one again
]
BAD = {f"row {number}": fault for number, (_, fault) in enumerate(ROWS, start=1) if fault}


def write_talks(folder: Path) -> Path:
    """A file of `ROWS`, and beside it their pictures."""
    Image.effect_noise((30, 20), 50).save(folder / "good.png")
    whole = (folder / "good.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "words.png").write_text("no picture")
    Image.new("1", (300, 300)).save(folder / "bomb.png")
    path = folder / "talks.json"
    path.write_text(json.dumps([made for made, _ in ROWS]), encoding="utf-8")
    return path


def save_checkpoint(folder: Path, processor: Owl2Processor) -> Path:
    """A checkpoint's processor that takes no larger pictures than `MAX_PIXELS`."""
    directory = folder / "model"
    directory.mkdir()
    processor.image_processor = processor.image_processor.changed(None, MAX_PIXELS)
    processor.save_pretrained(directory)
    return directory
