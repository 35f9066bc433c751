from collections import Counter
from random import Random

import pytest
from PIL import Image

from owl2.data.augment import ASPECT_RATIOS, AUGMENTATIONS, CROP_ATTEMPTS, MIN_AREA, random_crop_box


@pytest.fixture
def square() -> Image.Image:
    image = Image.new("RGB", (6, 6))
    image.putdata([(x * 40, y * 40, x * y) for y in range(6) for x in range(6)])
    return image


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_augmentation_depends_on_the_generator_only(square, name):
    before = square.tobytes()
    change = AUGMENTATIONS[name]
    results = [change(square, Random(seed)).tobytes() for seed in (1, 1)]
    assert results[0] == results[1]
    assert square.tobytes() == before
    different = {change(square, Random(seed)).tobytes() for seed in range(50)}
    expected = {"none": range(1, 2), "flip": range(2, 3), "dihedral": range(8, 9)}
    assert len(different) in expected.get(name, range(6, 51))


def test_flip_mirrors_half_of_the_images(square):
    mirrored = square.transpose(Image.Transpose.FLIP_LEFT_RIGHT).tobytes()
    seen = [AUGMENTATIONS["flip"](square, Random(seed)).tobytes() for seed in range(400)]
    assert set(seen) == {mirrored, square.tobytes()}
    assert 150 < seen.count(mirrored) < 250


def test_dihedral_is_the_eight_symmetries_evenly(square):
    seen = Counter(AUGMENTATIONS["dihedral"](square, Random(seed)).tobytes() for seed in range(800))
    quarter = [square.rotate(90 * turns) for turns in range(4)]
    mirrored = [image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for image in quarter]
    assert set(seen) == {image.tobytes() for image in quarter + mirrored}
    assert min(seen.values()) > 60


def test_dihedral_of_a_wide_image(image):
    wide = Image.open(image)
    sizes = {AUGMENTATIONS["dihedral"](wide, Random(seed)).size for seed in range(50)}
    assert sizes == {(12, 8), (8, 12)}


def test_crop_flip_returns_squares():
    gray = Image.linear_gradient("L").rotate(90).convert("RGB").resize((200, 100))
    flipped = 0
    for seed in range(400):
        part = AUGMENTATIONS["crop_flip"](gray, Random(seed))
        assert part.width == part.height
        flipped += part.getpixel((0, 0)) > part.getpixel((part.width - 1, 0))
    assert 150 < flipped < 250


def test_crops_are_within_the_bounds():
    rng = Random(0)
    shares = []
    for _ in range(2000):
        left, top, width, height = random_crop_box(300, 200, rng)
        assert 0 <= left <= 300 - width
        assert 0 <= top <= 200 - height
        if (width, height) != (300, 200):
            assert ASPECT_RATIOS[0] - 0.01 < width / height < ASPECT_RATIOS[1] + 0.01
            shares.append(width * height / 60_000)
    assert MIN_AREA - 0.01 < min(shares) < 0.52
    assert max(shares) > 0.85


def test_an_image_too_narrow_for_any_crop_is_not_cropped():
    assert CROP_ATTEMPTS > 0
    assert random_crop_box(1000, 1, Random(0)) == (0, 0, 1000, 1)


def test_a_single_pixel_is_not_changed(square):
    dot = square.crop((2, 2, 3, 3))
    for change in AUGMENTATIONS.values():
        assert change(dot, Random(0)).tobytes() == dot.tobytes()
