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


def talk(number: object) -> dict:
    asked = {"from": "human", "value": f"number {number}?"}
    return {"conversations": [asked, {"from": "gpt", "value": f"{number}!"}]}


def answers(samples) -> list[str]:
    return [sample.messages[-1]["content"] for sample in samples]


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr("owl2.json_records.CHUNK_BYTES", 7)


# ------------------------------------------------------------------ finding rows

# Of two, three and four bytes, of one letter and of two in JSON's escapes; brackets and quotes in
# strings; numbers that a piece's end can cut.
WORDS = ["é", "漢", "🦉", "\u2028", 'a "quoted" ]},{[', "\\", '\\"', "", "1234567890" * 3]


@pytest.mark.parametrize("escaped", [True, False])
@pytest.mark.parametrize("indent", [None, 3])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_a_list_is_cut_where_its_rows_end(tmp_path, small_pieces, escaped, indent, bom):
    path = tmp_path / "talks.json"
    text = json.dumps([talk(word) for word in WORDS], ensure_ascii=escaped, indent=indent)
    path.write_bytes(bom + f"\n {text}\r\n\t".encode())
    samples = JsonDataset(path)
    assert len(samples) == len(WORDS)
    assert answers(samples) == [f"{word}!" for word in WORDS]
    assert samples[-1].source == f"{path}, row {len(WORDS)}"


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\n \n"])
def test_lines_are_rows(tmp_path, bom, end):
    path = tmp_path / "talks.jsonl"
    text = end.join(json.dumps(talk(word), ensure_ascii=False) for word in WORDS)
    path.write_bytes(bom + text.encode())
    samples = JsonDataset(path)
    assert answers(samples) == [f"{word}!" for word in WORDS]
    assert samples[2].source == f"{path}, line {5 if end == chr(10) + ' ' + chr(10) else 3}"


def test_the_size_of_pieces_changes_nothing(tmp_path, monkeypatch):
    path = tmp_path / "talks.json"
    path.write_text(json.dumps([talk(word) for word in WORDS], ensure_ascii=False))
    whole = JsonDataset(path)
    for piece in range(1, 40):
        monkeypatch.setattr("owl2.json_records.CHUNK_BYTES", piece)
        assert list(JsonDataset(path)) == list(whole)


def test_a_number_at_a_pieces_end_is_one_row(tmp_path, small_pieces):
    path = tmp_path / "talks.json"
    path.write_text("[1234567890123456, 3]")
    with raises_input_error(ErrorCode.INVALID_FORMAT, "2"):
        JsonDataset(path)[1]


def test_rows_are_a_sequence(tmp_path):
    path = tmp_path / "talks.json"
    path.write_text(json.dumps([talk(number) for number in range(5)]))
    samples = JsonDataset(path)
    assert answers(samples[1:4:2]) == ["1!", "3!"]
    assert answers(reversed(samples)) == ["4!", "3!", "2!", "1!", "0!"]
    assert samples[-1] == samples[4]
    with pytest.raises(IndexError):
        samples[5]


# ------------------------------------------------------------------ processes


def test_forked_workers_read_what_their_owner_reads(tmp_path):
    path = tmp_path / "talks.jsonl"
    path.write_text("".join(json.dumps(talk(number)) + "\n" for number in range(200)))
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


def test_a_file_that_has_changed_is_refused(tmp_path):
    path = tmp_path / "talks.jsonl"
    path.write_text(json.dumps(talk(1)))
    samples = pickle.loads(pickle.dumps(JsonDataset(path)))
    path.write_text("\n" + json.dumps(talk(1)))
    with raises_input_error(ErrorCode.FILE_CHANGED) as caught:
        samples[0]
    assert (
        caught.value.code == ErrorCode.FILE_CHANGED
    )  # of all rows, so none is to be left out for it


def test_a_file_that_has_gone_is_named(tmp_path):
    path = tmp_path / "talks.jsonl"
    path.write_text(json.dumps(talk(1)))
    samples = JsonDataset(path)
    path.unlink()
    with raises_input_error(ErrorCode.FILE_CHANGED, "talks.jsonl"):
        samples[0]


# ------------------------------------------------------------------ memory

STATUS = Path("/proc/self/statm")


def resident_megabytes() -> float:
    return int(STATUS.read_text().split()[1]) * 4096 / 1e6


@pytest.mark.skipif(not STATUS.exists(), reason="memory is read from /proc")
@pytest.mark.parametrize("name", ["talks.json", "talks.jsonl"])
def test_memory_holds_the_index_only(tmp_path, name):
    path = tmp_path / name
    row = json.dumps(talk("x" * 4000))
    count = 20_000  # 160 MB
    with path.open("w") as file:
        file.write("[" * (name == "talks.json") + row)
        for _ in range(count - 1):
            file.write((",\n" if name == "talks.json" else "\n") + row)
        file.write("]" * (name == "talks.json"))
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
        ("talks.txt", b"", (ErrorCode.INVALID_FORMAT,)),
        ("talks.json", b"", (ErrorCode.INVALID_FORMAT, "list")),
        ("talks.json", b"{}", (ErrorCode.INVALID_FORMAT, "jsonl")),
        ("talks.json", b'"talk"', (ErrorCode.INVALID_FORMAT, "list")),
        ("talks.json", b" [ ] ", (ErrorCode.EMPTY_DATASET,)),
        ("talks.json", b"[", (ErrorCode.INVALID_FORMAT, "row 1", "byte 1")),
        ("talks.json", b"[{}", (ErrorCode.INVALID_FORMAT, "row 1")),
        ("talks.json", b"[{},", (ErrorCode.INVALID_FORMAT, "row 2", "byte 4")),
        ("talks.json", b"[{}, ]", (ErrorCode.INVALID_FORMAT, "row 2", "byte 5")),
        ("talks.json", b"[{} {}]", (ErrorCode.INVALID_FORMAT, "row 1")),
        ("talks.json", b"[{}] {}", (ErrorCode.INVALID_FORMAT, "byte 5")),
        ("talks.json", b'[{}, {"a": "', (ErrorCode.INVALID_FORMAT, "row 2", "byte 11")),
        ("talks.json", '[{"é": 1}, {é}]'.encode(), (ErrorCode.INVALID_FORMAT, "row 2", "byte 13")),
        ("talks.json", b"[" * 100_000, (ErrorCode.INVALID_FORMAT,)),
        ("talks.json", b"[" + b"1" * 5_000 + b"]", (ErrorCode.INVALID_FORMAT,)),
        ("talks.json", b"\xff\xfe", (ErrorCode.INVALID_FORMAT, "UTF-8")),
        ("talks.json", b'["\xc3', (ErrorCode.INVALID_FORMAT, "UTF-8")),
        ("talks.jsonl", b"", (ErrorCode.EMPTY_DATASET,)),
        ("talks.jsonl", b"\n \n", (ErrorCode.EMPTY_DATASET,)),
        ("talks.jsonl", b'{"messages": ' + b"[" * 100_000, (ErrorCode.INVALID_FORMAT, "line 1")),
        ("talks.jsonl", b"\xff\xfe", (ErrorCode.INVALID_FORMAT, "line 1")),
    ],
)
def test_bad_file_is_named(tmp_path, name, content, expected_error):
    path = tmp_path / name
    path.write_bytes(content)
    with raises_input_error(*expected_error) as caught:
        JsonDataset(path)[0]
    assert str(path) in str(caught.value)


def test_a_broken_list_is_not_read_to_its_end(tmp_path, small_pieces):
    path = tmp_path / "talks.json"
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
    path = tmp_path / "talks.json"
    path.write_text(json.dumps([talk(1)]))
    with raises_input_error(ErrorCode.FILE_NOT_FOUND):
        JsonDataset(path, tmp_path / "images")


def test_the_ending_may_be_in_capitals(tmp_path):
    path = tmp_path / "talks.JSON"
    path.write_text(json.dumps([talk(1)]))
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
def test_a_bar_is_shown_to_who_waits(tmp_path, monkeypatch, stream, patience, rank, is_shown):
    path = tmp_path / "talks.jsonl"
    path.write_text(json.dumps(talk(1)))
    shown = stream()
    monkeypatch.setattr(sys, "stderr", shown)
    monkeypatch.setattr(module, "PROGRESS_DELAY", patience)
    monkeypatch.setenv("RANK", rank)
    JsonDataset(path)
    assert ("Reading" in shown.getvalue()) == is_shown


def test_a_list_in_a_jsonl_file_is_told_apart(tmp_path):
    (tmp_path / "talks.jsonl").write_text('\ufeff [\n{"a": 1},\n{"a": 2}]', encoding="utf-8")
    with raises_input_error(ErrorCode.INVALID_FORMAT, "json"):
        JsonDataset(tmp_path / "talks.jsonl")
