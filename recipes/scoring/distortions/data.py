"""Distorts scikit-image's photos with known strengths: the data of this recipe.

    pip install scikit-image
    python recipes/scoring/distortions/data.py DIR [COUNT]

    DIR/images/train/*.png, test/*.png    crops of 64 x 64 pixels; the photos of the test are others
    DIR/mos.csv                           a row per image: its score from 0 to 100, the standard
                                          deviation, the split, the photo, and the distortion

COUNT (12000) is the number of training images; there are 400 test images at most. The score of an
image is 100 * (1 - strength), and its deviation is largest in the middle of the range, as that
of people is.
"""

import csv
import sys
from collections.abc import Callable
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image, ImageFilter

EDGE = 64
# Crops start at multiples of the blocks of JPEG.
BLOCK = 8
PHOTOS = {
    "train": (
        *("astronaut.png", "brick.png", "chelsea.png", "coins.png", "grass.png"),
        *("hubble_deep_field.jpg", "ihc.png", "moon.png", "motorcycle_left.png", "retina.jpg"),
    ),
    "test": ("camera.png", "coffee.png", "gravel.png", "rocket.jpg"),
}
# Photos are reduced, so that each crop is sharp and has more content. The scores should not depend
# on the reduction.
REDUCTIONS = {"train": (2, 3), "test": (2,)}
MAX_TEST_IMAGES = 400
# Crops with less contrast show no distortion but noise.
MIN_CONTRAST = 12


def jpeg(image: Image.Image, strength: float, rng: Random) -> Image.Image:
    """JPEG compression with a quality from 90 to 3."""
    file = BytesIO()
    image.save(file, "JPEG", quality=round(_between(90, 3, strength)))
    return Image.open(file).convert("RGB")


def blur(image: Image.Image, strength: float, rng: Random) -> Image.Image:
    """Gaussian blur with a radius from 0.3 to 4 pixels."""
    return image.filter(ImageFilter.GaussianBlur(_between(0.3, 4, strength)))


def noise(image: Image.Image, strength: float, rng: Random) -> Image.Image:
    """Gaussian noise with a standard deviation from 2 to 80 of 255."""
    generator = np.random.default_rng(rng.getrandbits(32))
    pixels = np.asarray(image, float)
    noisy = pixels + generator.normal(0, _between(2, 80, strength), pixels.shape)
    return Image.fromarray(noisy.round().clip(0, 255).astype(np.uint8))


def downscale(image: Image.Image, strength: float, rng: Random) -> Image.Image:
    """Reduction by a factor from 1.1 to 8, and enlargement to the size before."""
    factor = _between(1.1, 8, strength)
    small = image.resize([max(1, round(edge / factor)) for edge in image.size], Image.BICUBIC)
    return small.resize(image.size, Image.BICUBIC)


DISTORTIONS: tuple[Callable[..., Image.Image], ...] = (jpeg, blur, noise, downscale)


def _between(weakest: float, strongest: float, strength: float) -> float:
    """On a logarithmic scale."""
    return weakest * (strongest / weakest) ** strength


def read_photo(name: str, reduction: int) -> Image.Image:
    """A photo with its edges divided by `reduction`."""
    package = find_spec("skimage")
    if package is None or package.origin is None:
        sys.exit("The photos are part of scikit-image: pip install scikit-image")
    image = Image.open(Path(package.origin).parent / "data" / name).convert("RGB")
    return image.resize([edge // reduction for edge in image.size], Image.LANCZOS)


def random_crop(photo: Image.Image, rng: Random) -> tuple[int, int, int, int]:
    """The box of a crop with enough contrast."""
    while True:
        x, y = (rng.randrange(0, edge - EDGE + 1, BLOCK) for edge in photo.size)
        box = (x, y, x + EDGE, y + EDGE)
        if np.asarray(photo.crop(box).convert("L"), float).std() >= MIN_CONTRAST:
            return box


def main(folder: Path, count: int) -> None:
    """Write the images and the table to `folder`."""
    rng = Random(0)
    rows = []
    for split, total in {"train": count, "test": min(count // 10, MAX_TEST_IMAGES)}.items():
        photos = {
            name: [read_photo(name, reduction) for reduction in REDUCTIONS[split]]
            for name in PHOTOS[split]
        }
        (folder / "images" / split).mkdir(parents=True, exist_ok=True)
        for number in range(total):
            name = PHOTOS[split][number % len(PHOTOS[split])]
            distortion = DISTORTIONS[number // len(PHOTOS[split]) % len(DISTORTIONS)]
            strength = rng.random()
            photo = rng.choice(photos[name])
            box = random_crop(photo, rng)
            path = f"images/{split}/{number:05}.png"
            distortion(photo, strength, rng).crop(box).save(folder / path)
            row = {"image": path, "mos": round(100 * (1 - strength), 3)}
            row |= {"std": round(5 + 40 * strength * (1 - strength), 3), "split": split}
            rows.append(row | {"photo": name, "distortion": distortion.__name__})
    with (folder / "mos.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    print(
        f"{count} images of {len(PHOTOS['train'])} photos for training, {len(rows) - count} of "
        f"{len(PHOTOS['test'])} other photos for the test, in {folder}"
    )


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) == 3 else 12000)
