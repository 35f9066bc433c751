import json
from pathlib import Path

import pytest

from owl2.data.readers import read_file, read_llava_json, read_messages_jsonl
from owl2.errors import InputError
from owl2.processing.chat import flat_text, read_messages

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


def pictures(sample) -> list[str]:
    return [str(picture) for picture in read_messages(sample.messages).pictures]


def texts(sample) -> list[str]:
    return [flat_text(turn["content"]) for turn in read_messages(sample.messages).turns]


# ------------------------------------------------------------------ LLaVA's JSON


def golden_cases() -> list[dict]:
    return json.loads(GOLDEN.read_text(encoding="utf-8"))["cases"]


@pytest.mark.parametrize("case", golden_cases())
def test_text_is_what_the_authors_training_code_makes_of_it(case, tmp_path):
    row = {"conversations": case["conversation"]}
    if any("<|image|>" in turn["value"] for turn in case["conversation"]):
        row["image"] = "a.png"
    (sample,) = read_llava_json(llava(tmp_path / "talks.json", row))
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
def test_one_picture_comes_first(tmp_path, mark, value, text):
    path = llava(tmp_path / "talks.json", human(value.replace("M", mark), "a.png"))
    assert texts(read_llava_json(path)[0]) == [text, "yes"]


def test_several_pictures_of_a_turn_keep_their_places_and_order(tmp_path):
    path = llava(tmp_path / "talks.json", human(" A: <image> B: <image>", ["a.png", "b.png"]))
    (sample,) = read_llava_json(path)
    assert texts(sample)[0] == "A: <|image|> B: <|image|>"
    assert pictures(sample) == [str(tmp_path / "a.png"), str(tmp_path / "b.png")]


def test_pictures_of_several_turns_are_taken_in_order(tmp_path):
    row = human("<image>one", ["a.png", "b.png"])
    row["conversations"] += human("two<image>")["conversations"]
    (sample,) = read_llava_json(llava(tmp_path / "talks.json", row))
    assert texts(sample) == ["<|image|>\none", "yes", "<|image|>\ntwo", "yes"]
    assert pictures(sample) == [str(tmp_path / "a.png"), str(tmp_path / "b.png")]


def test_pictures_start_from_the_root_and_source_names_the_row(tmp_path):
    root = tmp_path / "pictures"
    root.mkdir()
    path = llava(tmp_path / "talks.json", human("hi"), human("<image>", "deep/a.png"))
    samples = read_llava_json(path, root)
    assert pictures(samples[1]) == [str(root / "deep" / "a.png")]
    assert [sample.source for sample in samples] == [f"{path}, row 1", f"{path}, row 2"]


def test_urls_stay_urls(tmp_path):
    path = llava(tmp_path / "talks.json", human("<image>", "https://example.org/a.png"))
    (sample,) = read_llava_json(path)
    assert pictures(sample) == ["https://example.org/a.png"]


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ("a string", "list 'conversations'"),
        ({"messages": []}, "list 'conversations'"),
        ({"conversations": []}, "empty"),
        ({"conversations": ["hi"]}, "'from' and a string 'value'"),
        ({"conversations": [{"from": "human", "value": 3}]}, "string 'value'"),
        ({"conversations": [{"from": "robot", "value": "hi"}]}, "from 'robot'"),
        ({"conversations": [{"from": ["human"], "value": "hi"}]}, "from \\['human'\\]"),
        ({"conversations": [{"from": "gpt", "value": "hi"}]}, "'user' is due"),
        ({"conversations": [{"from": "human", "value": "hi"}]}, "no answer"),
        (human("no mark", "a.png"), "marks 0 pictures .* names 1"),
        (human("<image>"), "marks 1 pictures .* names 0"),
        (human("<image><|image|>", "a.png"), "marks 2 pictures .* names 1"),
        (human("<image>", {"path": "a.png"}), "'image' must be"),
        (human("<image>", ""), "'image' must be"),
        (human("what?", "a.png", answer="<image>"), "messages\\[1\\]"),
    ],
)
def test_bad_llava_row_is_named(tmp_path, row, complaint):
    path = llava(tmp_path / "talks.json", human("good"), row)
    with pytest.raises(InputError, match=complaint) as caught:
        read_llava_json(path)
    assert str(caught.value).startswith(f"{path}, row 2: ")


# ------------------------------------------------------------------ messages


def test_messages_are_taken_as_they_are(tmp_path):
    content = [{"type": "image", "path": "a.png"}, {"type": "text", "text": " spaces stay "}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "yes"}]
    path = lines(tmp_path / "talks.jsonl", {"messages": messages, "id": 7})
    (sample,) = read_messages_jsonl(path)
    assert texts(sample) == ["<|image|> spaces stay ", "yes"]
    assert pictures(sample) == [str(tmp_path / "a.png")]
    assert sample.source == f"{path}, line 1"


@pytest.mark.parametrize(
    ("part", "picture"),
    [
        ({"path": "/abs/a.png"}, "/abs/a.png"),
        ({"image": "https://example.org/a.png"}, "https://example.org/a.png"),
        ({"url": "https://example.org/a.png"}, "https://example.org/a.png"),
        ({"image": "data:image/png;base64,AAAA"}, "data:image/png;base64,AAAA"),
    ],
)
def test_only_relative_paths_are_changed(tmp_path, part, picture):
    content = [{"type": "image"} | part]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "yes"}]
    (sample,) = read_messages_jsonl(lines(tmp_path / "talks.jsonl", {"messages": messages}))
    assert pictures(sample) == [picture]


def test_line_separators_inside_a_string_and_blank_lines(tmp_path):
    messages = [{"role": "user", "content": "a\u2028b"}, {"role": "assistant", "content": "c"}]
    path = tmp_path / "talks.jsonl"
    line = json.dumps({"messages": messages}, ensure_ascii=False)
    path.write_text(f"{line}\n\n{line}\n", encoding="utf-8")
    samples = read_messages_jsonl(path)
    assert [sample.source for sample in samples] == [f"{path}, line 1", f"{path}, line 3"]
    assert texts(samples[0]) == ["a\u2028b", "c"]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", "not JSON"),
        ("[]", "list 'messages'"),
        ('{"messages": "hi"}', "list 'messages'"),
        ('{"conversations": []}', "belong in a .json file"),
        ('{"messages": ["hi"]}', "messages\\[0\\]"),
        ('{"messages": [{"role": "user", "content": "<|image|>"}]}', "no answer"),
    ],
)
def test_bad_line_is_named(tmp_path, line, complaint):
    path = tmp_path / "talks.jsonl"
    good = '{"messages": [{"role":"user","content":"a"},{"role":"assistant","content":"b"}]}'
    path.write_text(f"{good}\n{line}\n")
    with pytest.raises(InputError, match=complaint) as caught:
        read_messages_jsonl(path)
    assert str(caught.value).startswith(f"{path}, line 2: ")


# ------------------------------------------------------------------ files


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("talks.txt", b"", "the ending must be"),
        ("talks.json", b"{", "not JSON"),
        ("talks.json", b"{}", "must hold a list"),
        ("talks.json", b"[]", "must hold a list"),
        ("talks.json", b"[" * 100_000, "not JSON: .*recursion"),
        ("talks.json", b"[" + b"1" * 5_000 + b"]", "not JSON"),
        ("talks.json", b"\xff\xfe", "UTF-8"),
        ("talks.jsonl", b"\n", "no line"),
        ("talks.jsonl", b'{"messages": ' + b"[" * 100_000, "line 1: not JSON: .*recursion"),
        ("talks.jsonl", b"\xff\xfe", "UTF-8"),
    ],
)
def test_bad_file_is_named(tmp_path, name, content, complaint):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=complaint) as caught:
        read_file(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", ["none.json", "none.jsonl"])
def test_missing_file(tmp_path, name):
    with pytest.raises(InputError, match=f"{name} cannot be read: No such file"):
        read_file(tmp_path / name)


def test_missing_picture_directory(tmp_path):
    path = llava(tmp_path / "talks.json", human("hi"))
    with pytest.raises(InputError, match=r"pictures, where the pictures of .* is not a directory"):
        read_file(path, tmp_path / "pictures")


def test_the_ending_chooses_the_reader(tmp_path):
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (one,) = read_file(llava(tmp_path / "talks.JSON", human("hi")))
    (two,) = read_file(lines(tmp_path / "talks.jsonl", {"messages": messages}))
    assert (texts(one), texts(two)) == (["hi", "yes"], ["a", "b"])
