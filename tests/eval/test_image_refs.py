"""Names under which the images of answers are found again."""

import base64
import io

import pytest
from PIL import Image

from owl2.eval.generate import Asked, image_fingerprints
from owl2.eval.image_refs import find_image, named_images
from owl2.eval.samples import Answer, Question
from owl2.eval.video import Frame, frames_of
from owl2.processing.image_io import load_image


def asked(*parts):
    """A question an answer, with one image each."""
    made = [
        Question(str(n), "?", [{"role": "user", "content": [{"type": "image", **part}]}], ())
        for n, part in enumerate(parts)
    ]
    answers = [Answer(question, "", "") for question in made]
    return Asked(answers, [], 0.0, [image_fingerprints(question) for question in made])


@pytest.fixture
def inline():
    """An image larger than a copy, in base64."""
    data = io.BytesIO()
    Image.new("RGB", (1000, 500), "red").save(data, "PNG")
    return {"base64": base64.b64encode(data.getvalue()).decode()}


def test_what_has_a_name_keeps_it(tmp_path, images):
    path = str(images / "red.png")
    url = {"url": "https://owl2.invalid/a.png"}
    names = named_images(asked({"path": path}, url), tmp_path)
    assert names == [[path], ["https://owl2.invalid/a.png"]]
    assert find_image(path, tmp_path) == path
    assert list(tmp_path.iterdir()) == []


def test_a_frame_is_found_again(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:], duration=500)
    made = frames_of(tmp_path / "x.gif", 2)
    one, two = asked(*({"image": frame} for frame in made)), tmp_path / "run"
    names = named_images(one, two)
    assert [find_image(name, two) for [name] in names] == made
    assert isinstance(made[0], Frame)
    assert one.images[0] != one.images[1], "fingerprints are of what is seen"


def test_of_what_has_none_a_small_copy_is_kept_once(tmp_path, inline):
    [[one], [two]] = named_images(asked(inline, inline), tmp_path)
    assert one == two
    copy = find_image(one, tmp_path)
    assert copy.parent == tmp_path / "images"
    assert len(list(copy.parent.iterdir())) == 1
    assert load_image(copy).size == (320, 160)
    assert load_image(copy).getpixel((9, 9))[0] > 240
