"""Images with too many pixels or a too long edge are rejected before they are decoded."""

import warnings

import pytest
from PIL import Image

from owl2.errors import ErrorCode
from owl2.processing.image_io import load_image
from tests.errors import raises_input_error
from tests.processing.samples import encoded, gradient


def test_large_image_is_rejected_before_decoding(tmp_path, monkeypatch):
    path = tmp_path / "bomb.png"
    Image.new("1", (10_000, 10_000)).save(path)  # 12 KB, 300 MB as RGB
    Image.init()  # some plugins load an image when they are imported
    decoded = []
    monkeypatch.setattr(Image.Image, "load", lambda self: decoded.append(self))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with raises_input_error(ErrorCode.IMAGE_TOO_LARGE, "100,000,000", "89,478,485"):
            load_image(path)
    assert not decoded


def test_max_pixels_overrides_the_limit_of_pillow(monkeypatch):
    image = gradient()
    with raises_input_error(ErrorCode.IMAGE_TOO_LARGE, "12×8 = 96", 95, "max_pixels"):
        load_image(image, max_pixels=95)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)  # Pillow's own limit is ignored
    assert load_image(encoded(image), max_pixels=96).size == (12, 8)
    assert Image.MAX_IMAGE_PIXELS == 10


@pytest.mark.parametrize("limit", [0, -5, 1.5, "many", None, True])
def test_max_pixels_must_be_a_positive_integer(limit):
    with raises_input_error(ErrorCode.INVALID_VALUE, "max_pixels"):
        load_image(gradient(), max_pixels=limit)


def test_long_edge_is_limited():
    with raises_input_error(ErrorCode.IMAGE_TOO_LARGE, "1×40000"):
        load_image(Image.new("L", (1, 40_000)))
    assert load_image(Image.new("L", (1, 400))).size == (1, 400)
