"""The cost of the images of a request, and the order in which images are decoded."""

import asyncio
import json
import socket
import threading

import pytest
from PIL import Image

from owl2.processing.image_processing import Owl2ImageProcessor
from owl2.serve.admission import current_client
from owl2.serve.config import ServerLimits
from owl2.serve.errors import ApiError
from owl2.serve.image_decoder import ForkServer, ImageBudget, SandboxedImageDecoder
from tests.serve.images import encode
from tests.serve.running import wait_until
from tests.serve.test_image_decoder import FILES, SIZE


def wide(edge):
    """An image with one row."""
    return encode(Image.new("RGB", (edge, 1)), "PNG")


def test_cost_of_all_images_of_a_request_is_limited():
    limits = ServerLimits(max_request_pixels=5 * 10**7)
    decoder = SandboxedImageDecoder(limits, Owl2ImageProcessor(SIZE, "pad"))

    async def decode_all(*files):
        budget = ImageBudget.of_request(limits)
        return [await decoder.decode(file, budget) for file in files]

    small, large = wide(4000), wide(5000)  # 16 and 25 million pixels as squares
    assert len(asyncio.run(decode_all(small, small, FILES["PNG"], small))) == 4
    assert len(asyncio.run(decode_all(large, small))) == 2
    for files in ([small] * 4, [large, large, FILES["PNG"]], [small, small, large], [wide(7200)]):
        with pytest.raises(ApiError) as caught:
            asyncio.run(decode_all(*files))
        assert (caught.value.status, caught.value.code) == (400, "image_too_large")
    decoder.close()


def test_time_of_all_images_of_a_request_is_limited():
    decoder = SandboxedImageDecoder(ServerLimits(), Owl2ImageProcessor(SIZE))
    budget = ImageBudget.of_request(ServerLimits())
    asyncio.run(decoder.decode(FILES["PNG"], budget))
    assert budget.seconds < ServerLimits().image_decode_timeout
    budget.seconds = 0.0
    with pytest.raises(ApiError) as caught:
        asyncio.run(decoder.decode(FILES["PNG"], budget))
    assert caught.value.code == "image_too_large"
    decoder.close()


def test_decoders_do_not_wait_for_the_event_loop(monkeypatch):
    """While it is busy, they decode as many images again as there are decoders."""
    calls = []

    def call(self, message, timeout, max_bytes):
        calls.append(message)
        return b"decoded 9\n" + bytes(3 * SIZE**2), 0.0

    monkeypatch.setattr(ForkServer, "call", call)
    limits = ServerLimits(image_decoders=2)
    decoder = SandboxedImageDecoder(limits, Owl2ImageProcessor(SIZE))

    async def run():
        budgets = [ImageBudget.of_request(limits) for _ in range(9)]
        tasks = [asyncio.ensure_future(decoder.decode(b"x", budget)) for budget in budgets]
        while not calls:
            await asyncio.sleep(0)
        wait_until(lambda: len(calls) >= 4)  # in the event loop's thread
        await asyncio.gather(*tasks)

    asyncio.run(run())
    decoder.close()
    assert len(calls) == 9


@pytest.mark.parametrize("decoders", [1, 2, 3])
def test_small_images_do_not_wait_for_large_ones(monkeypatch, decoders):
    """Large images are being decoded until `finish`; the limit of the processes is respected."""
    finish = threading.Event()
    running = []

    def work(connection):
        with connection, connection.makefile("rb") as stream:
            request = json.loads(stream.readline())
            is_large = stream.read() == b"large"
            if is_large and request["max_cost"] is not None:
                connection.sendall(b"expensive 20000000\n")
                return
            running.append(is_large)
            if is_large:
                finish.wait(20)
            connection.sendall(b"decoded 9\n" + bytes(3 * SIZE**2))

    def fork(self):
        ours, theirs = socket.socketpair()
        threading.Thread(target=work, args=(theirs,)).start()
        return ours

    monkeypatch.setattr(ForkServer, "fork", fork)
    limits = ServerLimits(image_decoders=decoders)
    decoder = SandboxedImageDecoder(limits, Owl2ImageProcessor(SIZE))

    def budget(client):
        current_client.set(client)
        return ImageBudget.of_request(limits)

    async def run():
        large = []
        for client in ("a", "a", "b"):
            shared = budget(client)
            large += [asyncio.ensure_future(decoder.decode(b"large", shared)) for _ in range(4)]
        expected = max(1, decoders - 1)
        while sum(running) < expected:
            await asyncio.sleep(0.001)
        if decoders == 1:
            finish.set()
        for client in ("a", "c"):
            await asyncio.wait_for(decoder.decode(b"small", budget(client)), 10)
        if decoders > 1:
            assert running.count(True) == expected
            assert not any(task.done() for task in large)
        else:
            assert not all(task.done() for task in large)
        finish.set()
        await asyncio.gather(*large)

    asyncio.run(run())
    decoder.close()
