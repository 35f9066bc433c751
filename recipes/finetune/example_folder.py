"""Draws a folder as somebody's own data could be: images, and questions about them as JSON.

    python recipes/finetune/example_folder.py FOLDER

    FOLDER/images/*.png     one shape each, small or large
    FOLDER/train.json         400 of them with a question and its answer, in LLaVA's format
    FOLDER/held_out.json      100 others

Nothing asks for sizes in what the demo's model was trained on, so it has something to learn.
"""

import json
import sys
from pathlib import Path
from random import Random

from PIL import Image, ImageDraw

QUESTION = "is the shape small or large?"
SPLITS = {"train": 400, "held_out": 100}
RADII = {"small": (6, 11), "large": (20, 26)}
COLOURS = ("red", "blue", "green", "yellow", "teal", "gray", "brown", "black")
EDGE = 64


def draw(chance: Random) -> tuple[Image.Image, str]:
    """An image with one shape, and whether that is small or large."""
    size = chance.choice(list(RADII))
    radius = chance.randint(*RADII[size])
    x, y = (chance.randint(radius, EDGE - 1 - radius) for _ in range(2))
    box = (x - radius, y - radius, x + radius, y + radius)
    image = Image.new("RGB", (EDGE, EDGE), "white")
    pen = ImageDraw.Draw(image)
    shapes = {
        "circle": pen.ellipse,
        "rectangle": pen.rectangle,
        "triangle": lambda box, fill: pen.polygon(
            [(x, box[1]), (box[0], box[3]), (box[2], box[3])], fill
        ),
    }
    shapes[chance.choice(list(shapes))](box, fill=chance.choice(COLOURS))
    return image, size


def main(folder: Path) -> None:
    """Draw both splits into `folder`."""
    chance = Random(0)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for split, count in SPLITS.items():
        rows = []
        for number in range(count):
            image, size = draw(chance)
            name = f"images/{split}_{number}.png"
            image.save(folder / name)
            turns = [
                {"from": "human", "value": f"<image>\n{QUESTION}"},
                {"from": "gpt", "value": size},
            ]
            rows.append({"image": name, "conversations": turns})
        (folder / f"{split}.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    print(f"{', '.join(f'{count} to {split}' for split, count in SPLITS.items())}, in {folder}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
