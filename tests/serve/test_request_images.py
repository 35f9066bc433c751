"""Images of requests, and that the answer is the engine's to the same file."""

import asyncio
import base64
import io
import time

import numpy as np
import pytest
from PIL import Image

from owl2.processing.image_processing import Owl2ImageProcessor
from owl2.serve.config import ServerLimits
from owl2.serve.errors import ApiError
from owl2.serve.image_fetch import Network
from owl2.serve.protocol import ChatMessage
from owl2.serve.request_images import Images
from tests.serve.test_image_fetch import PUBLIC, Stub, http, redirect, serving

LIKE = Owl2ImageProcessor(8)


def image(seed=0, size=(31, 17), mode="RGB"):
    width, height = size
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 4), dtype=np.uint8)
    return Image.fromarray(values, "RGBA").convert(mode)


def saved(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def data_uri(data, head="data:image/png;base64,"):
    return head + base64.b64encode(data).decode()


def turn(*parts, role="user"):
    """A part that has a colon or a slash is an image's URL."""
    content = [
        {"type": "image_url", "image_url": {"url": part}}
        if set(part) & {":", "/"}
        else {"type": "text", "text": part}
        for part in parts
    ]
    return {"role": role, "content": content}


def opened(*turns, network=None, **limits):
    async def work():
        images = Images(ServerLimits(**limits), LIKE, network)
        try:
            return await images.messages([ChatMessage.model_validate(turn) for turn in turns])
        finally:
            images.close()

    return asyncio.run(work())


def refused(url, **options):
    with pytest.raises(ApiError) as caught:
        opened(turn("first"), turn("x", url), **options)
    assert caught.value.status == 400
    assert caught.value.param == "messages.1.content.1.image_url.url"
    assert len(caught.value.message) < 500
    return caught.value


def test_messages_as_the_engine_takes_them():
    files = [saved(image(seed)) for seed in range(3)]
    uris = [data_uri(file) for file in files]
    messages = opened(
        {"role": "developer", "content": "rules"},
        turn(uris[0], "and", uris[1], "what"),
        turn("this", role="assistant"),
        turn(uris[2], uris[0]),
    )
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user"]
    assert messages[0]["content"] == [{"type": "text", "text": "rules"}]
    assert messages[2]["content"] == [{"type": "text", "text": "this"}]
    kinds = [[part["type"] for part in message["content"]] for message in messages]
    assert kinds[1:] == [["image", "text", "image", "text"], ["text"], ["image", "image"]]
    got = [part["image"] for turn in messages for part in turn["content"] if "image" in part]
    for image, number in zip(got, [0, 1, 2, 0], strict=True):
        assert image.size == (8, 8)
        ours, file = (LIKE(one, "np")["pixel_values"] for one in (image, files[number]))
        np.testing.assert_array_equal(ours, file)


@pytest.mark.parametrize(
    "head",
    ["data:image/png;base64,", "data:;base64,", "DATA:IMAGE/PNG;BASE64,", "data:a/b;c=d;base64,"],
)
def test_heads_of_data_uris(head):
    assert opened(turn(data_uri(saved(image()), head)))


def test_data_uris_with_breaks_and_percents():
    uri = data_uri(saved(image()))
    broken = uri[:60] + "\n" + uri[60:]
    quoted = uri.replace("+", "%2B").replace("/", "%2F").replace("=", "%3D")
    quoted = quoted.replace("data:image%2Fpng", "data:image/png")
    for form in (broken, quoted):
        assert opened(turn(form))


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
def test_what_is_no_image_is_refused(url, code):
    assert refused(url).code == code


@pytest.mark.parametrize("form", ["{}", "file://{}", "FILE:{}", "file://localhost{}", " {}"])
def test_no_file_of_the_server_is_opened(tmp_path, form):
    path = tmp_path / "image.png"
    path.write_bytes(saved(image()))
    for remote in (False, True):
        error = refused(form.format(path), allow_remote_images=remote)
        assert error.code == "invalid_image_url"
        assert "paths and other things are not read" in error.message


def test_a_bare_base64_string_is_no_url():
    bare = "/" + base64.b64encode(saved(image())).decode()
    assert refused(bare).code == "invalid_image_url"


def test_limits_of_bytes_and_pixels():
    data = saved(image())
    assert refused(data_uri(data), max_image_bytes=len(data) - 1).code == "image_too_large"
    assert refused(data_uri(data), max_image_pixels=31 * 17 - 1).code == "image_too_large"
    assert opened(turn(data_uri(data)), max_image_bytes=len(data), max_image_pixels=31 * 17)


def test_remote_images_where_they_are_allowed():
    data = saved(image())
    with serving(redirect("/there.png"), http(body=data)) as (port, _):
        network = Stub(port)
        [message] = opened(turn("http://good.test/"), network=network, allow_remote_images=True)
    [part] = message["content"]
    ours, file = (LIKE(one, "np")["pixel_values"] for one in (part["image"], data))
    np.testing.assert_array_equal(ours, file)
    assert network.reached == [(PUBLIC, 80)] * 2


def test_nothing_is_fetched_unless_the_server_says_so():
    network = Stub(9)
    assert "fetches no images" in refused("http://good.test/", network=network).message
    assert (network.asked, network.reached) == ([], [])


def test_remote_images_are_decoded_with_the_same_care():
    with serving(http(body=b"no image"), redirect("file:///etc/passwd")) as (port, _):
        options = {"network": Stub(port), "remote": True}
        assert refused("http://good.test/", **options).code == "invalid_image"
        assert refused("http://good.test/", **options).code == "invalid_image_url"


def test_a_look_up_that_hangs_does_not_hang_the_request():
    class Slow(Network):
        def resolve(self, host, port):
            time.sleep(2.5)
            return []

    begin = time.monotonic()

    async def work():
        images = Images(
            ServerLimits(allow_remote_images=True, image_fetch_timeout=0.1), LIKE, Slow()
        )
        try:
            message = ChatMessage.model_validate(turn("http://slow.test/"))
            await images.messages([message])
        except ApiError as error:
            return error, time.monotonic() - begin
        finally:
            images.close()

    error, seconds = asyncio.run(work())
    assert error.code == "invalid_image_url"
    assert seconds < 2


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
def test_the_answer_is_the_engines_to_the_same_file(
    tmp_path, client, tiny_engine, kind, mode, options
):
    answers = set()
    for seed in range(3):
        path = tmp_path / f"{seed}.file"
        path.write_bytes(saved(image(seed, (30 + 9 * seed, 17), mode), kind, **options))
        asked = {"type": "text", "text": "what is this?"}
        part = {"type": "image", "path": str(path)}
        expected = tiny_engine.chat(
            [{"role": "user", "content": [part, asked]}], max_new_tokens=12, temperature=0
        )
        url = {"type": "image_url", "image_url": {"url": data_uri(path.read_bytes())}}
        reply = client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": [url, asked]}],
            max_tokens=12,
            temperature=0,
        )
        assert reply.choices[0].message.content == expected
        answers.add(expected)
    assert len(answers) > 1  # or the images would change nothing
