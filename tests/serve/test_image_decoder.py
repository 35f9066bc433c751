"""Images of strangers: the same pixels as the engine's own, and no harm."""

import io
import os
import signal
import socket
import struct
import threading
import time
import zlib

import numpy as np
import pytest
from PIL import Image

from owl2.errors import InputError
from owl2.processing.image_io import FORMATS, SQUARE_FACTOR
from owl2.processing.image_processing import Owl2ImageProcessor
from owl2.serve import decode_forkserver, image_decoder
from owl2.serve.config import MIB, ServerLimits
from owl2.serve.errors import ApiError
from owl2.serve.image_decoder import ForkServer, SandboxedImageDecoder

SIZE = 24
Image.init()  # or the rarer formats would be missing below


def noise(mode, size, seed=0):
    width, height = size
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 4), dtype=np.uint8)
    if mode == "I;16":
        return Image.fromarray((values[..., 0].astype(np.uint16) << 8) + values[..., 1])
    return Image.fromarray(values, "RGBA").convert(mode)


def saved(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def rotated():
    exif = Image.Exif()
    exif[0x0112] = 6
    return saved(noise("RGB", (40, 30)), "JPEG", exif=exif)


FILES = {
    **{kind: saved(noise("RGB", (40, 30)), kind) for kind in FORMATS if kind in Image.SAVE},
    "portrait": saved(noise("RGB", (30, 70)), "PNG"),
    "small": saved(noise("RGB", (3, 2)), "PNG"),
    "as it is": saved(noise("RGB", (SIZE, SIZE)), "PNG"),
    "alpha": saved(noise("RGBA", (40, 30)), "PNG"),
    "palette": saved(noise("P", (40, 30)), "GIF", transparency=3),
    "grey": saved(noise("L", (40, 30)), "JPEG"),
    "16 bits": saved(noise("I;16", (40, 30)), "PNG"),
    "CMYK": saved(noise("CMYK", (40, 30)), "JPEG"),
    "two bits": saved(noise("1", (40, 30)), "TIFF", compression="group4"),
    "packed": saved(noise("RGB", (40, 30)), "TIFF", compression="tiff_lzw"),
    "rotated": rotated(),
}


def decode(data, like=None, **limits):
    return SandboxedImageDecoder(
        ServerLimits(**limits), like or Owl2ImageProcessor(SIZE)
    ).decode_sync(data)


def refused(data, code, **limits):
    with pytest.raises(ApiError) as caught:
        decode(data, **limits)
    assert (caught.value.status, caught.value.code) == (400, code)
    return caught.value.message


def still_works():
    assert decode(FILES["PNG"]).size == (SIZE, SIZE)


@pytest.mark.parametrize("policy", ["resize", "pad"])
@pytest.mark.parametrize("data", FILES.values(), ids=FILES)
def test_the_pixels_are_those_of_the_file(data, policy):
    like = Owl2ImageProcessor(SIZE, policy)
    decoded = decode(data, like)
    assert (decoded.mode, decoded.size) == ("RGB", (SIZE, SIZE))
    ours, files = (like(source, "np")["pixel_values"] for source in (decoded, data))
    np.testing.assert_array_equal(ours, files)
    assert np.ptp(ours) > 0.5  # or two empty images would be equal


def test_other_means_and_sizes():
    like = Owl2ImageProcessor(9, "pad", (0.1, 0.9, 0.4), (0.3, 0.2, 0.1))
    for name in ("portrait", "JPEG"):
        decoded = decode(FILES[name], like)
        pixels = like(decoded, "np")["pixel_values"]
        np.testing.assert_array_equal(pixels, like(FILES[name], "np")["pixel_values"])


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF"])
def test_what_is_cut_off_or_spoilt_is_refused_or_a_image(kind):
    data = FILES[kind]
    refused(data[: len(data) // 2], "invalid_image")
    refused(data[:10], "invalid_image")
    random = np.random.default_rng(1)
    for _ in range(5):
        spoilt = bytearray(data)
        for place in random.integers(0, len(data), 20):
            spoilt[place] = random.integers(256)
        try:
            assert decode(bytes(spoilt)).size == (SIZE, SIZE)
        except ApiError as error:
            assert error.status == 400
            assert error.code in ("invalid_image", "image_too_large")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 1000,
        b"no image",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage",
    ],
    ids=["nothing", "zeros", "words", "SVG", "EPS"],
)
def test_what_is_no_image(data):
    refused(data, "invalid_image")


def chunk(name, data):
    return struct.pack("!I", len(data)) + name + data + struct.pack("!I", zlib.crc32(name + data))


def bomb(width, height, rows=0):
    """A small PNG that says it is large; with `rows` it really is."""
    data = zlib.compress(bytes(rows * (1 + 3 * width)), 9)
    header = struct.pack("!2I5B", width, height, 8, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


@pytest.mark.parametrize("size", [(60_000, 60_000), (2**31 - 1, 1), (1, 50_000)])
def test_more_pixels_than_allowed_are_known_from_the_header(size):
    message = refused(bomb(*size), "image_too_large", max_image_pixels=10_000_000)
    assert "pixels" in message


def test_the_smaller_limit_on_pixels_holds():
    data = FILES["PNG"]
    like = Owl2ImageProcessor(SIZE, max_pixels=1000)
    assert "limit is 1,000" in refused_by(SandboxedImageDecoder(ServerLimits(), like), data)
    assert "limit is 900" in refused(data, "image_too_large", max_image_pixels=900)


def refused_by(decoders, data):
    with pytest.raises(ApiError) as caught:
        decoders.decode_sync(data)
    return caught.value.message


def test_too_much_memory_ends_nothing_but_the_image():
    data = bomb(5000, 5000, 5000)
    assert len(data) < 200_000
    assert "memory" in refused(data, "image_too_large", image_decode_memory=64 * MIB)
    still_works()


@pytest.mark.slow
def test_the_largest_images_allowed_fit_into_the_memory_allowed():
    edge = int((SQUARE_FACTOR * ServerLimits().max_image_pixels) ** 0.5)
    data = saved(
        Image.new("RGB", (edge, ServerLimits().max_image_pixels // edge)), "JPEG", quality=1
    )
    assert decode(data, image_decode_timeout=100).size == (SIZE, SIZE)


def test_too_much_time_ends_nothing_but_the_image():
    begin = time.monotonic()
    message = refused(bomb(5000, 5000, 5000), "image_too_large", image_decode_timeout=0.01)
    assert "longer than 0.01 seconds" in message
    assert time.monotonic() - begin < image_decoder.GRACE_SECONDS  # the decoder ended itself
    still_works()


def children():
    parent = image_decoder.fork_server()._process.pid
    with open(f"/proc/{parent}/task/{parent}/children") as file:
        return [int(word) for word in file.read().split()]


def test_a_crash_ends_nothing_but_the_image():
    still_works()
    told = []
    data = bomb(5000, 5000, 5000)
    thread = threading.Thread(target=lambda: told.append(refused(data, "invalid_image")))
    thread.start()
    end = time.monotonic() + 10
    while not (own := children()) and time.monotonic() < end:
        time.sleep(0.001)
    for child in own:
        os.kill(child, signal.SIGSEGV)
    thread.join(10)
    assert ["the process that tried it ended" in message for message in told] == [True]
    still_works()


def answer_with(monkeypatch, reply):
    """SandboxedImageDecoder whose decoder reads all and says `reply`, then ends."""

    def work(connection):
        with connection:
            head = decode_forkserver.receive_exactly(connection, 4)
            job = decode_forkserver.receive_exactly(
                connection, decode_forkserver.LENGTH.unpack(head)[0]
            )
            decode_forkserver.receive_exactly(
                connection, decode_forkserver.json.loads(job)["length"]
            )
            connection.sendall(reply)

    def open_(self):
        ours, theirs = socket.socketpair()
        threading.Thread(target=work, args=(theirs,)).start()
        return ours

    monkeypatch.setattr(ForkServer, "fork", open_)


@pytest.mark.parametrize(
    "reply",
    [
        b"",
        b"D",
        b"D" + decode_forkserver.LENGTH.pack(3 * SIZE**2),
        b"D" + decode_forkserver.LENGTH.pack(3 * SIZE**2) + b"x" * (3 * SIZE**2 - 1),
        b"D" + decode_forkserver.LENGTH.pack(2**32 - 1) + b"x" * 100,
        b"D" + decode_forkserver.LENGTH.pack(5) + b"x" * 5,
        b"I" + decode_forkserver.LENGTH.pack(2**32 - 1) + b"x" * 100,
        b"I" + decode_forkserver.LENGTH.pack(20_000) + b"x" * 20_000,
    ],
)
def test_a_decoder_that_died_or_was_taken_over(monkeypatch, reply):
    answer_with(monkeypatch, reply)
    assert "the process that tried it ended" in refused(FILES["PNG"], "invalid_image")


def test_a_decoder_that_says_what_is_no_text(monkeypatch):
    answer_with(monkeypatch, b"?" + decode_forkserver.LENGTH.pack(2) + b"\xff\xfe")
    refused(FILES["PNG"], "invalid_image")


def test_a_decoder_that_is_stuck(monkeypatch):
    monkeypatch.setattr(image_decoder, "GRACE_SECONDS", 0.1)
    pair = socket.socketpair()
    monkeypatch.setattr(ForkServer, "fork", lambda self: pair[0])
    begin = time.monotonic()
    refused(FILES["PNG"], "image_too_large", image_decode_timeout=0.1)
    assert time.monotonic() - begin < 5


def confined(check):
    """Whether `check` holds in a process that is confined as a decoder is."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            job = decode_forkserver.DecodeRequest(
                0, 8, "resize", (0.5, 0.5, 0.5), 10, 64 * MIB, 30.0
            )
            decode_forkserver._restrict_process(job)
            code = 0 if check() else 1
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def raises(kind, call):
    try:
        call()
    except kind:
        return True
    return False


@pytest.mark.parametrize(
    "check",
    [
        lambda: raises(OSError, lambda: os.open("/etc/passwd", os.O_RDONLY)),
        lambda: raises(OSError, lambda: os.open(os.devnull, os.O_WRONLY)),
        lambda: raises(OSError, socket.socket),
        lambda: raises(MemoryError, lambda: bytearray(2048 * MIB)),
    ],
    ids=["reads", "writes", "connects", "fills memory"],
)
def test_a_decoder_can_do_no_harm(check):
    assert confined(check)


def test_a_decoder_can_do_its_work():
    assert confined(lambda: bytearray(30 * MIB))


def test_a_decoder_has_no_secrets(monkeypatch):
    monkeypatch.setenv("OWL2_API_KEY", "the-key-of-the-house")
    assert "the-key-of-the-house" not in str(image_decoder.decoder_environment())


def test_several_at_a_time_get_their_own():
    colours = [(n, 255 - n, n // 2) for n in range(0, 250, 25)]
    got = {}

    def work(colour):
        got[colour] = decode(saved(Image.new("RGB", (50, 40), colour), "PNG")).getpixel((5, 5))

    threads = [threading.Thread(target=work, args=(colour,)) for colour in colours]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert got == {colour: colour for colour in colours}


def test_no_process_and_no_file_is_left_behind():
    still_works()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        still_works()
        refused(b"x" * 100, "invalid_image")
    assert len(os.listdir("/proc/self/fd")) == before
    end = time.monotonic() + 5
    while children() and time.monotonic() < end:
        time.sleep(0.01)
    assert children() == []


def test_a_processor_that_would_refuse_the_square():
    with pytest.raises(InputError, match="max_pixels"):
        SandboxedImageDecoder(ServerLimits(), Owl2ImageProcessor(SIZE, max_pixels=SIZE**2 - 1))


def threads_started_by(work):
    """How many threads a new thread starts that does `work`; they stay, as OpenMP's do."""
    found = []

    def count():
        work()
        found.extend(os.listdir("/proc/self/task"))

    before = set(os.listdir("/proc/self/task"))
    thread = threading.Thread(target=count)
    thread.start()
    thread.join()
    return len(set(found) - before) - 1


def test_the_engine_makes_pixels_of_them_without_threads_of_its_own():
    # Each thread that computes with torch gets a pool of OpenMP's, and pools get in each other's
    # way: a request's thread must not.
    import torch

    like = Owl2ImageProcessor(448)
    squares = [decode(FILES["JPEG"], like)] * 4
    cores = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert threads_started_by(lambda: torch.ones(2**22).exp()) == 2  # as it would be
        assert threads_started_by(lambda: like(squares)) == 0
    finally:
        torch.set_num_threads(cores)


@pytest.mark.parametrize("used", [False, True])
def test_the_process_they_are_forked_from_ends_with_the_server(used, capfd):
    own = ForkServer()
    if used:
        own.fork().close()
    else:
        own.start()
    assert own.close() == 0
    assert capfd.readouterr().err == ""


@pytest.mark.slow
def test_decoders_come_back_when_the_process_they_are_forked_from_is_killed():
    still_works()
    process = image_decoder.fork_server()._process
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    still_works()
    assert image_decoder.fork_server()._process.pid != process.pid
