"""Does the heat map's highest point lie on the shape? On easy-VQA's test images, which have one.

python recipes/easy_vqa/pointing.py MODEL [COUNT]
"""

import sys

import easy_vqa
import numpy as np
from PIL import Image

from owl2 import Engine
from owl2.attention import heat_map, look
from owl2.processing.image_io import load_image

QUESTION = "what color is the shape?"


def main(model: str, count: str = "200") -> None:
    """Prints how often it does, and how often a point taken at random would."""
    engine = Engine.from_pretrained(model, dtype="float32")
    hits = {"with MAM": 0, "without MAM": 0}
    areas = []
    paths = list(easy_vqa.get_test_image_paths().values())[: int(count)]
    for path in paths:
        image = load_image(path)
        shape = shape_of(image)
        areas.append(shape.mean())
        question = {"type": "text", "text": QUESTION}
        messages = [{"role": "user", "content": [{"type": "image", "image": image}, question]}]
        for name, use_mam in (("with MAM", True), ("without MAM", False)):
            heat = heat_map(look(engine, engine.processor, messages, use_mam=use_mam, layers=[]))
            hits[name] += shape[np.unravel_index(heat.argmax(), heat.shape)]
    for name, number in hits.items():
        print(f"{name}: the highest point is on the shape in {number} of {len(paths)} images")
    print(f"a point at random: in {np.mean(areas):.1%}")


def shape_of(image: Image.Image) -> np.ndarray:
    """(H, W), whether a pixel is the shape's: all else has the background's colour."""
    pixels = np.asarray(image, int)
    colours, counts = np.unique(pixels.reshape(-1, 3), axis=0, return_counts=True)
    far: np.ndarray = np.abs(pixels - colours[counts.argmax()]).sum(-1) > 40
    return far


if __name__ == "__main__":
    main(*sys.argv[1:])
