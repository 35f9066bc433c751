"""Invalid rows are named with their file and position."""

import pytest

from owl2.data.json_dataset import JsonDataset
from owl2.data.sample import InvalidSample, get_or_invalid
from owl2.errors import ErrorCode
from tests.data.rows import IMAGE, human, lines, llava, question, texts
from tests.errors import raises_input_error

IMAGE_COUNT = ErrorCode.IMAGE_COUNT_MISMATCH
TEXT_WITH_IMAGE = {"type": "text", "text": "<image>?"}


@pytest.mark.parametrize("write", [llava, lines])
@pytest.mark.parametrize(
    ("row", "code", "needle"),
    [
        ("a string", ErrorCode.INVALID_FORMAT, "str"),
        ([], ErrorCode.INVALID_FORMAT, "list"),
        ({}, ErrorCode.INVALID_FORMAT, "messages"),
        ({"talk": []}, ErrorCode.INVALID_FORMAT, "conversations"),
        ({"conversations": [], "messages": []}, ErrorCode.CONFLICT, "conversations"),
        # conversations
        ({"conversations": "hi"}, ErrorCode.INVALID_FORMAT, "conversations"),
        ({"conversations": []}, ErrorCode.EMPTY_MESSAGE, ""),
        ({"conversations": ["hi"]}, ErrorCode.INVALID_TYPE, "conversations[0]"),
        ({"conversations": [{"from": "human", "value": 3}]}, ErrorCode.INVALID_TYPE, "value"),
        ({"conversations": [{"from": "robot", "value": "hi"}]}, ErrorCode.INVALID_ROLE, "robot"),
        ({"conversations": [{"from": ["human"], "value": "a"}]}, ErrorCode.INVALID_ROLE, "human"),
        ({"conversations": [{"from": "gpt", "value": "hi"}]}, ErrorCode.INVALID_ROLE, "user"),
        ({"conversations": [{"from": "human", "value": "hi"}]}, ErrorCode.INVALID_ROLE, ""),
        (human("hi", answer=None), ErrorCode.EMPTY_MESSAGE, ""),
        (human("no placeholder", "a.png"), IMAGE_COUNT, "0"),
        (human("<image>"), IMAGE_COUNT, "1"),
        (human("<image><|image|>", "a.png"), IMAGE_COUNT, "2"),
        (human("<image>", ""), IMAGE_COUNT, "0"),
        (human("what?", "a.png", answer="<image>"), IMAGE_COUNT, "1"),
        (human("<image>", {"path": "a.png"}), ErrorCode.INVALID_TYPE, ""),
        (human("<image>", "a.png") | {"images": ["a.png"]}, ErrorCode.CONFLICT, "images"),
        # messages
        ({"messages": "hi"}, ErrorCode.INVALID_FORMAT, "messages"),
        ({"messages": ["hi"]}, ErrorCode.INVALID_TYPE, "messages[0]"),
        ({"messages": [{"role": "user", "content": "hi"}]}, ErrorCode.INVALID_ROLE, ""),
        ({"messages": [{"role": "user", "content": "<|image|>"}]}, IMAGE_COUNT, "1"),
        (question(IMAGE) | {"images": ["a.png", "b.png"]}, IMAGE_COUNT, "2"),
        (question(TEXT_WITH_IMAGE), IMAGE_COUNT, "0"),
        (question(IMAGE, TEXT_WITH_IMAGE) | {"images": ["a.png"]}, IMAGE_COUNT, "2"),
        (question(IMAGE, IMAGE) | {"images": ["a.png"]}, IMAGE_COUNT, "2"),
        (question(IMAGE | {"path": 3}), ErrorCode.INVALID_TYPE, ""),
        # captions
        ({"image": "a.png", "caption": " "}, ErrorCode.EMPTY_MESSAGE, ""),
        ({"image": "a.png", "caption": "<image>\na"}, IMAGE_COUNT, "2"),
        (
            {"image": "a.png", "question": "what?", "text": "a"},
            ErrorCode.INVALID_FORMAT,
            "question",
        ),
        ({"caption": "a"}, IMAGE_COUNT, "0"),
        ({"image": ["a.png", "b.png"], "text": "a"}, IMAGE_COUNT, "2"),
    ],
)
def test_an_invalid_row_is_named(tmp_path, write, row, code, needle):
    path = write(tmp_path / f"rows.{'json' if write is llava else 'jsonl'}", human("good"), row)
    rows = JsonDataset(path)
    assert texts(rows[0]) == ["good", "yes"]
    with raises_input_error(code, needle) as caught:
        rows[1]
    assert str(caught.value).startswith(f"{path}, {'row' if write is llava else 'line'} 2: ")


def test_a_line_that_is_not_json_is_named(tmp_path):
    path = lines(tmp_path / "chat.jsonl", human("good"))
    path.write_text(f"{path.read_text()}{{\n")
    with raises_input_error(ErrorCode.INVALID_FORMAT, f"{path}, line 2: "):
        JsonDataset(path)[1]


def test_colon_in_the_path_of_a_row(tmp_path):
    path = tmp_path / "data: v2.jsonl"
    path.write_text("{}\n")
    found = get_or_invalid(JsonDataset(path), 0)
    assert isinstance(found, InvalidSample)
    assert (found.source, found.code) == (f"{path}, line 1", ErrorCode.INVALID_FORMAT)
    assert "v2" not in found.reason
