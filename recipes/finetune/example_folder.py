"""Creates an example dataset for fine-tuning: images, and questions about them in LLaVA's format.

    python recipes/finetune/example_folder.py DIR

    DIR/images/*.png        images of one shape each, small or large
    DIR/train.json          400 of them with a question and its answer
    DIR/held_out.json       100 other ones

The training data of the demo has no questions about sizes, so its model cannot answer them yet.
"""

import json
import sys
from pathlib import Path
from random import Random

from PIL import Image, ImageDraw

QUESTION = "is the shape small or large?"
SPLITS = {"train": 400, "held_out": 100}
RADII = {"small": (6, 11), "large": (20, 26)}
COLORS = ("red", "blue", "green", "yellow", "teal", "gray", "brown", "black")
EDGE = 64


def draw(rng: Random) -> tuple[Image.Image, str]:
    """An image with one shape, and the size of the shape: small or large."""
    size = rng.choice(list(RADII))
    radius = rng.randint(*RADII[size])
    x, y = (rng.randint(radius, EDGE - 1 - radius) for _ in range(2))
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
    shapes[rng.choice(list(shapes))](box, fill=rng.choice(COLORS))
    return image, size


def main(folder: Path) -> None:
    """Write both splits to `folder`."""
    rng = Random(0)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for split, count in SPLITS.items():
        rows = []
        for number in range(count):
            image, size = draw(rng)
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
