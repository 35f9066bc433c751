"""Videos of requests: equal prompts and answers, rejected files, limits, and other requests."""

import asyncio
import base64
import json
import os
import signal
import socket
import threading

import numpy as np
import pytest
from openai import BadRequestError
from PIL import Image

from owl2.processing.image_processing import Owl2ImageProcessor
from owl2.processing.messages import user_message
from owl2.processing.video import load_video
from owl2.serve.admission import current_client
from owl2.serve.config import ServerLimits
from owl2.serve.errors import ApiError
from owl2.serve.image_decoder import ForkServer, ImageBudget, SandboxedImageDecoder
from owl2.serve.protocol import ChatCompletionRequest
from tests.serve.image_hosts import FakeNetwork, http_reply, run_host
from tests.serve.images import encode, noise
from tests.serve.running import request_images, wait_until
from tests.serve.test_image_decoder import decoder_pids
from tests.videos import SHADES, make_gif, make_video

SIZE = 8
PROCESSOR = Owl2ImageProcessor(SIZE)


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return make_video(tmp_path_factory.mktemp("video") / "x.mp4")


def uri(data, kind="video/mp4"):
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def video_part(url):
    return {"type": "video_url", "video_url": {"url": url}}


def image_part():
    return {"type": "image_url", "image_url": {"url": uri(encode(noise()), "image/png")}}


def text(value):
    return {"type": "text", "text": value}


def messages(*parts):
    return [{"role": "user", "content": list(parts)}]


def opened(parts, network=None, **limits):
    async def run():
        images = request_images(PROCESSOR, network, **limits)
        try:
            fields = {"model": "m", "messages": messages(*parts)}
            return await images.messages(ChatCompletionRequest.model_validate(fields).messages)
        finally:
            images.decoder.close()

    return asyncio.run(run())


def decode(data, processor=PROCESSOR, **limits):
    limits = ServerLimits(**limits)
    decoder = SandboxedImageDecoder(limits, processor)
    try:
        return asyncio.run(decoder.decode_video(data, ImageBudget.of_request(limits)))
    finally:
        decoder.close()


def error_of(url, **options):
    with pytest.raises(ApiError) as caught:
        opened([text("x"), video_part(url)], **options)
    assert caught.value.status == 400
    assert caught.value.param == "messages.0.content.1.video_url.url"
    return caught.value.code


def same_prompt(first, second):
    assert first.ids == second.ids
    assert first.image_digests == second.image_digests


# ------------------------------------------------------------------ equality


@pytest.mark.parametrize("layout", ["video first", "image first", "video last"])
def test_prompt_of_a_request_is_that_of_the_engine(tiny_engine, tmp_path, video, layout):
    photo = tmp_path / "a.png"
    photo.write_bytes(encode(noise()))
    order = {"video first": "vit", "image first": "ivt", "video last": "tv"}[layout]
    requested = {"v": video_part(uri(video.read_bytes())), "i": image_part(), "t": text("what?")}
    local = {
        "v": {"type": "video", "path": str(video), "num_frames": 3},
        "i": {"type": "image", "path": str(photo)},
        "t": text("what?"),
    }
    given = opened([requested[one] for one in order], num_frames=3)
    expected = messages(*(local[one] for one in order))
    same_prompt(tiny_engine.encode(given), tiny_engine.encode(expected))


@pytest.mark.parametrize("make", [make_video, make_gif])
def test_frames_have_the_pixels_of_the_engine(tmp_path, make):
    path = make(tmp_path / ("x.mp4" if make is make_video else "x.gif"))
    frames = decode(path.read_bytes(), num_frames=5)
    pixels = PROCESSOR(frames, return_tensors="np")["pixel_values"]
    expected = PROCESSOR(load_video(path, 5), return_tensors="np")["pixel_values"]
    np.testing.assert_array_equal(pixels, expected)
    assert np.ptp(pixels) > 0.5


def test_complete_frames_for_models_that_crop(video):
    class Complete(Owl2ImageProcessor):
        makes_crops = True

    frames = decode(video.read_bytes(), Complete(SIZE), num_frames=3)
    assert [frame.tobytes() for frame in frames] == [one.tobytes() for one in load_video(video, 3)]


def test_answer_equals_the_engines_with_and_without_stream(client, tiny_engine, video):
    question = user_message("what is this?", videos=[video])
    options = {"max_new_tokens": 12, "temperature": 0}
    expected = tiny_engine.chat([question], **options)
    parts = messages(video_part(uri(video.read_bytes())), text("what is this?"))
    request = {"model": "tiny", "messages": parts, "max_tokens": 12, "temperature": 0}
    reply = client.chat.completions.create(**request)
    assert reply.choices[0].message.content == expected
    chunks = client.chat.completions.create(**request, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
    black = user_message("what is this?", load_video(video, 1) * 8)
    assert tiny_engine.chat([black], **options) != expected  # the frames matter


def test_batch_of_videos_equals_single_ones(tiny_engine, tmp_path, video):
    reverse = make_video(tmp_path / "r.mp4", shades=SHADES[::-1])
    conversations = [
        [user_message("what?", videos=[video], num_frames=3)],
        [user_message("what is this?", videos=[reverse], num_frames=5)],
        [user_message("what?", [Image.new("RGB", (8, 8), "red")], [video, reverse], 2)],
        [user_message("what?")],
    ]
    options = {"max_new_tokens": 10, "temperature": 0}
    expected = [tiny_engine.chat(one, **options) for one in conversations]
    assert tiny_engine.batch(conversations, **options) == expected
    assert ["".join(tiny_engine.stream(one, **options)) for one in conversations] == expected
    assert len(set(expected)) > 2
    frames = [user_message("what?", load_video(video, 3))]
    choices = ["yes", "no", "red"]
    assert tiny_engine.score(conversations[0], choices) == tiny_engine.score(frames, choices)


# ------------------------------------------------------------------ rejected videos


@pytest.mark.parametrize(
    ("url", "code"),
    [
        ("data:video/mp4;base64,", "invalid_video"),
        ("data:video/mp4;base64", "invalid_video_url"),
        ("data:video/mp4;base64,a", "invalid_base64"),
        ("data:video/mp4;base64,AAAA", "invalid_video"),
        (uri(encode(noise()), "video/mp4"), "invalid_video"),
        (uri(b"#EXTM3U\n#EXTINF:3,\nfile:///etc/passwd\n"), "invalid_video"),
        ("file:///etc/passwd", "invalid_video_url"),
        ("/etc/passwd", "invalid_video_url"),
        ("http://example.org/a.mp4", "invalid_video_url"),
    ],
)
def test_invalid_urls_and_videos_are_rejected(url, code):
    assert error_of(url) == code


def test_local_video_is_never_opened(video):
    for form in (str(video), video.as_uri()):
        assert error_of(form, allow_remote_images=True) == "invalid_video_url"


def test_remote_videos_follow_the_rules_of_images(video):
    data = video.read_bytes()
    with run_host(http_reply(body=data), http_reply(body=data)) as (port, _):
        options = {"network": FakeNetwork(port), "allow_remote_images": True, "num_frames": 2}
        [message] = opened([video_part("http://good.test/")], **options)
        assert len(message["content"][0]["video"]) == 2
        limit = {"max_video_bytes": len(data) - 1}
        assert error_of("http://good.test/", **options, **limit) == "video_too_large"
    network = FakeNetwork(9)
    assert error_of("http://good.test/", network=network) == "invalid_video_url"
    assert network.connected == []


@pytest.mark.parametrize(
    "limits",
    [
        {"max_video_bytes": 1000},
        {"max_video_seconds": 2.5},
        {"max_video_frames": 29},
        {"max_image_pixels": 32 * 32 - 1},
        {"max_request_pixels": 2 * 32 * 32 - 1},
        {"image_decode_timeout": 1e-3},
    ],
    ids=str,
)
def test_limits_of_a_video(video, limits):
    assert error_of(uri(video.read_bytes()), num_frames=2, **limits) == "video_too_large"
    sizes = {"max_video_bytes": 10**6, "max_video_seconds": 3.0, "max_video_frames": 30}
    sizes |= {"max_image_pixels": 32 * 32, "max_request_pixels": 2 * 32 * 32}
    assert opened([video_part(uri(video.read_bytes()))], num_frames=2, **sizes)


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "gif"])
def test_corrupt_videos_have_frames_or_are_rejected(tmp_path, suffix):
    path = tmp_path / f"x.{suffix}"
    data = (make_gif if suffix == "gif" else make_video)(path).read_bytes()
    random = np.random.default_rng(1)
    for _ in range(8):
        corrupt = bytearray(data)
        for position in random.integers(0, len(data), 20):
            corrupt[position] = random.integers(256)
        try:
            assert len(decode(bytes(corrupt), num_frames=3)) == 3
        except ApiError as error:
            assert error.status == 400
            assert error.code in ("invalid_video", "video_too_large")
    assert len(decode(data, num_frames=3)) == 3


def test_killed_decoder_rejects_only_its_video(monkeypatch, video):
    """As the kernel does when memory runs out."""
    fork = ForkServer.fork

    def fork_and_kill(server):
        before = set(decoder_pids())
        connection = fork(server)
        wait_until(lambda: set(decoder_pids()) - before)
        for pid in set(decoder_pids()) - before:
            os.kill(pid, signal.SIGKILL)
        return connection

    decode(video.read_bytes())  # the fork server has started
    with monkeypatch.context() as patch:
        patch.setattr(ForkServer, "fork", fork_and_kill)
        assert error_of(uri(video.read_bytes())) == "invalid_video"
    assert len(decode(video.read_bytes(), num_frames=2)) == 2


def test_video_with_sound(tmp_path):
    """A decoder cannot import modules of av for the streams that it ignores."""
    path = make_video(tmp_path / "x.mp4", has_sound=True)
    assert len(decode(path.read_bytes(), num_frames=2)) == 2


# ------------------------------------------------------------------ counts and other requests


def test_number_of_videos_and_frames_is_limited_before_decoding(client, tiny_engine):
    broken = video_part(uri(b"no video"))

    def code(count):
        with pytest.raises(BadRequestError) as caught:
            client.chat.completions.create(model="tiny", messages=messages(*[broken] * count))
        return caught.value.code

    assert code(5) == "too_many_videos"
    assert 4 * 8 * tiny_engine.processor.num_image_tokens < tiny_engine.context_length
    assert code(4) == "invalid_video"
    assert code(1) == "invalid_video"


def test_frames_beyond_the_context_are_rejected_before_decoding(tiny_engine):
    from owl2.serve.request_limits import check_limits

    body = {"model": "m", "messages": messages(*[video_part(uri(b"no video"))] * 2)}
    counts = ChatCompletionRequest.model_validate(body).counts()
    for num_frames, is_accepted in ((21, True), (22, False)):
        limits = ServerLimits(num_frames=num_frames)
        try:
            check_limits(limits, 130, **counts, image_tokens=3)
            assert is_accepted
        except ApiError as error:
            assert not is_accepted
            assert error.code == "context_length_exceeded"
            assert "43 fit" in error.message


@pytest.mark.parametrize("decoders", [2, 3])
def test_images_do_not_wait_for_videos(monkeypatch, decoders):
    """Videos are being decoded until `finish`, in all processes but one."""
    finish = threading.Event()
    running = []

    def work(connection):
        with connection, connection.makefile("rb") as stream:
            count = json.loads(stream.readline())["num_frames"]
            stream.read()
            if count:
                running.append(count)
                finish.wait(20)
            connection.sendall(b"decoded 9\n" + bytes(3 * SIZE**2 * (count or 1)))

    def fork(self):
        ours, theirs = socket.socketpair()
        threading.Thread(target=work, args=(theirs,)).start()
        return ours

    monkeypatch.setattr(ForkServer, "fork", fork)
    limits = ServerLimits(image_decoders=decoders, num_frames=4)
    decoder = SandboxedImageDecoder(limits, PROCESSOR)

    async def run():
        current_client.set("a")
        shared = ImageBudget.of_request(limits)
        videos = [asyncio.ensure_future(decoder.decode_video(b"x", shared)) for _ in range(5)]
        while len(running) < decoders - 1:
            await asyncio.sleep(0.001)
        for client in ("a", "b"):
            current_client.set(client)
            await asyncio.wait_for(decoder.decode(b"x", ImageBudget.of_request(limits)), 10)
        assert len(running) == decoders - 1
        finish.set()
        assert [len(frames) for frames in await asyncio.gather(*videos)] == [4] * 5

    asyncio.run(run())
    decoder.close()


@pytest.mark.parametrize("missing", [1, 3 * SIZE**2, 6 * SIZE**2, -1])
def test_incomplete_reply_of_a_decoder(monkeypatch, missing):
    reply = b"decoded 9\n" + bytes(6 * SIZE**2 - missing)
    monkeypatch.setattr(ForkServer, "call", lambda *_: (reply, 0.0))
    with pytest.raises(ApiError) as caught:
        decode(b"x", num_frames=2)
    assert (caught.value.status, caught.value.code) == (400, "invalid_video")
