"""Names from which the images of responses are found again."""

import base64
import io

import pytest
from PIL import Image

from owl2.eval.fingerprints import image_digest
from owl2.eval.image_refs import find_image, image_names
from owl2.eval.samples import EvalSample, Response
from owl2.eval.video import VideoFrame, frame_files
from owl2.processing.image_io import load_image
from owl2.processing.messages import parse_messages


def response(part):
    """A response to a sample with one image."""
    messages = [{"role": "user", "content": [{"type": "image", **part}]}]
    digests = [image_digest(image) for image in parse_messages(messages).images]
    return Response(EvalSample("1", "?", messages, ()), "", "", digests)


def names_of(directory, *parts):
    return [name for part in parts for name in image_names(response(part), directory)]


@pytest.fixture
def inline():
    """An image in base64 that is larger than a copy."""
    data = io.BytesIO()
    Image.new("RGB", (1000, 500), "red").save(data, "PNG")
    return {"base64": base64.b64encode(data.getvalue()).decode()}


def test_files_and_urls_keep_their_names(tmp_path, images):
    path = str(images / "red.png")
    url = {"url": "https://owl2.invalid/a.png"}
    names = names_of(tmp_path, {"path": path}, url)
    assert names == [path, "https://owl2.invalid/a.png"]
    assert find_image(path, tmp_path) == path
    assert list(tmp_path.iterdir()) == []


def test_frame_of_a_video_is_found_by_its_name(tmp_path):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:], duration=500)
    sampled, run = frame_files(tmp_path / "x.gif", 2), tmp_path / "run"
    names = names_of(run, *({"image": frame} for frame in sampled))
    assert [find_image(name, run) for name in names] == sampled
    assert isinstance(sampled[0], VideoFrame)
    assert image_digest(sampled[0]) != image_digest(sampled[1])


def test_image_without_a_name_is_copied_once(tmp_path, inline):
    [one, two] = names_of(tmp_path, inline, inline)
    assert one == two
    copy = find_image(one, tmp_path)
    assert copy.parent == tmp_path / "images"
    assert len(list(copy.parent.iterdir())) == 1
    assert load_image(copy).size == (320, 160)
    assert load_image(copy).getpixel((9, 9))[0] > 240
