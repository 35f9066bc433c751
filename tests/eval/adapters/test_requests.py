"""Requests of lmms-eval: positions of images, videos, sampling parameters, stop strings."""

import pytest
from PIL import Image

from owl2.errors import ErrorCode
from owl2.eval.adapters.requests import load_visuals, sampling_kwargs, to_messages, truncate
from tests.errors import raises_input_error

RED, BLUE = (Image.new("RGB", (4, 4), color) for color in ("red", "blue"))


def rendered(text, images):
    [message] = to_messages(text, images)
    assert message["role"] == "user"
    names = {id(RED): "[red]", id(BLUE): "[blue]"}
    return "".join(
        part["text"] if part["type"] == "text" else names[id(part["image"])]
        for part in message["content"]
    )


@pytest.mark.parametrize(
    ("text", "images", "expected"),
    [
        ("what?", [RED], "[red]what?"),
        ("what?", [RED, BLUE], "[red][blue]what?"),
        ("a <image> b <image>?", [RED, BLUE], "a [red] b [blue]?"),
        ("a <image 2> b <image 1>?", [RED, BLUE], "a [blue] b [red]?"),
        ("a <image>?", [RED, BLUE], "[red][blue]a ?"),
        ("<image><image>x", [RED], "[red]x"),
        ("is <image> a tag?", [], "is <image> a tag?"),
        ("a <|image|> here", [RED], "[red]a  here"),  # not an additional image
    ],
)
def test_positions_of_images(text, images, expected):
    assert rendered(text, images) == expected


def test_videos_become_frames(tmp_path):
    frames = [Image.new("RGB", (8, 8), (n * 20, 0, 0)) for n in range(10)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    (tmp_path / "folder").mkdir()
    for number, frame in enumerate(frames):
        frame.save(tmp_path / "folder" / f"{number}.png")
    assert len(load_visuals([str(tmp_path / "a.gif")], 4)) == 4
    found = load_visuals([str(tmp_path / "folder")], 4)
    assert [path.name for path in found] == ["1.png", "3.png", "6.png", "8.png"]
    assert load_visuals([RED, str(tmp_path / "x.png")], 4) == [RED, tmp_path / "x.png"]
    assert load_visuals(RED, 4) == [RED]
    with raises_input_error(ErrorCode.INVALID_TYPE, "dict"):
        load_visuals([{"array": []}], 4)


@pytest.mark.parametrize(
    ("settings", "options", "until"),
    [
        ({}, {"max_new_tokens": 9, "do_sample": False}, []),
        ({"until": "\n"}, {"max_new_tokens": 9, "do_sample": False}, ["\n"]),
        (
            {"max_new_tokens": 3, "temperature": 0.2, "do_sample": False, "top_p": 0},
            {"max_new_tokens": 3, "do_sample": False},
            [],
        ),
        ({"do_sample": True, "temperature": 0}, {"max_new_tokens": 9, "do_sample": False}, []),
        ({"do_sample": True}, {"max_new_tokens": 9, "do_sample": True}, []),
        (
            {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "max_gen_toks": 5},
            {"max_new_tokens": 5, "do_sample": True, "temperature": 0.7, "top_p": 0.9},
            [],
        ),
    ],
)
def test_sampling_kwargs(settings, options, until):
    before = dict(settings)
    assert sampling_kwargs(settings, 9) == (options, until)
    assert settings == before


def test_truncation_at_stop_strings():
    assert truncate("yes\n\nno. why", ["\n\n", "."]) == "yes"
    assert truncate("a. b\n\n", ["\n\n", "."]) == "a"
    assert truncate("all of it", ["", "\n"]) == "all of it"
