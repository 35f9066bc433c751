"""Images that cannot be read raise input errors that name them."""

import base64
import contextlib
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image, PngImagePlugin

from owl2.errors import ErrorCode, InputError
from owl2.processing.image_io import load_image
from tests.errors import raises_input_error
from tests.processing.samples import encoded, gradient


@pytest.mark.parametrize(
    ("source", "needle"),
    [
        (b"", "0 bytes"),
        (b"hello, this is text", "PNG"),
        ("data:image/png,hello", "data:image/png"),
        ("data:image/png;base64,###", "data:image/png"),
        ("data:nothing", "data:nothing"),
        ("aGVsbG8g" * 20, "base64"),
        ("", "empty"),
        (" ", "empty"),
        ("ftp://x/y.png", "ftp://"),
        (12, "int"),
        (np.full((4, 4, 3), None), "object"),
        (np.full((4, 4, 3), "1"), "<U1"),
        (np.zeros((4, 4, 3), complex), "complex128"),
        (torch.zeros((4, 4, 3), dtype=torch.complex64), "complex64"),
        (None, "NoneType"),
        (np.zeros((2, 3, 5, 7)), "(2, 3, 5, 7)"),
        (np.zeros((5, 7, 2)), "(5, 7, 2)"),
        (np.zeros((0, 7, 3)), "empty"),
        (np.full((4, 4, 3), 255.0), "0..1"),
        (np.full((4, 4, 3), np.nan), "0..1"),
        (np.full((4, 4, 3), np.inf), "0..1"),
        (np.full((4, 4, 3), -1), "0..255"),
        (Image.new("RGB", (0, 4)), "0×4"),
        (Image.fromarray(np.full((4, 4), np.inf, np.float32)), "finite"),
    ],
)
def test_invalid_images_are_named(source, needle):
    with raises_input_error(ErrorCode.BROKEN_IMAGE, needle):
        load_image(source)


@pytest.mark.parametrize(
    "source",
    [
        "missing.png",
        Path("missing.png"),
        "http://[::1",
        "file://server/share/a.png",
        "file://[::1",
        "file://localhost/missing.png",
    ],
)
def test_missing_images_are_named(source):
    with raises_input_error(ErrorCode.MISSING_IMAGE, source):
        load_image(source)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("as_url", [False, True])
def test_files_that_are_not_regular_are_refused_without_blocking(tmp_path, as_url):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "link.png").symlink_to("pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    (tmp_path / "error.png").symlink_to("/proc/self/mem")  # reading it is an error
    (tmp_path / "folder.png").mkdir()
    for name in ("pipe.png", "link.png", "zero.png", "folder.png", "error.png", "a\0b.png"):
        path = (tmp_path / name).as_uri() if as_url else tmp_path / name
        with raises_input_error(ErrorCode.UNREADABLE_FILE, path):
            load_image(path)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"])
def test_truncated_files(tmp_path, kind):
    data = encoded(gradient(size=(90, 70)), kind)
    path = tmp_path / "cut"
    path.write_bytes(data[: len(data) * 2 // 3])
    with raises_input_error(ErrorCode.BROKEN_IMAGE, path):
        load_image(path)


@pytest.mark.parametrize("count", [60, 300, 300_000])
def test_messages_contain_no_base64(count):
    random = np.random.default_rng(0).bytes(count)
    text = base64.b64encode(random).decode()
    sources = [
        *(text, f"data:image/png;base64,{text}", f"data:image/png;base64{text}"),
        *(Path("data") / text, f"data/{text}", f"{text[:-3]}-==", f"s3://bucket/{text}"),
        f"file:///{text}",
    ]
    for source in sources:
        with pytest.raises(InputError) as error:
            load_image(source)
        message = str(error.value)
        assert len(message) < 300
        assert not any(text[i : i + 20] in message for i in range(0, len(text) - 20, 10)), message


def test_empty_file(tmp_path):
    (tmp_path / "a.png").touch()
    with raises_input_error(ErrorCode.BROKEN_IMAGE, "a.png"):
        load_image(tmp_path / "a.png")


def test_unsafe_formats_are_not_opened(monkeypatch):
    def ghostscript(*args: object, **kwargs: object) -> None:
        raise AssertionError("EPS must not be decoded")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", ghostscript)
    for kind in ("EPS", "PCX", "SGI"):
        with raises_input_error(ErrorCode.BROKEN_IMAGE, "PNG, JPEG"):
            load_image(encoded(gradient(), kind))


@pytest.mark.parametrize("error", [RuntimeError, NotImplementedError, AttributeError])
@pytest.mark.parametrize("step", ["open", "load"])
def test_decoder_exceptions_are_input_errors(monkeypatch, error, step):
    def fail(*args: object, **kwargs: object) -> None:
        raise error("bad box")

    data = encoded(gradient())
    monkeypatch.setattr(Image if step == "open" else PngImagePlugin.PngImageFile, step, fail)
    with raises_input_error(ErrorCode.BROKEN_IMAGE, "bad box") as caught:
        load_image(data)
    assert type(caught.value.__cause__) is error


def test_corrupt_bytes_raise_only_input_errors():
    data = bytearray(encoded(gradient(size=(40, 30))))
    random = np.random.default_rng(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(200):
            broken = bytearray(data)
            for place in random.integers(0, len(data), 3):
                broken[place] = random.integers(0, 256)
            with contextlib.suppress(InputError):
                load_image(bytes(broken))
