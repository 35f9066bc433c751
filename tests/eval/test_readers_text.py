"""Text benchmarks as published → rows as lm-eval reads them; what is broken, what is missing."""

import shutil
from pathlib import Path

import pytest

from owl2.errors import InputError
from owl2.eval.readers import MissingData
from owl2.eval.tasks import Task, find_tasks

FIXTURES = Path(__file__).parent / "fixtures"


def read(name, data=FIXTURES):
    [task] = find_tasks(name)
    return task.read(task.source(data))


def test_mmlu():
    questions, broken = read("mmlu")
    assert [question.id for question in questions] == ["anatomy#1", "astronomy#1"]
    assert [question.kind for question in questions] == ["anatomy", "astronomy"]
    assert questions[1].expected == ("C",)
    choices = ["a foot", "a tail, of a fish", "a wing", "an eye"]
    expected = {"question": "Which of these has toes, and no fin?", "subject": "anatomy"}
    assert questions[0].facts == {**expected, "choices": choices, "answer": 0}
    assert [(item.id, item.reason) for item in broken] == [
        ("anatomy#2", "its answer is 'E', none of A, B, C, D")
    ]


def test_mmlu_dev_is_the_examples():
    [task] = find_tasks("mmlu")
    source = task.source(FIXTURES)
    source.options["split"] = "dev"
    questions, _ = task.read(source)
    assert len(questions) == 10
    assert {path.name for path in source.read} == {"anatomy_dev.csv", "astronomy_dev.csv"}


def test_bbh():
    questions, broken = read("bbh")
    assert not broken
    assert [question.kind for question in questions] == ["boolean_expressions"] * 2 + [
        "word_sorting"
    ]
    assert questions[0].facts == {"input": "not ( False ) is", "target": "True"}


def test_agieval_asks_as_its_authors_do():
    questions, broken = read("agieval")
    facts = {question.kind: question.facts for question in questions}
    assert facts["aqua-rat"]["query"] == (
        "Q: How much is 3 + 4? Answer Choices: (A)5 (B)6 (C)7 (D)8 (E)9\n"
        "A: Among A through E, the answer is"
    )
    assert facts["sat-en"]["query"].startswith("An owl sat on a post.Q: Where did it sit?")
    assert facts["gaokao-physics"]["query"] == (
        "问题：哪些是颜色？ 选项：(A)红 (B)蓝 (C)三 (D)五\n答案：从A到D, 我们应选择"
    )
    assert facts["gaokao-physics"]["gold"] == [0, 1]
    assert facts["math"] == {
        "query": "Q: What is $2 \\cdot 3$?\nA: The answer is", "answer": "6"
    }  # fmt: skip
    assert [item.id for item in broken] == ["aqua-rat#2"]


@pytest.mark.parametrize(
    ("name", "ids", "expected", "broken"),
    [
        ("arc_c", ["Made_1", "Made_2"], ["B", "1"], ["Made_3"]),
        ("arc_e", ["Made_4"], ["A"], []),
        ("boolq", ["val#1", "val#2"], ["yes", "no"], ["val#3"]),
        ("hellaswag", ["val#1", "val#2"], ["takes it.", "Be still."], ["val#3"]),
        ("triviaqa", ["web/m_1", "wikipedia/m_1"], ["The owl"] * 2, ["wikipedia/m_2"]),
        ("xsum", ["1"], ["A town has lost its owl."], ["2"]),
    ],
)
def test_the_others(name, ids, expected, broken):
    questions, left_out = read(name)
    assert [question.id for question in questions] == ids
    assert [question.expected[0] for question in questions] == expected
    assert [item.id for item in left_out] == broken
    assert all(item.reason for item in left_out)


def test_super_glues_boolq(tmp_path):
    (tmp_path / "val.jsonl").write_text(
        '{"question": "can owls fly", "passage": "Owls fly.", "idx": 0, "label": true}\n'
    )
    [question], _ = read("boolq", tmp_path)
    assert (question.expected, question.facts["label"]) == (("yes",), 1)


def test_xsum_of_the_authors_files():
    [task] = find_tasks("xsum")
    moved = Task.of("xsum_files", task.recipe)
    [question], [broken] = moved.read(moved.source(FIXTURES))
    assert question.text == "The owl of the town hall has left. Nobody knows where it went."
    assert question.expected == ("A town has lost its owl.",)
    assert question.messages[0]["content"].endswith("in one sentence.")
    assert broken.id == "102"


def test_long_articles_are_cut():
    [task] = find_tasks("xsum")
    source = task.source(FIXTURES)
    source.options["most_words"] = 3
    [question], _ = task.read(source)
    assert question.text == "The owl of"


@pytest.mark.parametrize("name", ["mmlu", "bbh", "agieval", "arc_c", "triviaqa", "xsum", "boolq"])
def test_what_is_not_there_is_named(name, tmp_path):
    with pytest.raises(MissingData, match=rf"{name}/.* is not there.*Get .* \(licence: "):
        read(name, tmp_path)


@pytest.mark.parametrize(
    ("name", "file", "text", "words"),
    [
        ("arc_c", "ARC-Challenge-Test.jsonl", '{"id": "x", "question": 3}\n', "line 1: 'question'"),
        ("bbh", "bbh/word_sorting.json", "[]", "word_sorting.json"),
        ("triviaqa", "qa/wikipedia-dev.json", '{"Data": [{"Question": "?"}]}', "Data 1"),
        ("hellaswag", "hellaswag_val.jsonl", "{\n", "line 1: not JSON"),
    ],
)
def test_a_file_that_is_something_else(name, file, text, words, tmp_path):
    shutil.copytree(FIXTURES / name, tmp_path / name)
    (tmp_path / name / file).write_text(text)
    with pytest.raises(InputError, match=words):
        read(name, tmp_path)


def test_files_that_are_no_text(tmp_path):
    shutil.copytree(FIXTURES / "mmlu", tmp_path / "mmlu")
    (tmp_path / "mmlu/test/anatomy_test.csv").write_bytes(b"What\xff?,a,b,c,d,A\n")
    with pytest.raises(InputError, match=r"anatomy_test\.csv cannot be read"):
        read("mmlu", tmp_path)
    shutil.copytree(FIXTURES / "xsum_files", tmp_path / "xsum")
    (tmp_path / "xsum/bbc-summary-data/102.summary").write_bytes(b"[SN]RESTBODY[SN]\xff")
    [broken] = [item for item in read("xsum", tmp_path)[1] if item.id == "102"]
    assert "102.summary cannot be read" in broken.reason
