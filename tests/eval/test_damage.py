"""Damaged rows of published files are reported and skipped, in each benchmark."""

import csv
import json
import shutil

import pytest

from owl2.errors import ErrorCode, InputError
from owl2.eval.readers import read_each, read_jsonl
from owl2.eval.samples import EvalSample, InvalidEvalSample
from tests.errors import raises_input_error
from tests.eval.reading import FIXTURES, read

# (benchmark, file, key of the rows); "lines": JSONL; "entries": an object of rows.
FILES = [
    ("coco", "dataset_coco.json", "images"),
    ("flickr30k", "dataset_flickr30k.json", "images"),
    ("vqav2", "v2_OpenEnded_mscoco_val2014_questions.json", "questions"),
    ("okvqa", "OpenEnded_mscoco_val2014_questions.json", "questions"),
    ("gqa", "testdev_balanced_questions.json", "entries"),
    ("vizwiz", "val.json", "list"),
    ("textvqa", "TextVQA_0.5.1_val.json", "data"),
    ("science_qa", "problems.json", "entries"),
    ("mm_vet", "mm-vet.json", "entries"),
    ("seed_bench", "SEED-Bench.json", "questions"),
    ("q_bench", "llvisionqa_dev.json", "list"),
    ("pope_random", "coco_pope_random.json", "lines"),
    ("mmhal", "response_template.json", "list"),
    ("bbh", "bbh/word_sorting.json", "examples"),
    ("agieval", "v1/*.jsonl", "lines"),
    ("arc_c", "ARC-Challenge-Test.jsonl", "lines"),
    ("arc_e", "ARC-Easy-Test.jsonl", "lines"),
    ("boolq", "*.jsonl", "lines"),
    ("triviaqa", "qa/wikipedia-dev.json", "Data"),
    ("hellaswag", "hellaswag_val.jsonl", "lines"),
    ("xsum", "*.jsonl", "lines"),
    ("msrvtt_qa", "test_qa.json", "list"),
    ("msvd_qa", "test_qa.json", "list"),
]


@pytest.fixture
def copy(tmp_path):
    """A copy of the fixtures of a benchmark."""

    def make(name):
        shutil.copytree(FIXTURES / name, tmp_path / name)
        for shared in ("val2014", "images"):
            if (FIXTURES / shared).is_dir():
                (tmp_path / shared).symlink_to(FIXTURES / shared)
        return tmp_path

    return make


def damaged(row):
    """A row with wrong types, except for the keys of the split and the id."""
    kept = ("split", "image", "question_id", "pid")
    return {key: value if key in kept else {"odd": [value]} for key, value in row.items()}


def damage(path, where):
    """Insert a damaged copy of a row as the first row; replace the first of entries."""
    if where == "lines":
        text = path.read_text(encoding="utf-8")
        first = text.partition("\n")[0]
        path.write_text(f"{first[: len(first) // 2]}\n{text}", encoding="utf-8")
        return
    content = json.loads(path.read_text(encoding="utf-8"))
    if where == "entries":
        key = next(key for key, row in content.items() if row.get("image", True))
        content[key] = damaged(content[key])
    else:
        rows = content if where == "list" else content[where]
        asked = [row for row in rows if row.get("split") != "train"]
        rows.insert(0, damaged(asked[0]))
    path.write_text(json.dumps(content), encoding="utf-8")


@pytest.mark.parametrize(("name", "file", "where"), FILES)
def test_damaged_row_is_reported_and_skipped(copy, name, file, where):
    pytest.importorskip("pycocoevalcap")
    data = copy(name)
    before, invalid_before = read(name, data)
    path = min((data / name).glob(file))
    damage(path, where)
    samples, invalid = read(name, data)
    assert len(samples) == len(before) - (where == "entries")
    assert len(invalid) == len(invalid_before) + 1
    assert any(path.name in item.reason for item in invalid)


def test_row_of_mmlu_with_missing_columns_is_invalid(copy):
    data = copy("mmlu")
    path = min((data / "mmlu" / "test").glob("*.csv"))
    before = len(read("mmlu", data)[0])
    with path.open(newline="") as file:
        rows = list(csv.reader(file))
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([rows[0][:3], *rows[1:]])
    samples, invalid = read("mmlu", data)
    assert len(samples) == before - 1
    assert any("row 1" in item.reason for item in invalid)


def read_rows(path):
    def make(identifier, row):
        if row.text("kind") == "lost":
            raise InputError("There is no decoder.", ErrorCode.MISSING_DEPENDENCY)
        return EvalSample(identifier, row.text("kind"), [], ())

    return list(read_each(read_jsonl(path), lambda number, row: row.where.split(", ")[-1], make))


def test_rows_of_a_jsonl_file(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"kind": "a"}\n\n{"kin\n\xff\n[]\n{"kind": 1}\n{"kind": "b"}')
    found = read_rows(path)
    assert [item.question for item in found if isinstance(item, EvalSample)] == ["a", "b"]
    invalid = [item for item in found if isinstance(item, InvalidEvalSample)]
    assert [item.id for item in invalid] == ["line 3", "line 4", "line 5", "line 6"]
    path.write_text('{"kin\n[]\n')
    with raises_input_error(ErrorCode.INVALID_FORMAT, "line 1: not JSON"):
        read_rows(path)
    path.write_text('{"kind": "a"}\n{"kind": "lost"}\n')
    with raises_input_error(ErrorCode.MISSING_DEPENDENCY):
        read_rows(path)
    with raises_input_error(ErrorCode.UNREADABLE_FILE, tmp_path):
        list(read_jsonl(tmp_path))
