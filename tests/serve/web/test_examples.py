"""Images and questions to begin with."""

import json

import pytest
from PIL import Image

from owl2.errors import InputError
from owl2.serve.web.examples import drawn, read_examples


def test_three_are_drawn_each_with_its_shape(tmp_path):
    examples = drawn(tmp_path / "new")
    assert len({example.question for example in examples}) == 3
    for example in examples:
        [path] = example.images
        colours = Image.open(path).getcolors(100_000)
        largest = sorted((count for count, _ in colours), reverse=True)
        assert largest[0] > largest[1] > 4_000  # the ground, and a shape that one sees


def test_own_ones_are_found_beside_their_file(tmp_path):
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
    ("content", "words"),
    [
        ("{", "cannot be read"),
        ('{"question": "what?"}', "must hold a list"),
        ('["what?"]', "example 1 must be"),
        ('[{"question": "a"}, {"question": " "}]', "example 2 must be"),
        ('[{"question": "a", "image": 5}]', "'image' must be"),
        ('[{"question": "a", "image": [5]}]', "'image' must be"),
        ('[{"question": "a", "image": "none.png"}]', "there is no image at .*none.png"),
    ],
)
def test_what_is_wrong_with_them_is_named(tmp_path, content, words):
    file = tmp_path / "examples.json"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=words):
        read_examples(file)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        read_examples(tmp_path / "none.json")
