import json
from pathlib import Path

import pytest

from owl2.data.json_dataset import JsonDataset
from owl2.errors import ErrorCode
from owl2.processing.chat_template import content_to_text, parse_messages
from tests.errors import raises_input_error

GOLDEN = Path(__file__).parents[1] / "golden" / "text" / "cases.json"


def llava(path: Path, *rows: object) -> Path:
    path.write_text(json.dumps(list(rows)), encoding="utf-8")
    return path


def human(value: str, image: object = None, answer: str = "yes") -> dict:
    row: dict = {"conversations": [{"from": "human", "value": value}]}
    row["conversations"].append({"from": "gpt", "value": answer})
    return row if image is None else row | {"image": image}


def lines(path: Path, *rows: object) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def images(sample) -> list[str]:
    return [str(image) for image in parse_messages(sample.messages).images]


def texts(sample) -> list[str]:
    return [content_to_text(turn["content"]) for turn in parse_messages(sample.messages).turns]


# ------------------------------------------------------------------ LLaVA's JSON


def golden_cases() -> list[dict]:
    return json.loads(GOLDEN.read_text(encoding="utf-8"))["cases"]


@pytest.mark.parametrize("case", golden_cases())
def test_text_equals_the_authors_training_code(case, tmp_path):
    row = {"conversations": case["conversation"]}
    if any("<|image|>" in turn["value"] for turn in case["conversation"]):
        row["image"] = "a.png"
    (sample,) = JsonDataset(llava(tmp_path / "chat.json", row))
    assert texts(sample) == [turn["value"] for turn in case["train"]["sources"]]


@pytest.mark.parametrize("mark", ["<image>", "<|image|>"])
@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("M\nwhat?", "<|image|>\nwhat?"),
        ("  what? \n M ", "<|image|>\nwhat?"),
        ("is M red?", "<|image|>\nis  red?"),
        (" M ", "<|image|>"),
    ],
)
def test_a_single_image_comes_first(tmp_path, mark, value, text):
    path = llava(tmp_path / "chat.json", human(value.replace("M", mark), "a.png"))
    assert texts(JsonDataset(path)[0]) == [text, "yes"]


def test_several_images_of_a_turn_keep_their_positions(tmp_path):
    path = llava(tmp_path / "chat.json", human(" A: <image> B: <image>", ["a.png", "b.png"]))
    (sample,) = JsonDataset(path)
    assert texts(sample)[0] == "A: <|image|> B: <|image|>"
    assert images(sample) == [str(tmp_path / "a.png"), str(tmp_path / "b.png")]


def test_images_of_several_turns_keep_their_order(tmp_path):
    row = human("<image>one", ["a.png", "b.png"])
    row["conversations"] += human("two<image>")["conversations"]
    (sample,) = JsonDataset(llava(tmp_path / "chat.json", row))
    assert texts(sample) == ["<|image|>\none", "yes", "<|image|>\ntwo", "yes"]
    assert images(sample) == [str(tmp_path / "a.png"), str(tmp_path / "b.png")]


def test_image_paths_are_relative_to_the_root(tmp_path):
    root = tmp_path / "images"
    root.mkdir()
    path = llava(tmp_path / "chat.json", human("hi"), human("<image>", "deep/a.png"))
    samples = list(JsonDataset(path, root))
    assert images(samples[1]) == [str(root / "deep" / "a.png")]
    assert [sample.source for sample in samples] == [f"{path}, row 1", f"{path}, row 2"]


def test_urls_are_not_changed(tmp_path):
    path = llava(tmp_path / "chat.json", human("<image>", "https://example.org/a.png"))
    (sample,) = JsonDataset(path)
    assert images(sample) == ["https://example.org/a.png"]


@pytest.mark.parametrize(
    ("row", "expected_error"),
    [
        ("a string", (ErrorCode.INVALID_FORMAT,)),
        ({"talk": []}, (ErrorCode.INVALID_FORMAT, "conversations")),
        ({"conversations": "hi"}, (ErrorCode.INVALID_FORMAT, "conversations")),
        ({"conversations": [], "messages": []}, (ErrorCode.CONFLICT, "conversations")),
        ({"conversations": []}, (ErrorCode.EMPTY_MESSAGE,)),
        ({"conversations": ["hi"]}, (ErrorCode.INVALID_TYPE, "value")),
        ({"conversations": [{"from": "human", "value": 3}]}, (ErrorCode.INVALID_TYPE, "value")),
        ({"conversations": [{"from": "robot", "value": "hi"}]}, (ErrorCode.INVALID_ROLE, "robot")),
        (
            {"conversations": [{"from": ["human"], "value": "hi"}]},
            (ErrorCode.INVALID_ROLE, "human"),
        ),
        ({"conversations": [{"from": "gpt", "value": "hi"}]}, (ErrorCode.INVALID_ROLE, "user")),
        ({"conversations": [{"from": "human", "value": "hi"}]}, (ErrorCode.INVALID_ROLE,)),
        (human("no mark", "a.png"), (ErrorCode.IMAGE_COUNT_MISMATCH, "0")),
        (human("<image>"), (ErrorCode.IMAGE_COUNT_MISMATCH, "1")),
        (human("<image><|image|>", "a.png"), (ErrorCode.IMAGE_COUNT_MISMATCH, "2")),
        (human("<image>", {"path": "a.png"}), (ErrorCode.INVALID_TYPE,)),
        (human("<image>", ""), (ErrorCode.INVALID_TYPE,)),
        (human("<image>", "a.png") | {"images": ["a.png"]}, (ErrorCode.CONFLICT, "images")),
        (human("what?", "a.png", answer="<image>"), (ErrorCode.IMAGE_COUNT_MISMATCH, "1")),
    ],
)
def test_an_invalid_llava_row_is_named(tmp_path, row, expected_error):
    path = llava(tmp_path / "chat.json", human("good"), row)
    rows = JsonDataset(path)
    assert texts(rows[0])[1] == "yes"
    with raises_input_error(*expected_error) as caught:
        rows[1]
    assert str(caught.value).startswith(f"{path}, row 2: ")


# ------------------------------------------------------------------ messages


def test_messages_are_not_changed(tmp_path):
    content = [{"type": "image", "path": "a.png"}, {"type": "text", "text": " spaces stay "}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "yes"}]
    path = lines(tmp_path / "chat.jsonl", {"messages": messages, "id": 7})
    (sample,) = JsonDataset(path)
    assert texts(sample) == ["<|image|> spaces stay ", "yes"]
    assert images(sample) == [str(tmp_path / "a.png")]
    assert sample.source == f"{path}, line 1"


@pytest.mark.parametrize(
    ("part", "image"),
    [
        ({"path": "/abs/a.png"}, "/abs/a.png"),
        ({"image": "https://example.org/a.png"}, "https://example.org/a.png"),
        ({"url": "https://example.org/a.png"}, "https://example.org/a.png"),
        ({"image": "data:image/png;base64,AAAA"}, "data:image/png;base64,AAAA"),
    ],
)
def test_only_relative_paths_are_changed(tmp_path, part, image):
    content = [{"type": "image"} | part]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "yes"}]
    (sample,) = JsonDataset(lines(tmp_path / "chat.jsonl", {"messages": messages}))
    assert images(sample) == [image]


def test_line_separators_inside_a_string_and_blank_lines(tmp_path):
    messages = [{"role": "user", "content": "a\u2028b"}, {"role": "assistant", "content": "c"}]
    path = tmp_path / "chat.jsonl"
    line = json.dumps({"messages": messages}, ensure_ascii=False)
    path.write_text(f"{line}\n\n{line}\n", encoding="utf-8")
    samples = list(JsonDataset(path))
    assert [sample.source for sample in samples] == [f"{path}, line 1", f"{path}, line 3"]
    assert texts(samples[0]) == ["a\u2028b", "c"]


@pytest.mark.parametrize(
    ("line", "expected_error"),
    [
        ("{", (ErrorCode.INVALID_FORMAT,)),
        ("[]", (ErrorCode.INVALID_FORMAT,)),
        ("{}", (ErrorCode.INVALID_FORMAT, "messages")),
        ('{"messages": "hi"}', (ErrorCode.INVALID_FORMAT, "messages")),
        ('{"conversations": []}', (ErrorCode.EMPTY_MESSAGE,)),
        ('{"messages": ["hi"]}', (ErrorCode.INVALID_TYPE, "0")),
        ('{"messages": [{"role": "user", "content": "<|image|>"}]}', (ErrorCode.INVALID_ROLE,)),
    ],
)
def test_an_invalid_line_is_named(tmp_path, line, expected_error):
    path = tmp_path / "chat.jsonl"
    good = '{"messages": [{"role":"user","content":"a"},{"role":"assistant","content":"b"}]}'
    path.write_text(f"{good}\n{line}\n")
    rows = JsonDataset(path)
    assert texts(rows[0]) == ["a", "b"]
    with raises_input_error(*expected_error) as caught:
        rows[1]
    assert str(caught.value).startswith(f"{path}, line 2: ")


IMAGE = {"type": "image"}


def question(*parts: object) -> dict:
    answer = {"role": "assistant", "content": "yes"}
    return {"messages": [{"role": "user", "content": list(parts)}, answer]}


def test_bare_image_parts_use_the_images_of_the_row(tmp_path):
    row = question(IMAGE, {"type": "text", "text": "or"}, IMAGE) | {"images": ["a.png", "b.png"]}
    (sample,) = JsonDataset(lines(tmp_path / "chat.jsonl", row))
    assert texts(sample) == ["<|image|>or<|image|>", "yes"]
    assert images(sample) == [str(tmp_path / "a.png"), str(tmp_path / "b.png")]


@pytest.mark.parametrize(
    ("row", "expected_error"),
    [
        (question(IMAGE) | {"images": ["a.png", "b.png"]}, (ErrorCode.IMAGE_COUNT_MISMATCH, "2")),
        # A mark in a text is LLaVA's; trained as a word, it would teach to write it.
        (
            question({"type": "text", "text": "<image>?"}) | {"images": ["a.png"]},
            (ErrorCode.IMAGE_COUNT_MISMATCH, "0"),
        ),
        (question(IMAGE, IMAGE) | {"images": ["a.png"]}, (ErrorCode.IMAGE_COUNT_MISMATCH, "2")),
        (question(IMAGE | {"path": 3}), (ErrorCode.INVALID_TYPE,)),
    ],
)
def test_the_number_of_images_must_match_the_messages(tmp_path, row, expected_error):
    rows = JsonDataset(lines(tmp_path / "chat.jsonl", row))
    with raises_input_error(*expected_error):
        rows[0]


# ------------------------------------------------------------------ both, and captions


def test_json_and_jsonl_accept_the_same_rows(tmp_path):
    rows = (human("<image>hi", "a.png"), question(IMAGE) | {"images": ["a.png"]})
    one = JsonDataset(llava(tmp_path / "chat.json", *rows))
    two = JsonDataset(lines(tmp_path / "chat.jsonl", *rows))
    assert [sample.messages for sample in one] == [sample.messages for sample in two]
    assert texts(one[0]) == ["<|image|>\nhi", "yes"]


def test_a_caption_becomes_the_answer(tmp_path):
    path = lines(tmp_path / "captions.jsonl", {"image": "a.png", "caption": " a red circle\n"})
    (sample,) = JsonDataset(path)
    assert texts(sample) == ["<|image|>", "a red circle"]
    assert images(sample) == [str(tmp_path / "a.png")]


@pytest.mark.parametrize(
    ("row", "expected_error", "code"),
    [
        ({"image": "a.png", "caption": " "}, (ErrorCode.EMPTY_MESSAGE,), ErrorCode.EMPTY_MESSAGE),
        ({"caption": "a"}, (ErrorCode.IMAGE_COUNT_MISMATCH, "0"), ErrorCode.IMAGE_COUNT_MISMATCH),
        (
            {"image": ["a.png", "b.png"], "text": "a"},
            (ErrorCode.IMAGE_COUNT_MISMATCH, "2"),
            ErrorCode.IMAGE_COUNT_MISMATCH,
        ),
        (human("<image>"), (ErrorCode.IMAGE_COUNT_MISMATCH, "1"), ErrorCode.IMAGE_COUNT_MISMATCH),
        (
            {"conversations": [{"from": "gpt", "value": 3}]},
            (ErrorCode.INVALID_TYPE,),
            ErrorCode.INVALID_TYPE,
        ),
        (
            {"conversations": [{"from": "me", "value": "hi"}]},
            (ErrorCode.INVALID_ROLE, "me"),
            ErrorCode.INVALID_ROLE,
        ),
    ],
)
def test_errors_have_codes(tmp_path, row, expected_error, code):
    path = lines(tmp_path / "captions.jsonl", row)
    with raises_input_error(*expected_error) as caught:
        JsonDataset(path)[0]
    assert caught.value.code == code
    assert str(caught.value).startswith(f"{path}, line 1: ")
