import json

import pytest

from owl2.errors import ErrorCode
from owl2.json_records import (
    JsonRecord,
    as_record,
    json_entries,
    json_lines,
    json_object,
    json_rows,
    require_split,
)
from tests.data.datasets.published_files import put
from tests.errors import raises_input_error


def test_getters_strip_strings():
    row = JsonRecord(
        {"a": " b ", "n": 3, "x": 1.5, "t": [" c", "d "], "r": [{"k": 1}]}, "file.json, row 7"
    )
    assert (row.text("a"), row.integer("n"), row.numbers("n", "x")) == ("b", 3, (3, 1.5))
    assert row.texts("t") == ["c", "d"]
    assert row.rows("r") == [JsonRecord({"k": 1}, "file.json, row 7, r 1")]


@pytest.mark.parametrize(
    ("get", "value"),
    [
        ("text", 3),
        ("text", None),
        ("integer", "3"),
        ("integer", True),
        ("integer", 3.0),
        ("numbers", "3"),
        ("numbers", False),
        ("texts", "abc"),
        ("texts", ["a", 3]),
        ("rows", {"k": 1}),
    ],
)
def test_wrong_types_and_missing_keys_are_refused(get, value):
    with raises_input_error(ErrorCode.INVALID_TYPE, "file.json"):
        getattr(JsonRecord({"key": value}, "file.json, row 7"), get)("key")
    with raises_input_error(ErrorCode.MISSING_VALUE, "file.json"):
        getattr(JsonRecord({}, "file.json, row 7"), get)("key")


def test_rows_refuses_elements_that_are_not_objects():
    with raises_input_error(ErrorCode.INVALID_TYPE, "7"):
        JsonRecord({"key": [{}, "b"]}, "row 7").rows("key")


@pytest.mark.parametrize("indent", [None, 2])
def test_lists_and_objects_are_read_incrementally(tmp_path, indent):
    values = [{"a": 'é [ ] { } " \\'}, {"b": [1, {"c": None}]}, {}]
    path = tmp_path / "rows.json"
    path.write_text("\n " + json.dumps(values, indent=indent) + " \n", encoding="utf-8")
    rows = list(json_rows(path))
    assert [row.value for row in rows] == values
    assert [row.where for row in rows] == [f"{path}, row {n}" for n in (1, 2, 3)]
    named = {"x, y": values[0], '"': values[1]}
    path.write_text("\ufeff" + json.dumps(named, indent=indent), encoding="utf-8")
    entries = list(json_entries(path))
    assert {key: row.value for key, row in entries} == named
    assert entries[0][1].where == f"{path}, 'x, y'"


@pytest.mark.parametrize(
    ("text", "code", "needle"),
    [
        ("", ErrorCode.INVALID_FORMAT, "list"),
        ("{}", ErrorCode.INVALID_FORMAT, "list"),
        ("[]", ErrorCode.EMPTY_DATASET, "list"),
        ('[{"a": 1}', ErrorCode.INVALID_FORMAT, "row 1"),
        ('[{"a": 1},', ErrorCode.INVALID_FORMAT, "row 2"),
        ('[{"a": 1} {"a": 2}]', ErrorCode.INVALID_FORMAT, "byte 10"),
        ('[{"a": 1}] x', ErrorCode.INVALID_FORMAT, "byte 11"),
        ("[{1: 2}]", ErrorCode.INVALID_FORMAT, "row 1"),
        ("[" * 100_000, ErrorCode.INVALID_FORMAT, "row 1"),
        ('[{"a": 1}, 3]', ErrorCode.INVALID_TYPE, "row 2"),
    ],
)
def test_an_invalid_list_is_refused(tmp_path, text, code, needle):
    path = tmp_path / "rows.json"
    path.write_text(text)
    with raises_input_error(code, path, needle):
        list(json_rows(path))


@pytest.mark.parametrize(
    ("text", "expected_error"),
    [
        ("[]", (ErrorCode.INVALID_FORMAT,)),
        ("{}", (ErrorCode.EMPTY_DATASET,)),
        ('{"a": {}', (ErrorCode.INVALID_FORMAT,)),
        ('{"a" {}}', (ErrorCode.INVALID_FORMAT,)),
        ("{3: {}}", (ErrorCode.INVALID_FORMAT,)),
        ('{"a": {}, }', (ErrorCode.INVALID_FORMAT,)),
        ('{"a": 3}', (ErrorCode.INVALID_TYPE, "a")),
    ],
)
def test_an_invalid_object_is_refused(tmp_path, text, expected_error):
    path = tmp_path / "rows.json"
    path.write_text(text)
    with raises_input_error(*expected_error) as caught:
        list(json_entries(path))
    assert str(path) in str(caught.value)


def test_lines(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": "x\u2028y"}\n\n{"b": 2}', encoding="utf-8")
    assert [(row.value, row.where) for row in json_lines(path)] == [
        ({"a": "x\u2028y"}, f"{path}, line 1"),
        ({"b": 2}, f"{path}, line 3"),
    ]
    path.write_text('{"a": 1}\n{"a"\n')
    with raises_input_error(ErrorCode.INVALID_FORMAT, "2"):
        list(json_lines(path))


@pytest.mark.parametrize(
    "read", [json_object, lambda p: list(json_rows(p)), lambda p: list(json_lines(p))]
)
def test_unreadable_files(tmp_path, read):
    with raises_input_error(ErrorCode.FILE_NOT_FOUND, "none.json"):
        read(tmp_path / "none.json")
    (tmp_path / "latin.json").write_bytes(b'[{"a": "\xe9"}]')
    with raises_input_error(ErrorCode.INVALID_FORMAT, "latin.json"):
        read(tmp_path / "latin.json")


def test_json_object_returns_a_record(tmp_path):
    path = put(tmp_path, "a.json", {"a": 1})
    assert json_object(path) == as_record({"a": 1}, str(path))
    with raises_input_error(ErrorCode.INVALID_TYPE):
        json_object(put(tmp_path, "a.json", [1]))
    path.write_text('{"a"')
    with raises_input_error(ErrorCode.INVALID_FORMAT):
        json_object(path)


@pytest.mark.parametrize("split", ["test", "testA", "test2015", "TEST"])
def test_files_of_test_splits_are_refused(split):
    with raises_input_error(ErrorCode.INVALID_VALUE, "file.json"):
        require_split(split, "train", "file.json")


def test_files_of_another_split_are_refused():
    require_split("train", "train", "file.json")
    require_split(None, "train", "file.json")
    with raises_input_error(ErrorCode.INVALID_VALUE, "file.json", "val"):
        require_split("val", "train", "file.json")
