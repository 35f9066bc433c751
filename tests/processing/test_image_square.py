"""Squares of images: the pixels of the complete square, with less memory; limits on the cost."""

import io

import numpy as np
import pytest
from PIL import Image

from owl2.errors import ErrorCode
from owl2.processing import image_square
from owl2.processing.image_io import image_cost, load_image
from owl2.processing.image_square import to_square
from tests.errors import raises_input_error

MEAN = (0.48145466, 0.4578275, 0.40821073)
SIZES = [(1, 70), (70, 1), (3, 2), (30, 47), (47, 30), (9, 24), (24, 9), (333, 100), (100, 333)]


def resized_square(image, edge, policy, mean, resample):
    """The square of the longer edge, which is then resized."""
    longer = max(image.size)
    if policy == "resize":
        square = image.resize((longer, longer), resample)
    else:
        square = Image.new(image.mode, (longer, longer), tuple(int(value * 255) for value in mean))
        square.paste(image, ((longer - image.width) // 2, (longer - image.height) // 2))
    return square.resize((edge, edge), resample)


def noise(size, mode="RGB"):
    width, height = size
    values = np.random.default_rng(0).integers(0, 256, (height, width, 4), dtype=np.uint8)
    return Image.fromarray(values, "RGBA").convert(mode)


@pytest.mark.parametrize("pixels", [50, 2000, 2**24])
@pytest.mark.parametrize("policy", ["resize", "pad"])
@pytest.mark.parametrize("resample", list(Image.Resampling))
def test_bands_and_channels_have_the_pixels_of_the_complete_square(
    monkeypatch, pixels, policy, resample
):
    monkeypatch.setattr(image_square, "BAND_PIXELS", pixels)
    monkeypatch.setattr(image_square, "CHANNEL_PIXELS", pixels)
    for size in SIZES:
        image = noise(size)
        for edge in (24, 7, 60):
            expected = resized_square(image, edge, policy, MEAN, resample)
            square = to_square(image, edge, policy, MEAN, resample)
            assert square.size == (edge, edge)
            assert square.tobytes() == expected.tobytes(), (size, edge)


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "CMYK"])
def test_other_modes(monkeypatch, mode):
    monkeypatch.setattr(image_square, "BAND_PIXELS", 50)
    bicubic = Image.Resampling.BICUBIC
    for size in SIZES:
        image = noise(size, mode)
        expected = resized_square(image, 24, "resize", MEAN, bicubic)
        assert to_square(image, 24, "resize", MEAN).tobytes() == expected.tobytes(), size


@pytest.mark.parametrize("size", [*SIZES, (3, 400), (400, 3)])
def test_crop_has_the_pixels_of_the_processor_of_clip(monkeypatch, size):
    image, edge = noise(size), 24
    shorter, longer = sorted(size)
    length = int(edge * longer / shorter)
    width, height = (length, edge) if size[0] > size[1] else (edge, length)
    left, top = (width - edge) // 2, (height - edge) // 2
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    expected = np.asarray(resized.crop((left, top, left + edge, top + edge))).astype(int)
    square = np.asarray(to_square(image, edge, "crop", MEAN)).astype(int)
    if longer <= image_square.MAX_CROPPED_RATIO * shorter:
        assert (square == expected).all()
    assert abs(square - expected).max() <= 1  # rounding of the kernel's positions


def encoded(size, kind, **options):
    stream = io.BytesIO()
    Image.new("RGB", size).save(stream, kind, **options)
    return stream.getvalue()


@pytest.mark.parametrize("comment", [b"", b"\xff\xfe\x00\x06\xff\xd9\xff\xda"])
def test_cost_of_a_jpeg_with_many_scans(comment):
    data = encoded((400, 300), "JPEG", progressive=True)
    scan = data[data.rindex(b"\xff\xda") : -2]
    count = data.count(b"\xff\xda")
    assert image_cost(data + scan) == 400**2  # after the end of the image
    repeated = data[:-2] + comment + scan * 100 + data[-2:]
    assert image_cost(repeated) == 400 * 300 * (count + 100) // 16
    assert load_image(repeated).tobytes() == load_image(data).tobytes()
    with raises_input_error(ErrorCode.IMAGE_TOO_LARGE, "400×300"):
        load_image(repeated, 400 * 300)


@pytest.mark.parametrize(
    ("size", "kind", "cost"),
    [
        ((40, 30), "PNG", 1600),
        ((30, 40), "PNG", 1600),
        ((40, 1), "PNG", 1600),
        ((40, 40), "JPEG", 1600),
        ((40, 4), "JPEG2000", 1600),
        ((40, 30), "JPEG2000", 8 * 1200),
    ],
)
def test_cost_is_the_square_or_the_decoder(size, kind, cost):
    data = encoded(size, kind)
    assert image_cost(data) == cost
    limit = max(size[0] * size[1], -(-cost // 4))
    assert load_image(data, limit).size == size
    for read in (load_image, image_cost):
        with raises_input_error(ErrorCode.IMAGE_TOO_LARGE, f"{size[0]}×{size[1]}"):
            read(data, limit - 1)


def test_size_in_a_file_that_differs_from_its_header():
    # An ICO file is a directory with the sizes and PNG files, which can have other sizes.
    data = bytearray(encoded((16, 16), "ICO"))
    png = encoded((300, 200), "PNG")
    data[14:18] = len(png).to_bytes(4, "little")
    data[22:] = png
    with raises_input_error(ErrorCode.IMAGE_TOO_LARGE, "300×200"), pytest.warns(UserWarning):
        load_image(bytes(data), max_pixels=1000)
