"""Example questions with images."""

import json

import pytest
from PIL import Image

from owl2.errors import ErrorCode
from owl2.serve.web.examples import draw_examples, read_examples
from tests.errors import raises_input_error


def test_three_shapes_are_drawn(tmp_path):
    examples = draw_examples(tmp_path / "new")
    assert len({example.question for example in examples}) == 3
    for example in examples:
        [path] = example.images
        colors = Image.open(path).getcolors(100_000)
        largest = sorted((count for count, _ in colors), reverse=True)
        assert largest[0] > largest[1] > 4_000  # the background and a visible shape


def test_image_paths_are_relative_to_the_file(tmp_path):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"x")
    file = tmp_path / "examples.json"
    rows = [
        {"question": "what?", "image": "a.png"},
        {"question": "and both?", "image": ["a.png", str(tmp_path / "b.png")]},
        {"question": "who are you?"},
    ]
    file.write_text(json.dumps(rows), encoding="utf-8")
    found = read_examples(file)
    assert [example.question for example in found] == ["what?", "and both?", "who are you?"]
    assert [len(example.images) for example in found] == [1, 2, 0]
    assert found[1].images[1] == tmp_path / "b.png"


@pytest.mark.parametrize(
    ("content", "code", "needle"),
    [
        ("{", ErrorCode.INVALID_FORMAT, "examples.json"),
        ('{"question": "what?"}', ErrorCode.INVALID_FORMAT, "examples.json"),
        ('["what?"]', ErrorCode.INVALID_FORMAT, "0"),
        ('[{"question": "a"}, {"question": " "}]', ErrorCode.INVALID_FORMAT, "1.question"),
        ('[{"question": "a", "image": 5}]', ErrorCode.INVALID_FORMAT, "0.image"),
        ('[{"question": "a", "image": [5]}]', ErrorCode.INVALID_FORMAT, "0.image"),
        ('[{"question": "a", "image": "none.png"}]', ErrorCode.FILE_NOT_FOUND, "none.png"),
    ],
)
def test_invalid_examples(tmp_path, content, code, needle):
    file = tmp_path / "examples.json"
    file.write_text(content, encoding="utf-8")
    with raises_input_error(code, needle):
        read_examples(file)


def test_missing_file(tmp_path):
    with raises_input_error(ErrorCode.FILE_NOT_FOUND, "none.json"):
        read_examples(tmp_path / "none.json")
