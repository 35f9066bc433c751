"""Damaged rows of published files: named, counted, and the others go on, in each benchmark."""

import csv
import json
import shutil

import pytest

from owl2.errors import InputError
from owl2.eval.readers import MissingData, each, lines
from owl2.eval.samples import Broken, Question
from tests.eval.reading import FIXTURES, read

# (benchmark, file, where the rows are in it); "lines": one a line; "entries": an object of rows.
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
    """The fixtures of a benchmark, to be damaged."""

    def make(name):
        shutil.copytree(FIXTURES / name, tmp_path / name)
        for shared in ("val2014", "images"):
            if (FIXTURES / shared).is_dir():
                (tmp_path / shared).symlink_to(FIXTURES / shared)
        return tmp_path

    return make


def damaged(row):
    """Of all wrong types at once, but for what says which row it is of which split."""
    kept = ("split", "image", "question_id", "pid")
    return {key: value if key in kept else {"odd": [value]} for key, value in row.items()}


def damage(path, where):
    """One row more, a damaged copy, in front of the others; among entries in place of the first."""
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
def test_a_damaged_row_is_named_and_the_others_go_on(copy, name, file, where):
    pytest.importorskip("pycocoevalcap")
    data = copy(name)
    before, broken_before = read(name, data)
    path = min((data / name).glob(file))
    damage(path, where)
    questions, broken = read(name, data)
    assert len(questions) == len(before) - (where == "entries")
    assert len(broken) == len(broken_before) + 1
    assert any(path.name in item.reason for item in broken)


def test_a_row_of_mmlu_with_other_columns_is_broken(copy):
    data = copy("mmlu")
    path = min((data / "mmlu" / "test").glob("*.csv"))
    before = len(read("mmlu", data)[0])
    with path.open(newline="") as file:
        rows = list(csv.reader(file))
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([rows[0][:3], *rows[1:]])
    questions, broken = read("mmlu", data)
    assert len(questions) == before - 1
    assert any("row 1 has 3 columns" in item.reason for item in broken)


def question(number, row):
    if row.text("kind") == "lost":
        raise MissingData("the decoder is not there")
    return Question(str(number), row.text("kind"), [], ())


def test_lines_and_rows(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"kind": "a"}\n\n{"kin\n\xff\n[]\n{"kind": 1}\n{"kind": "b"}')
    found = list(each(lines(path), question))
    assert [item.text for item in found if isinstance(item, Question)] == ["a", "b"]
    broken = [item for item in found if isinstance(item, Broken)]
    assert [item.id for item in broken] == ["line 3", "line 4", "line 5", "line 6"]
    path.write_text('{"kin\n[]\n')
    with pytest.raises(InputError, match="line 1: not JSON"):
        list(each(lines(path), question))
    path.write_text('{"kind": "a"}\n{"kind": "lost"}\n')
    with pytest.raises(MissingData):
        list(each(lines(path), question))
    with pytest.raises(InputError, match="cannot be read"):
        list(lines(tmp_path))
