"""Pointing accuracy: how often the maximum of the heatmap is on the shape (easy-VQA test images).

python recipes/easy_vqa/pointing.py MODEL [COUNT]
"""

import sys

import easy_vqa
import numpy as np
from PIL import Image

from owl2 import Engine
from owl2.attention import collect_attention, heat_map
from owl2.processing.image_io import load_image

QUESTION = "what color is the shape?"


def main(model: str, count: str = "200") -> None:
    """Print the pointing accuracy with and without MAM, and that of a random point."""
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
            maps = collect_attention(engine, engine.processor, messages, use_mam=use_mam, layers=[])
            heat = heat_map(maps)
            hits[name] += shape[np.unravel_index(heat.argmax(), heat.shape)]
    for name, hit_count in hits.items():
        print(f"{name}: the maximum is on the shape in {hit_count} of {len(paths)} images")
    print(f"random point: {np.mean(areas):.1%}")


def shape_of(image: Image.Image) -> np.ndarray:
    """(H, W): whether a pixel belongs to the shape. All other pixels have the background color."""
    pixels = np.asarray(image, int)
    colors, counts = np.unique(pixels.reshape(-1, 3), axis=0, return_counts=True)
    far: np.ndarray = np.abs(pixels - colors[counts.argmax()]).sum(-1) > 40
    return far


if __name__ == "__main__":
    main(*sys.argv[1:])
