"""Images in every form are loaded as upright RGB."""

import base64
import contextlib
import http.server
import threading
import warnings

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from owl2.errors import ErrorCode
from owl2.processing import image_io, media_file
from owl2.processing.image_io import load_image
from tests.errors import raises_input_error
from tests.processing.samples import encoded, gradient


def same(one: Image.Image, other: Image.Image) -> bool:
    return one.mode == other.mode == "RGB" and bool((np.asarray(one) == np.asarray(other)).all())


# ------------------------------------------------------------------ forms of an image


def test_every_form_gives_the_same_image(tmp_path):
    image = gradient()
    data = encoded(image)
    path = tmp_path / "an image.png"
    path.write_bytes(data)
    text = base64.b64encode(data).decode()
    array = np.asarray(image)
    forms = [
        path,
        str(path),
        path.as_uri(),
        image,
        data,
        bytearray(data),
        f"data:image/png;base64,{text}",
        text,
        array,
        array.transpose(2, 0, 1),
        array.astype(np.float32) / 255,
        torch.from_numpy(array.copy()).permute(2, 0, 1),
        torch.from_numpy(array / 255.0),
        array.astype(np.uint16) * 257,
        array.astype(np.int64),
    ]
    for form in forms:
        assert same(load_image(form), image), type(form)


def test_grayscale_arrays():
    gray = gradient("L")
    array = np.asarray(gray)
    for form in (array, array[..., None], array[None]):
        assert same(load_image(form), gray.convert("RGB"))
    assert np.asarray(load_image(array > 100)).max() == 255


def test_url(monkeypatch):
    data = encoded(gradient())

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            found = self.path == "/a.png"
            self.send_response(200 if found else 404)
            self.end_headers()
            self.wfile.write(data if found else b"")

        def log_message(self, *_):
            pass

    with serving(Handler) as address:
        assert same(load_image(f"{address}/a.png"), gradient())
        with raises_input_error(ErrorCode.MISSING_IMAGE, "b.png", 404):
            load_image(f"{address}/b.png")
        monkeypatch.setattr(media_file, "URL_MAX_BYTES", 10)
        with raises_input_error(ErrorCode.IMAGE_TOO_LARGE, "a.png"):
            load_image(f"{address}/a.png")


@contextlib.contextmanager
def serving(handler):
    server = http.server.HTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    "failure", [429, 503, "truncated", "reset", "truncated chunk", "no last chunk"]
)
@pytest.mark.parametrize("failures", [1, 9])
def test_url_is_requested_again_after_a_transient_error(monkeypatch, failure, failures):
    """A broken download is never reported as a broken image."""
    data, requests = encoded(gradient()), []
    monkeypatch.setattr(media_file, "URL_RETRY_DELAYS", (0.0, 0.0))

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            fails = len(requests) <= failures
            if fails and failure == "reset":
                self.close_connection = True
                return
            if fails and "chunk" in str(failure):
                self.send_response(200)
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                length = 900_000 if failure == "truncated chunk" else len(data) // 2
                self.wfile.write(f"{length:x}\r\n".encode() + data[: len(data) // 2])
                self.wfile.write(b"\r\n" if failure == "no last chunk" else b"")
                self.close_connection = True
                return
            self.send_response(failure if fails and failure != "truncated" else 200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2 if fails else None])

        def log_message(self, *_):
            pass

    if "chunk" in str(failure):
        Handler.protocol_version = "HTTP/1.1"
    with serving(Handler) as address:
        if failures == 1:
            assert same(load_image(f"{address}/a.png"), gradient())
        else:
            with raises_input_error(ErrorCode.MISSING_IMAGE, "a.png"):
                load_image(f"{address}/a.png")
    assert len(requests) == min(failures, 2) + 1


# ------------------------------------------------------------------ kinds of an image


def hidden_colors(kind):
    """An image whose left half is transparent red and whose right half is opaque green."""
    image = Image.new("RGBA", (8, 4), (255, 0, 0, 0))
    image.paste((0, 255, 0, 255), (4, 0, 8, 4))
    if kind == "palette":
        image = Image.new("P", (8, 4), 0)
        image.putpalette([255, 0, 0, 0, 255, 0])
        image.paste(1, (4, 0, 8, 4))
        return encoded(image, transparency=0)
    if kind == "gray":
        image = Image.new("LA", (8, 4), (76, 0))
        image.paste((150, 255), (4, 0, 8, 4))
    if kind == "color key":
        return encoded(image.convert("RGB"), transparency=(255, 0, 0))
    return np.asarray(image) if kind == "array" else encoded(image)


@pytest.mark.parametrize("kind", ["color", "palette", "gray", "color key", "array"])
def test_transparent_pixels_are_white_or_keep_their_color(kind):
    image = hidden_colors(kind)
    left, right = ((76,) * 3, (150,) * 3) if kind == "gray" else ((255, 0, 0), (0, 255, 0))
    for options, expected in (
        ({}, (255, 255, 255)),
        ({"alpha": "white"}, (255, 255, 255)),
        ({"alpha": "drop"}, left),
    ):
        loaded = load_image(image, **options)
        assert (loaded.getpixel((0, 0)), loaded.getpixel((7, 0))) == (expected, right)
    with raises_input_error(ErrorCode.INVALID_VALUE, "black"):
        load_image(image, alpha="black")


def test_partial_transparency_is_composited_on_white():
    image = Image.new("RGBA", (2, 2), (100, 0, 200, 51))  # a fifth
    assert load_image(image).getpixel((0, 0)) == (224, 204, 244)
    assert load_image(image, alpha="drop").getpixel((0, 0)) == (100, 0, 200)


@pytest.mark.parametrize("compressed", [True, False])
def test_png_with_a_long_text_is_opened(compressed):
    info = PngImagePlugin.PngInfo()
    info.add_text("prompt", "x" * 3_000_000, zip=compressed)
    info.add_itxt("workflow", "ü" * 1_500_000, zip=compressed)
    assert same(load_image(encoded(gradient(), pnginfo=info)), gradient())


@pytest.mark.parametrize("chunks", [1, 5])
@pytest.mark.parametrize("kind", ["add_text", "add_itxt"])
@pytest.mark.parametrize("is_after_the_pixels", [False, True])
def test_png_with_too_much_text_is_refused(chunks, kind, is_after_the_pixels):
    """In one chunk or several, which would expand to more than 64 MiB."""
    info = PngImagePlugin.PngInfo()
    for number in range(chunks):
        getattr(info, kind)(str(number), "x" * (66 * 2**20 // chunks), zip=True)
    if is_after_the_pixels:
        info.chunks = [(name, data, True) for name, data, *_ in info.chunks]
    data = encoded(gradient(), pnginfo=info)
    assert len(data) < 2**20
    with raises_input_error(ErrorCode.IMAGE_TOO_LARGE, "64 MiB"):
        load_image(data)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "1", "RGBA", "CMYK", "YCbCr"])
def test_modes_are_converted_to_rgb(mode):
    image = gradient("L" if mode == "LA" else "RGB").convert(mode)
    assert same(load_image(image), image.convert("RGB"))


def test_palette_with_transparency_gives_no_warning():
    data = encoded(gradient("P"), transparency=bytes(range(256)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(load_image(data, alpha="drop"), gradient("P").convert("RGB"))
        assert not same(load_image(data), gradient("P").convert("RGB"))


@pytest.mark.parametrize("dtype", ["uint16", "int32", "float32"])
def test_16_bits_are_scaled_not_clipped(dtype):
    wide = np.linspace(0, 65535, 64).reshape(8, 8).round()
    image = Image.fromarray(wide.astype(dtype))
    assert image.mode in ("I;16", "I", "F")
    kind = {"uint16": "PNG", "int32": "TIFF", "float32": "TIFF"}[dtype]
    for source in (image, encoded(image, kind)):
        levels = np.asarray(load_image(source))[..., 0]
        assert np.abs(levels - wide / 257).max() <= 0.5


@pytest.mark.parametrize("top", [1.0, 255.0, 3e6])
def test_float_images_by_their_range(top):
    values = np.linspace(0, top, 64, dtype=np.float32).reshape(8, 8)
    levels = np.asarray(load_image(Image.fromarray(values)))[..., 0]
    assert np.abs(levels - np.linspace(0, 255, 64).reshape(8, 8)).max() <= 0.5001


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(orientation):
    upright = gradient()
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Pillow's transpose that undoes each
    stored = upright.transpose(back[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert same(load_image(encoded(stored, exif=exif)), upright)


def test_corrupt_exif_is_ignored():
    data = encoded(gradient(), "JPEG", exif=b"Exif\x00\x00nonsense")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert load_image(data).size == (12, 8)


def test_cmyk_jpeg_and_animated_gif():
    assert load_image(encoded(gradient("CMYK"), "JPEG")).mode == "RGB"
    frames = [gradient("P"), gradient("P").rotate(180)]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert same(load_image(data), gradient("P").convert("RGB"))


@pytest.mark.parametrize("kind", ["PPM", "MPO", "ICO", "AVIF", "JPEG2000"])
def test_less_common_formats_are_opened(kind):
    if kind != "MPO" and kind not in image_io.supported_formats():
        pytest.skip("this Pillow lacks it")
    assert load_image(encoded(gradient(size=(16, 16)), kind)).size == (16, 16)
