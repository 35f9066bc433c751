"""Does the heat map's highest point lie on the shape? On easy-VQA's test pictures, which have one.

python recipes/easy_vqa/pointing.py MODEL [COUNT]
"""

import sys

import easy_vqa
import numpy as np
from PIL import Image

from owl2 import Engine
from owl2.processing.image import load_image
from owl2.study import heat_map, look

QUESTION = "what color is the shape?"


def main(model: str, count: str = "200") -> None:
    """Prints how often it does, and how often a point taken at random would."""
    engine = Engine.from_pretrained(model, dtype="float32")
    hits = {"with MAM": 0, "without MAM": 0}
    areas = []
    paths = list(easy_vqa.get_test_image_paths().values())[: int(count)]
    for path in paths:
        picture = load_image(path)
        shape = shape_of(picture)
        areas.append(shape.mean())
        question = {"type": "text", "text": QUESTION}
        messages = [{"role": "user", "content": [{"type": "image", "image": picture}, question]}]
        for name, use_mam in (("with MAM", True), ("without MAM", False)):
            heat = heat_map(look(engine, engine.processor, messages, use_mam=use_mam, layers=[]))
            hits[name] += shape[np.unravel_index(heat.argmax(), heat.shape)]
    for name, number in hits.items():
        print(f"{name}: the highest point is on the shape in {number} of {len(paths)} pictures")
    print(f"a point at random: in {np.mean(areas):.1%}")


def shape_of(picture: Image.Image) -> np.ndarray:
    """(H, W), whether a pixel is the shape's: all else has the background's colour."""
    pixels = np.asarray(picture, int)
    colours, counts = np.unique(pixels.reshape(-1, 3), axis=0, return_counts=True)
    far: np.ndarray = np.abs(pixels - colours[counts.argmax()]).sum(-1) > 40
    return far


if __name__ == "__main__":
    main(*sys.argv[1:])
