"""Sandboxed decoding: equal pixels, rejected files, and limits of the decoder processes."""

import asyncio
import os
import shutil
import signal
import socket
import struct
import threading
import time
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from owl2.errors import ErrorCode
from owl2.processing.image_io import FORMATS, SQUARE_FACTOR
from owl2.processing.image_processing import Owl2ImageProcessor
from owl2.serve import image_decoder
from owl2.serve.config import MIB, ServerLimits
from owl2.serve.decode_forkserver import DecodeRequest, restrict_process
from owl2.serve.errors import ApiError
from owl2.serve.image_decoder import ForkServer, ImageBudget, SandboxedImageDecoder
from tests.errors import raises_input_error
from tests.serve.images import encode, noise
from tests.serve.running import wait_until

SIZE = 24
Image.init()  # registers all formats, which FILES lists


def lab():
    """Noise in the color space LAB, which no format but TIFF has."""
    spaces = (ImageCms.createProfile(name) for name in ("sRGB", "LAB"))
    return ImageCms.applyTransform(noise(), ImageCms.buildTransform(*spaces, "RGB", "LAB"))


def rotated_jpeg():
    exif = Image.Exif()
    exif[0x0112] = 6
    return encode(noise(), "JPEG", exif=exif)


FILES = {
    **{kind: encode(noise(), kind) for kind in FORMATS if kind in Image.SAVE},
    "portrait": encode(noise(size=(30, 70)), "PNG"),
    "small": encode(noise(size=(3, 2)), "PNG"),
    "model size": encode(noise(size=(SIZE, SIZE)), "PNG"),
    "alpha": encode(noise(mode="RGBA"), "PNG"),
    "palette": encode(noise(mode="P"), "GIF", transparency=3),
    "gray": encode(noise(mode="L"), "JPEG"),
    "16 bits": encode(noise(mode="I;16"), "PNG"),
    "CMYK": encode(noise(mode="CMYK"), "JPEG"),
    "bilevel": encode(noise(mode="1"), "TIFF", compression="group4"),
    "LZW": encode(noise(), "TIFF", compression="tiff_lzw"),
    "rotated": rotated_jpeg(),
    "LAB": encode(lab(), "TIFF"),
}


def decode(data, processor=None, **limits):
    limits = ServerLimits(**limits)
    decoder = SandboxedImageDecoder(limits, processor or Owl2ImageProcessor(SIZE))
    try:
        return asyncio.run(decoder.decode(data, ImageBudget.of_request(limits)))
    finally:
        decoder.close()


def error_message(data, code, processor=None, **limits):
    with pytest.raises(ApiError) as caught:
        decode(data, processor, **limits)
    assert (caught.value.status, caught.value.code) == (400, code)
    return caught.value.message


def assert_decoder_works():
    assert decode(FILES["PNG"]).size == (SIZE, SIZE)


@pytest.mark.parametrize("policy", ["resize", "pad"])
@pytest.mark.parametrize("data", FILES.values(), ids=FILES)
def test_decoded_images_have_the_same_pixel_values_as_files(data, policy):
    processor = Owl2ImageProcessor(SIZE, policy)
    decoded = decode(data, processor)
    assert (decoded.mode, decoded.size) == ("RGB", (SIZE, SIZE))
    ours, files = (
        processor(source, return_tensors="np")["pixel_values"] for source in (decoded, data)
    )
    np.testing.assert_array_equal(ours, files)
    assert np.ptp(ours) > 0.5  # otherwise two empty images would be equal


def test_other_means_and_sizes():
    processor = Owl2ImageProcessor(9, "pad", image_mean=(0.1, 0.9, 0.4), image_std=(0.3, 0.2, 0.1))
    for name in ("portrait", "JPEG"):
        decoded = decode(FILES[name], processor)
        ours, files = (
            processor(source, return_tensors="np")["pixel_values"]
            for source in (decoded, FILES[name])
        )
        np.testing.assert_array_equal(ours, files)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF"])
def test_truncated_and_corrupt_files(kind):
    data = FILES[kind]
    error_message(data[: len(data) // 2], "invalid_image")
    error_message(data[:10], "invalid_image")
    random = np.random.default_rng(1)
    for _ in range(5):
        corrupt = bytearray(data)
        for position in random.integers(0, len(data), 20):
            corrupt[position] = random.integers(256)
        try:
            assert decode(bytes(corrupt)).size == (SIZE, SIZE)
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
def test_other_files_are_rejected(data):
    error_message(data, "invalid_image")


def chunk(name, data):
    return struct.pack("!I", len(data)) + name + data + struct.pack("!I", zlib.crc32(name + data))


def bomb(width, height, rows=0):
    """A small PNG whose header declares a large image; it contains `rows` rows."""
    data = zlib.compress(bytes(rows * (1 + 3 * width)), 9)
    header = struct.pack("!2I5B", width, height, 8, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


@pytest.mark.parametrize("size", [(60_000, 60_000), (2**31 - 1, 1), (1, 50_000)])
def test_pixel_limit_is_checked_before_decoding(size):
    error_message(bomb(*size), "image_too_large", max_image_pixels=10_000_000)


def test_smaller_of_two_pixel_limits_applies():
    data = FILES["PNG"]
    processor = Owl2ImageProcessor(SIZE, max_pixels=1000)
    assert "1,000" in error_message(data, "image_too_large", processor)
    assert "900" in error_message(data, "image_too_large", max_image_pixels=900)


def test_memory_limit_only_fails_the_image():
    data = bomb(5000, 5000, 5000)
    assert len(data) < 200_000
    error_message(data, "image_too_large", image_decode_memory=64 * MIB)
    assert_decoder_works()


@pytest.mark.slow
def test_largest_allowed_image_fits_into_the_memory_limit():
    edge = int((SQUARE_FACTOR * ServerLimits().max_image_pixels) ** 0.5)
    data = encode(
        Image.new("RGB", (edge, ServerLimits().max_image_pixels // edge)), "JPEG", quality=1
    )
    assert decode(data, image_decode_timeout=100).size == (SIZE, SIZE)


def test_time_limit_only_fails_the_image():
    begin = time.monotonic()
    message = error_message(bomb(5000, 5000, 5000), "image_too_large", image_decode_timeout=0.01)
    assert "0.01" in message
    assert time.monotonic() - begin < image_decoder.GRACE_SECONDS  # the decoder ended itself
    assert_decoder_works()


def decoder_pids():
    parent = image_decoder.fork_server().process.pid
    with open(f"/proc/{parent}/task/{parent}/children") as file:
        return [int(pid) for pid in file.read().split()]


def test_crash_only_fails_the_image(monkeypatch):
    fork = ForkServer.fork

    def fork_and_crash(server):
        before = set(decoder_pids())  # of earlier images, which are about to end
        connection = fork(server)
        wait_until(lambda: set(decoder_pids()) - before)
        for pid in set(decoder_pids()) - before:
            os.kill(pid, signal.SIGSEGV)
        return connection

    with monkeypatch.context() as patch:
        patch.setattr(ForkServer, "fork", fork_and_crash)
        error_message(FILES["PNG"], "invalid_image")
    assert_decoder_works()


def reply_with(monkeypatch, reply):
    """Replace decoders by a thread that reads the request, sends `reply` and ends."""

    def work(connection):
        with connection, connection.makefile("rb") as stream:
            stream.read()
            with suppress(BrokenPipeError):  # of a reply that is too long
                connection.sendall(reply)

    def fork(self):
        ours, theirs = socket.socketpair()
        threading.Thread(target=work, args=(theirs,)).start()
        return ours

    monkeypatch.setattr(ForkServer, "fork", fork)


@pytest.mark.parametrize(
    "reply",
    [
        b"",
        b"decoded",
        b"decoded\n",
        b"decoded 9\n",
        b"decoded\n" + b"x" * 3 * SIZE**2,
        b"decoded 9\n" + b"x" * (3 * SIZE**2 - 1),
        b"decoded 9\n" + b"x" * (3 * SIZE**2 + 1),
        b"decoded 9\n" + b"x" * 10_000_000,
        b"x" * 1000,
        b"other 9\nmessage",
        b"\xff\xfe\n",
    ],
)
def test_malformed_replies_of_a_decoder_are_rejected(monkeypatch, reply):
    reply_with(monkeypatch, reply)
    error_message(FILES["PNG"], "invalid_image")


def test_error_message_with_invalid_utf8(monkeypatch):
    reply_with(monkeypatch, b"image_too_large 9\n\xff\xfe")
    assert error_message(FILES["PNG"], "image_too_large") == "\ufffd\ufffd"


def test_decoder_that_never_replies(monkeypatch):
    monkeypatch.setattr(image_decoder, "GRACE_SECONDS", 0.1)
    pair = socket.socketpair()
    monkeypatch.setattr(ForkServer, "fork", lambda self: pair[0])
    begin = time.monotonic()
    error_message(FILES["PNG"], "image_too_large", image_decode_timeout=0.1)
    assert time.monotonic() - begin < 5


def in_restricted_process(check):
    """Whether `check` is true in a process with the restrictions of a decoder."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            mean = (0.5, 0.5, 0.5)
            request = DecodeRequest(8, "resize", mean, 10, memory=64 * MIB, timeout=30.0)
            restrict_process(request)
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
def test_restricted_process_cannot_access_files_network_or_memory(check):
    assert in_restricted_process(check)


def test_restricted_process_can_allocate_memory_for_an_image():
    assert in_restricted_process(lambda: bytearray(30 * MIB))


def test_decoder_environment_has_no_secrets(monkeypatch):
    monkeypatch.setenv("OWL2_API_KEY", "an-api-key")
    server = ForkServer()
    server.fork().close()
    environment = Path(f"/proc/{server.process.pid}/environ").read_bytes()
    server.close()
    assert b"PYTHONPATH" in environment
    assert b"an-api-key" not in environment


def test_concurrent_images_are_not_mixed_up():
    colors = [(n, 255 - n, n // 2) for n in range(0, 250, 25)]
    got = {}

    def work(color):
        got[color] = decode(encode(Image.new("RGB", (50, 40), color), "PNG")).getpixel((5, 5))

    threads = [threading.Thread(target=work, args=(color,)) for color in colors]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert got == {color: color for color in colors}


def test_no_process_or_file_descriptor_leaks():
    assert_decoder_works()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        assert_decoder_works()
        error_message(b"x" * 100, "invalid_image")
    assert len(os.listdir("/proc/self/fd")) == before
    wait_until(lambda: decoder_pids() == [])


def test_max_pixels_below_the_models_size_is_rejected():
    with raises_input_error(ErrorCode.INVALID_VALUE, "max_pixels"):
        SandboxedImageDecoder(ServerLimits(), Owl2ImageProcessor(SIZE, max_pixels=SIZE**2 - 1))


def threads_started_by(work):
    """The number of threads that remain after a new thread has called `work`."""
    found = []

    def count():
        work()
        found.extend(os.listdir("/proc/self/task"))

    before = set(os.listdir("/proc/self/task"))
    thread = threading.Thread(target=count)
    thread.start()
    thread.join()
    return len(set(found) - before) - 1


def test_pixel_values_are_computed_without_openmp_threads():
    # OpenMP creates a pool for each thread that computes with torch, and several pools compete for
    # the cores; threads of requests must not create one.
    import torch

    processor = Owl2ImageProcessor(448)
    squares = [decode(FILES["JPEG"], processor)] * 4
    cores = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert threads_started_by(lambda: torch.ones(2**22).exp()) == 2  # torch would create them
        assert threads_started_by(lambda: processor(squares)) == 0
    finally:
        torch.set_num_threads(cores)


@pytest.mark.parametrize("used", [False, True])
def test_fork_server_ends_when_its_connection_is_closed(used, capfd):
    server = ForkServer()
    server.start()
    if used:
        server.fork().close()
    server.close()
    assert server.process.returncode == 0
    assert capfd.readouterr().err == ""


def test_fork_server_that_does_not_start_is_an_error_of_the_server(monkeypatch):
    monkeypatch.setattr(image_decoder.sys, "executable", shutil.which("false"))
    with pytest.raises(ConnectionError):
        ForkServer().call(b"{}", 1.0, 10)


@pytest.mark.slow
def test_fork_server_is_restarted_after_it_was_killed():
    assert_decoder_works()
    pid = image_decoder.fork_server().process.pid
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert_decoder_works()
    assert image_decoder.fork_server().process.pid != pid
