"""Distorts photos with known strengths: the data of this recipe.

    pip install scikit-image scikit-learn
    python recipes/scoring/distortions/data.py DIR [COUNT]

    DIR/images/SPLIT/*.png    crops of 64 x 64 pixels
    DIR/mos.csv               a row per image: its score from 0 to 100, the standard deviation, the
                              split, the photo, and the distortion

The splits have different photos: `train`, `validation` for the choice of settings, and `test`.
COUNT (24000) is the number of training images; the other splits have 400 images at most. The score
of an image is 100 * (1 - strength), and its deviation is largest in the middle of the range, as
that of people is.
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
# A crop is distorted with its surroundings: no distortion reaches farther. A multiple of the blocks
# of JPEG.
MARGIN = 16
SKIMAGE, SKLEARN = ("skimage", "data"), ("sklearn", "datasets/images")
TRAIN = (
    *("astronaut.png", "brick.png", "chelsea.png", "coins.png", "grass.png"),
    *("hubble_deep_field.jpg", "ihc.png", "moon.png", "motorcycle_left.png", "retina.jpg"),
)
VALIDATION = ("camera.png", "coffee.png", "gravel.png", "rocket.jpg")
PHOTOS = {
    "train": dict.fromkeys(TRAIN, SKIMAGE),
    "validation": dict.fromkeys(VALIDATION, SKIMAGE),
    "test": dict.fromkeys(("china.jpg", "flower.jpg"), SKLEARN),
}
# The edges of photos are divided by numbers in this range, so that each crop is sharp and has more
# content. Scores should not depend on it.
REDUCTIONS = {"train": (1.6, 3.0), "validation": (2, 2), "test": (2, 2)}
MAX_HELD_OUT = 400
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


def read_photo(name: str, source: tuple[str, str]) -> Image.Image:
    """A photo that a package contains."""
    package = find_spec(source[0])
    if package is None or package.origin is None:
        sys.exit("The photos are part of packages: pip install scikit-image scikit-learn")
    return Image.open(Path(package.origin).parent / source[1] / name).convert("RGB")


def random_region(photo: Image.Image, reduction: float, rng: Random) -> Image.Image:
    """A part of a photo, reduced: a crop with enough contrast, and its surroundings."""
    edge = EDGE + 2 * MARGIN
    while True:
        x, y = (rng.uniform(0, size - edge * reduction) for size in photo.size)
        box = (x, y, x + edge * reduction, y + edge * reduction)
        region = photo.resize((edge, edge), Image.LANCZOS, box)
        if np.asarray(central_crop(region).convert("L"), float).std() >= MIN_CONTRAST:
            return region


def central_crop(region: Image.Image) -> Image.Image:
    """The crop without its surroundings."""
    return region.crop((MARGIN, MARGIN, MARGIN + EDGE, MARGIN + EDGE))


def change_look(region: Image.Image, rng: Random) -> Image.Image:
    """A training image with other colors, exposure and contrast: as if there were more photos."""
    pixels = np.asarray(region, float) / 255  # (H, W, 3)
    gray = pixels.mean(2, keepdims=True)
    pixels = gray + (pixels - gray) * rng.uniform(0, 1.5)
    pixels = pixels[..., rng.sample(range(3), 3)]
    pixels = pixels.clip(0, 1) ** 2 ** rng.uniform(-1, 1)
    low, high = np.percentile(pixels, (1, 99))
    contrast = rng.uniform(0.3, 1) / max(high - low, 0.1)
    pixels = (pixels - low) * contrast + rng.uniform(0, 1 - min(1, contrast * (high - low)))
    if rng.random() < 0.5:
        pixels = 1 - pixels
    return Image.fromarray((pixels.clip(0, 1) * 255).round().astype(np.uint8))


def main(folder: Path, count: int) -> None:
    """Write the images and the table to `folder`."""
    rng = Random(0)
    rows = []
    held_out = min(count // 10, MAX_HELD_OUT)
    for split, named in PHOTOS.items():
        photos = {name: read_photo(name, source) for name, source in named.items()}
        (folder / "images" / split).mkdir(parents=True, exist_ok=True)
        for number in range(count if split == "train" else held_out):
            name = list(photos)[number % len(photos)]
            distortion = DISTORTIONS[number // len(photos) % len(DISTORTIONS)]
            strength = rng.random()
            region = random_region(photos[name], rng.uniform(*REDUCTIONS[split]), rng)
            if split == "train":
                region = change_look(region, rng)
            path = f"images/{split}/{number:05}.png"
            central_crop(distortion(region, strength, rng)).save(folder / path)
            row = {"image": path, "mos": round(100 * (1 - strength), 3)}
            row |= {"std": round(5 + 40 * strength * (1 - strength), 3), "split": split}
            rows.append(row | {"photo": name, "distortion": distortion.__name__})
    with (folder / "mos.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    print(f"{count} images for training, and {held_out} each of other photos, in {folder}")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) == 3 else 24000)
