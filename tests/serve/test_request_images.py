"""Images of requests: decoded messages, rejected URLs, and answers equal to the engine's."""

import asyncio
import base64
import socket
import threading
import time

import numpy as np
import pytest

from owl2.processing.image_processing import Owl2ImageProcessor
from owl2.serve.errors import ApiError
from owl2.serve.image_decoder import SandboxedImageDecoder
from owl2.serve.protocol import ChatCompletionRequest
from tests.serve.image_hosts import PUBLIC, FakeNetwork, http_reply, redirect, run_host
from tests.serve.images import data_uri, encode, noise
from tests.serve.running import request_images

PROCESSOR = Owl2ImageProcessor(8)


def message(*parts, role="user"):
    """Parts with a colon or a slash are URLs of images."""
    content = [
        {"type": "image_url", "image_url": {"url": part}}
        if set(part) & {":", "/"}
        else {"type": "text", "text": part}
        for part in parts
    ]
    return {"role": role, "content": content}


def decode(*messages, network=None, **limits):
    async def run():
        images = request_images(PROCESSOR, network, **limits)
        try:
            fields = {"model": "m", "messages": list(messages)}
            return await images.messages(ChatCompletionRequest.model_validate(fields).messages)
        finally:
            images.decoder.close()

    return asyncio.run(run())


def error_of(url, **options):
    with pytest.raises(ApiError) as caught:
        decode(message("first"), message("x", url), **options)
    assert caught.value.status == 400
    assert caught.value.param == "messages.1.content.1.image_url.url"
    assert len(caught.value.message) < 500
    return caught.value


def assert_same_pixels(image, file):
    ours, expected = (PROCESSOR(one, return_tensors="np")["pixel_values"] for one in (image, file))
    np.testing.assert_array_equal(ours, expected)


def test_messages_have_the_engines_format():
    files = [encode(noise(seed)) for seed in range(3)]
    uris = [data_uri(file) for file in files]
    messages = decode(
        {"role": "developer", "content": "rules"},
        message(uris[0], "and", uris[1], "what"),
        message("this", role="assistant"),
        message(uris[2], uris[0]),
        {"role": "tool", "tool_call_id": "1", "content": "a result"},
    )
    assert [one["role"] for one in messages] == ["system", "user", "assistant", "user", "user"]
    assert messages[0]["content"] == [{"type": "text", "text": "rules"}]
    assert messages[2]["content"] == [{"type": "text", "text": "this"}]
    kinds = [[part["type"] for part in one["content"]] for one in messages]
    assert kinds[1:4] == [["image", "text", "image", "text"], ["text"], ["image", "image"]]
    images = [part["image"] for one in messages for part in one["content"] if "image" in part]
    for image, index in zip(images, [0, 1, 2, 0], strict=True):
        assert image.size == (8, 8)
        assert_same_pixels(image, files[index])


@pytest.mark.parametrize(
    "header",
    ["data:image/png;base64,", "data:;base64,", "DATA:IMAGE/PNG;BASE64,", "data:a/b;c=d;base64,"],
)
def test_headers_of_data_uris(header):
    assert decode(message(data_uri(encode(noise()), header)))


def test_percent_encoding_takes_no_long_time():
    uri = "data:image/png;base64," + "%41" * 2_000_000
    start = time.process_time()
    assert error_of(uri).code == "invalid_base64"
    assert time.process_time() - start < 1  # 3.5 seconds with `unquote`


def test_data_uris_with_line_breaks_and_percent_encoding():
    uri = data_uri(encode(noise()))
    quoted = uri.replace("+", "%2B").replace("/", "%2F").replace("=", "%3D")
    for form in (
        uri[:60] + "\n" + uri[60:],
        uri[:60] + "%0d%0A" + uri[60:].replace("=", "%3d"),
        quoted.replace("data:image%2Fpng", "data:image/png"),
    ):
        assert decode(message(form))


@pytest.mark.parametrize(
    ("url", "code"),
    [
        ("data:image/png;base64,", "invalid_image"),
        ("data:image/png;base64", "invalid_image_url"),
        ("data:image/png,abc", "invalid_image_url"),
        ("data:,", "invalid_image_url"),
        ("data:" + "x" * 100_000 + ",", "invalid_image_url"),
        ("data:image/png;base64,a", "invalid_base64"),
        ("data:image/png;base64,ab=c", "invalid_base64"),
        ("data:image/png;base64,äöü=", "invalid_base64"),
        ("data:image/png;base64,AA!AA", "invalid_base64"),
        ("data:image/png;base64,AAAA", "invalid_image"),
        ("data:image/png;base64," + "AAAA" * 1000, "invalid_image"),
        ("file:///etc/passwd", "invalid_image_url"),
        ("/etc/passwd", "invalid_image_url"),
        ("../../etc/passwd", "invalid_image_url"),
        ("ftp://example.org/a.png", "invalid_image_url"),
        ("http://example.org/a.png", "invalid_image_url"),
        ("HTTPS://example.org/a.png", "invalid_image_url"),
    ],
)
def test_invalid_urls_and_images_are_rejected(url, code):
    assert error_of(url).code == code


@pytest.mark.parametrize("form", ["{}", "file://{}", "FILE:{}", "file://localhost{}", " {}"])
@pytest.mark.parametrize("allowed", [False, True])
def test_files_of_the_server_are_never_opened(tmp_path, form, allowed):
    path = tmp_path / "image.png"
    path.write_bytes(encode(noise()))
    assert error_of(form.format(path), allow_remote_images=allowed).code == "invalid_image_url"


def test_base64_without_header_is_rejected():
    bare = "/" + base64.b64encode(encode(noise())).decode()
    assert error_of(bare).code == "invalid_image_url"


def test_limits_on_bytes_and_pixels():
    data = encode(noise())
    assert error_of(data_uri(data), max_image_bytes=len(data) - 1).code == "image_too_large"
    assert error_of(data_uri(data), max_image_pixels=40 * 30 - 1).code == "image_too_large"
    assert decode(message(data_uri(data)), max_image_bytes=len(data), max_image_pixels=40 * 30)


def test_remote_images_are_fetched_if_allowed():
    data = encode(noise())
    with run_host(redirect("/there.png"), http_reply(body=data)) as (port, _):
        network = FakeNetwork(port)
        [one] = decode(message("http://good.test/"), network=network, allow_remote_images=True)
    assert_same_pixels(one["content"][0]["image"], data)
    assert network.connected == [(PUBLIC, 80)] * 2


@pytest.mark.parametrize(("size", "is_accepted"), [(4.0, True), (3.9, False), (0.9, False)])
def test_fetched_files_count_as_data_of_unfinished_requests(monkeypatch, size, is_accepted):
    """A client has at most half of the limit, or one file."""
    data = encode(noise())
    decode_file = SandboxedImageDecoder.decode

    async def wait_and_decode(*arguments):  # both files are in memory
        await asyncio.sleep(0.3)
        return await decode_file(*arguments)

    monkeypatch.setattr(SandboxedImageDecoder, "decode", wait_and_decode)
    with run_host(*[http_reply(body=data)] * 2) as (port, _):
        limits = {"allow_remote_images": True, "max_inflight_bytes": int(size * len(data))}
        network = FakeNetwork(port)
        if is_accepted:
            assert decode(message(*["http://good.test/"] * 2), network=network, **limits)
            return
        with pytest.raises(ApiError) as caught:
            decode(message(*["http://good.test/"] * 2), network=network, **limits)
    assert (caught.value.status, caught.value.code) == (429, "rate_limit_exceeded")


def test_remote_images_are_not_fetched_by_default():
    network = FakeNetwork(9)
    assert error_of("http://good.test/", network=network).code == "invalid_image_url"
    assert (network.resolved, network.connected) == ([], [])


def test_remote_images_are_checked_like_others():
    with run_host(http_reply(body=b"no image"), redirect("file:///etc/passwd")) as (port, _):
        options = {"network": FakeNetwork(port), "allow_remote_images": True}
        assert error_of("http://good.test/", **options).code == "invalid_image"
        assert error_of("http://good.test/", **options).code == "invalid_image_url"


def test_images_after_an_invalid_one_are_not_decoded(monkeypatch):
    started = []
    decode = SandboxedImageDecoder.decode

    async def counted(self, *arguments):
        await asyncio.sleep(0.05)
        started.append(arguments)
        return await decode(self, *arguments)

    async def run():
        monkeypatch.setattr(SandboxedImageDecoder, "decode", counted)
        images = request_images(PROCESSOR)
        content = message(data_uri(encode(noise())), "file:///etc/passwd")
        request = ChatCompletionRequest.model_validate({"model": "m", "messages": [content]})
        with pytest.raises(ApiError):
            await images.messages(request.messages)
        await asyncio.sleep(0.2)
        images.decoder.close()

    asyncio.run(run())
    assert started == []


def test_slow_name_lookup_does_not_block_the_request(monkeypatch):
    finish = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: finish.wait(10) and [])
    limits = {"allow_remote_images": True, "image_fetch_timeout": 0.1}
    start = time.monotonic()
    try:
        error = error_of("http://slow.test/", **limits)
        assert time.monotonic() - start < 5
    finally:
        finish.set()
    assert error.code == "invalid_image_url"


@pytest.mark.parametrize(
    ("kind", "mode", "options"),
    [
        ("PNG", "RGB", {}),
        ("JPEG", "RGB", {"quality": 60}),
        ("WEBP", "RGB", {"quality": 60}),
        ("GIF", "P", {}),
        ("PNG", "RGBA", {}),
        ("TIFF", "L", {}),
    ],
)
def test_answers_equal_the_engines_for_the_same_file(
    tmp_path, client, tiny_engine, kind, mode, options
):
    answers = set()
    question = {"type": "text", "text": "what is this?"}
    for seed in range(3):
        path = tmp_path / f"{seed}.file"
        path.write_bytes(encode(noise(seed, (30 + 9 * seed, 17), mode), kind, **options))
        content = [{"type": "image", "path": str(path)}, question]
        expected = tiny_engine.chat(
            [{"role": "user", "content": content}], max_new_tokens=12, temperature=0
        )
        url = {"type": "image_url", "image_url": {"url": data_uri(path.read_bytes())}}
        reply = client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": [url, question]}],
            max_tokens=12,
            temperature=0,
        )
        assert reply.choices[0].message.content == expected
        answers.add(expected)
    assert len(answers) > 1  # otherwise the images have no effect
