import io
import json
import pickle
import sys
from pathlib import Path

import pytest
import torch.utils.data

from owl2.data import json_dataset as module
from owl2.data.json_dataset import JsonDataset
from owl2.errors import ErrorCode
from owl2.json_records import scan_json
from tests.errors import raises_input_error


def conversation(number: object) -> dict:
    question = {"from": "human", "value": f"number {number}?"}
    return {"conversations": [question, {"from": "gpt", "value": f"{number}!"}]}


def answers(samples) -> list[str]:
    return [sample.messages[-1]["content"] for sample in samples]


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr("owl2.json_records.CHUNK_BYTES", 7)


# ------------------------------------------------------------------ finding rows

# Of two, three and four bytes, of one letter and of two in JSON's escapes; brackets and quotes in
# strings; numbers that the end of a chunk can split.
TEXTS = ["é", "漢", "🦉", "\u2028", 'a "quoted" ]},{[', "\\", '\\"', "", "1234567890" * 3]


@pytest.mark.parametrize("escaped", [True, False])
@pytest.mark.parametrize("indent", [None, 3])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_list_elements_are_found_at_their_boundaries(tmp_path, small_chunks, escaped, indent, bom):
    path = tmp_path / "chat.json"
    text = json.dumps([conversation(word) for word in TEXTS], ensure_ascii=escaped, indent=indent)
    path.write_bytes(bom + f"\n {text}\r\n\t".encode())
    samples = JsonDataset(path)
    assert len(samples) == len(TEXTS)
    assert answers(samples) == [f"{word}!" for word in TEXTS]
    assert samples[-1].source == f"{path}, row {len(TEXTS)}"


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\n \n"])
def test_lines_are_rows(tmp_path, bom, end):
    path = tmp_path / "chat.jsonl"
    text = end.join(json.dumps(conversation(word), ensure_ascii=False) for word in TEXTS)
    path.write_bytes(bom + text.encode())
    samples = JsonDataset(path)
    assert answers(samples) == [f"{word}!" for word in TEXTS]
    assert samples[2].source == f"{path}, line {5 if end == chr(10) + ' ' + chr(10) else 3}"


def test_the_chunk_size_does_not_change_the_rows(tmp_path, monkeypatch):
    path = tmp_path / "chat.json"
    path.write_text(json.dumps([conversation(word) for word in TEXTS], ensure_ascii=False))
    expected = JsonDataset(path)
    for chunk_bytes in range(1, 40):
        monkeypatch.setattr("owl2.json_records.CHUNK_BYTES", chunk_bytes)
        assert list(JsonDataset(path)) == list(expected)


def test_a_number_across_chunks_is_one_row(tmp_path, small_chunks):
    path = tmp_path / "chat.json"
    path.write_text("[1234567890123456, 3]")
    with raises_input_error(ErrorCode.INVALID_FORMAT, "2"):
        JsonDataset(path)[1]


def test_rows_are_a_sequence(tmp_path):
    path = tmp_path / "chat.json"
    path.write_text(json.dumps([conversation(number) for number in range(5)]))
    samples = JsonDataset(path)
    assert answers(samples[1:4:2]) == ["1!", "3!"]
    assert answers(reversed(samples)) == ["4!", "3!", "2!", "1!", "0!"]
    assert samples[-1] == samples[4]
    with pytest.raises(IndexError):
        samples[5]


# ------------------------------------------------------------------ processes


def test_forked_workers_read_the_same_rows(tmp_path):
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps(conversation(number)) + "\n" for number in range(200)))
    samples = JsonDataset(path)
    expected = answers(samples)  # opens the file here first: a forked worker must not move in it
    loader = torch.utils.data.DataLoader(
        samples,
        batch_size=10,
        num_workers=2,
        collate_fn=answers,
        multiprocessing_context="fork",
    )
    assert [answer for batch in loader for answer in batch] == expected


def test_a_changed_file_is_refused(tmp_path):
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps(conversation(1)))
    samples = pickle.loads(pickle.dumps(JsonDataset(path)))
    path.write_text("\n" + json.dumps(conversation(1)))
    with raises_input_error(ErrorCode.FILE_CHANGED) as caught:
        samples[0]
    assert caught.value.code == ErrorCode.FILE_CHANGED  # about all rows, so none may be skipped


def test_a_deleted_file_is_reported(tmp_path):
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps(conversation(1)))
    samples = JsonDataset(path)
    path.unlink()
    with raises_input_error(ErrorCode.FILE_CHANGED, "chat.jsonl"):
        samples[0]


# ------------------------------------------------------------------ memory

STATUS = Path("/proc/self/statm")


def resident_megabytes() -> float:
    return int(STATUS.read_text().split()[1]) * 4096 / 1e6


@pytest.mark.skipif(not STATUS.exists(), reason="memory is read from /proc")
@pytest.mark.parametrize("name", ["chat.json", "chat.jsonl"])
def test_memory_contains_the_index_only(tmp_path, name):
    path = tmp_path / name
    row = json.dumps(conversation("x" * 4000))
    count = 20_000  # 160 MB
    with path.open("w") as file:
        file.write("[" * (name == "chat.json") + row)
        for _ in range(count - 1):
            file.write((",\n" if name == "chat.json" else "\n") + row)
        file.write("]" * (name == "chat.json"))
    before = resident_megabytes()
    samples = JsonDataset(path)
    assert len(samples) == count
    for place in range(0, count, 97):
        samples[place]
    assert resident_megabytes() - before < 40


# ------------------------------------------------------------------ bad files


@pytest.mark.parametrize(
    ("name", "content", "expected_error"),
    [
        ("chat.txt", b"", (ErrorCode.INVALID_FORMAT,)),
        ("chat.json", b"", (ErrorCode.INVALID_FORMAT, "list")),
        ("chat.json", b"{}", (ErrorCode.INVALID_FORMAT, "jsonl")),
        ("chat.json", b'"talk"', (ErrorCode.INVALID_FORMAT, "list")),
        ("chat.json", b" [ ] ", (ErrorCode.EMPTY_DATASET,)),
        ("chat.json", b"[", (ErrorCode.INVALID_FORMAT, "row 1", "byte 1")),
        ("chat.json", b"[{}", (ErrorCode.INVALID_FORMAT, "row 1")),
        ("chat.json", b"[{},", (ErrorCode.INVALID_FORMAT, "row 2", "byte 4")),
        ("chat.json", b"[{}, ]", (ErrorCode.INVALID_FORMAT, "row 2", "byte 5")),
        ("chat.json", b"[{} {}]", (ErrorCode.INVALID_FORMAT, "row 1")),
        ("chat.json", b"[{}] {}", (ErrorCode.INVALID_FORMAT, "byte 5")),
        ("chat.json", b'[{}, {"a": "', (ErrorCode.INVALID_FORMAT, "row 2", "byte 11")),
        ("chat.json", '[{"é": 1}, {é}]'.encode(), (ErrorCode.INVALID_FORMAT, "row 2", "byte 13")),
        ("chat.json", b"[" * 100_000, (ErrorCode.INVALID_FORMAT,)),
        ("chat.json", b"[" + b"1" * 5_000 + b"]", (ErrorCode.INVALID_FORMAT,)),
        ("chat.json", b"\xff\xfe", (ErrorCode.INVALID_FORMAT, "UTF-8")),
        ("chat.json", b'["\xc3', (ErrorCode.INVALID_FORMAT, "UTF-8")),
        ("chat.jsonl", b"", (ErrorCode.EMPTY_DATASET,)),
        ("chat.jsonl", b"\n \n", (ErrorCode.EMPTY_DATASET,)),
        ("chat.jsonl", b'{"messages": ' + b"[" * 100_000, (ErrorCode.INVALID_FORMAT, "line 1")),
        ("chat.jsonl", b"\xff\xfe", (ErrorCode.INVALID_FORMAT, "line 1")),
    ],
)
def test_an_invalid_file_is_refused(tmp_path, name, content, expected_error):
    path = tmp_path / name
    path.write_bytes(content)
    with raises_input_error(*expected_error) as caught:
        JsonDataset(path)[0]
    assert str(path) in str(caught.value)


def test_an_invalid_list_is_not_read_to_the_end(tmp_path, small_chunks):
    path = tmp_path / "chat.json"
    path.write_bytes(b"[{'a': 1}" + b" " * 1000 + b"]")
    file = io.BytesIO(path.read_bytes())
    with raises_input_error(ErrorCode.INVALID_FORMAT, "row 1", "byte 2"):
        list(scan_json(file, path, "["))
    assert file.tell() < 100


@pytest.mark.parametrize("name", ["none.json", "none.jsonl"])
def test_missing_file(tmp_path, name):
    with raises_input_error(ErrorCode.FILE_NOT_FOUND):
        JsonDataset(tmp_path / name)


def test_missing_image_directory(tmp_path):
    path = tmp_path / "chat.json"
    path.write_text(json.dumps([conversation(1)]))
    with raises_input_error(ErrorCode.FILE_NOT_FOUND):
        JsonDataset(path, tmp_path / "images")


def test_the_suffix_may_be_upper_case(tmp_path):
    path = tmp_path / "chat.JSON"
    path.write_text(json.dumps([conversation(1)]))
    assert answers(JsonDataset(path)) == ["1!"]


# ------------------------------------------------------------------ waiting


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "patience", "rank", "is_shown"),
    [
        (Terminal, 0.0, "0", True),
        (Terminal, 60.0, "0", False),
        (Terminal, 0.0, "1", False),
        (io.StringIO, 0.0, "0", False),
    ],
)
def test_progress_bar_only_on_a_terminal_of_the_first_process(
    tmp_path, monkeypatch, stream, patience, rank, is_shown
):
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps(conversation(1)))
    shown = stream()
    monkeypatch.setattr(sys, "stderr", shown)
    monkeypatch.setattr(module, "PROGRESS_DELAY", patience)
    monkeypatch.setenv("RANK", rank)
    JsonDataset(path)
    assert ("Reading" in shown.getvalue()) == is_shown


def test_a_list_in_a_jsonl_file_is_refused(tmp_path):
    (tmp_path / "chat.jsonl").write_text('\ufeff [\n{"a": 1},\n{"a": 2}]', encoding="utf-8")
    with raises_input_error(ErrorCode.INVALID_FORMAT, "json"):
        JsonDataset(tmp_path / "chat.jsonl")
