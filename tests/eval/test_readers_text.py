"""Text benchmarks: published files → rows for lm-eval; invalid rows and missing files."""

import shutil

import pytest

from owl2.errors import ErrorCode, InputError
from owl2.eval.tasks import EvalTask, find_tasks
from tests.errors import raises_input_error
from tests.eval.reading import FIXTURES, prompt_text, read


def test_mmlu():
    samples, invalid = read("mmlu")
    assert [sample.id for sample in samples] == ["anatomy#1", "astronomy#1"]
    assert [sample.category for sample in samples] == ["anatomy", "astronomy"]
    assert samples[1].expected == ("C",)
    choices = ["a foot", "a tail, of a fish", "a wing", "an eye"]
    expected = {"question": "Which of these has toes, and no fin?", "subject": "anatomy"}
    assert samples[0].metadata == {**expected, "choices": choices, "answer": 0}
    [item] = invalid
    assert item.id == "anatomy#2"
    assert "'E'" in item.reason


def test_mmlu_dev_split_has_the_few_shot_examples():
    [task] = find_tasks("mmlu")
    data = task.data(FIXTURES)
    data.options["split"] = "dev"
    samples, _ = task.read(data)
    assert len(samples) == 10
    assert {path.name for path in data.files} == {"anatomy_dev.csv", "astronomy_dev.csv"}


def test_bbh():
    samples, invalid = read("bbh")
    assert not invalid
    assert [sample.category for sample in samples] == ["boolean_expressions"] * 2 + ["word_sorting"]
    assert samples[0].metadata == {"input": "not ( False ) is", "target": "True"}


def test_agieval_has_the_prompts_of_its_authors():
    samples, invalid = read("agieval")
    metadata = {sample.category: sample.metadata for sample in samples}
    assert metadata["aqua-rat"]["query"] == (
        "Q: How much is 3 + 4? Answer Choices: (A)5 (B)6 (C)7 (D)8 (E)9\n"
        "A: Among A through E, the answer is"
    )
    assert metadata["sat-en"]["query"].startswith("An owl sat on a post.Q: Where did it sit?")
    assert metadata["gaokao-physics"]["query"] == (
        "问题：哪些是颜色？ 选项：(A)红 (B)蓝 (C)三 (D)五\n答案：从A到D, 我们应选择"
    )
    assert metadata["gaokao-physics"]["gold"] == [0, 1]
    assert metadata["math"] == {
        "query": "Q: What is $2 \\cdot 3$?\nA: The answer is", "answer": "6"
    }  # fmt: skip
    assert [item.id for item in invalid] == ["aqua-rat#2"]


@pytest.mark.parametrize(
    ("name", "ids", "expected", "invalid"),
    [
        ("arc_c", ["Made_1", "Made_2"], ["B", "1"], ["Made_3"]),
        ("arc_e", ["Made_4"], ["A"], []),
        ("boolq", ["val#1", "val#2"], ["yes", "no"], ["val#3"]),
        ("hellaswag", ["val#1", "val#2"], ["takes it.", "Be still."], ["val#3"]),
        ("triviaqa", ["web/m_1", "wikipedia/m_1"], ["The owl"] * 2, ["wikipedia/m_2"]),
        ("xsum", ["1"], ["A town has lost its owl."], ["2"]),
    ],
)
def test_other_text_benchmarks(name, ids, expected, invalid):
    samples, skipped = read(name)
    assert [sample.id for sample in samples] == ids
    assert [sample.expected[0] for sample in samples] == expected
    assert [item.id for item in skipped] == invalid
    assert all(item.reason for item in skipped)


def test_boolq_of_super_glue(tmp_path):
    (tmp_path / "val.jsonl").write_text(
        '{"question": "can owls fly", "passage": "Owls fly.", "idx": 0, "label": true}\n'
    )
    [sample], _ = read("boolq", tmp_path)
    assert (sample.expected, sample.metadata["label"]) == (("yes",), 1)


def test_xsum_in_the_files_of_the_authors():
    [task] = find_tasks("xsum")
    moved = EvalTask.from_config("xsum_files", task.config)
    [sample], [invalid] = moved.read(moved.data(FIXTURES))
    assert sample.question == "The owl of the town hall has left. Nobody knows where it went."
    assert sample.expected == ("A town has lost its owl.",)
    assert prompt_text(sample).endswith("in one sentence.")
    assert invalid.id == "102"


def test_long_articles_are_truncated():
    [task] = find_tasks("xsum")
    data = task.data(FIXTURES)
    data.options["max_words"] = 3
    [sample], _ = task.read(data)
    assert sample.question == "The owl of"


@pytest.mark.parametrize("name", ["mmlu", "bbh", "agieval", "arc_c", "triviaqa", "xsum", "boolq"])
def test_missing_file_is_named(name, tmp_path):
    with raises_input_error(ErrorCode.FILE_NOT_FOUND, tmp_path / name, "license: "):
        read(name, tmp_path)


@pytest.mark.parametrize(
    ("name", "file", "text", "needle"),
    [
        ("arc_c", "ARC-Challenge-Test.jsonl", '{"id": "x", "question": 3}\n', "line 1: 'question'"),
        ("bbh", "bbh/word_sorting.json", "[]", "word_sorting.json"),
        ("triviaqa", "qa/wikipedia-dev.json", '{"Data": [{"Question": "?"}]}', "Data 1"),
        ("hellaswag", "hellaswag_val.jsonl", "{\n", "line 1: not JSON"),
    ],
)
def test_file_with_another_format_is_an_error(name, file, text, needle, tmp_path):
    shutil.copytree(FIXTURES / name, tmp_path / name)
    (tmp_path / name / file).write_text(text)
    with pytest.raises(InputError, match=needle):
        read(name, tmp_path)


def test_file_that_is_not_utf8_is_unreadable(tmp_path):
    shutil.copytree(FIXTURES / "mmlu", tmp_path / "mmlu")
    (tmp_path / "mmlu/test/anatomy_test.csv").write_bytes(b"What\xff?,a,b,c,d,A\n")
    with raises_input_error(ErrorCode.UNREADABLE_FILE, "anatomy_test.csv"):
        read("mmlu", tmp_path)
    shutil.copytree(FIXTURES / "xsum_files", tmp_path / "xsum")
    (tmp_path / "xsum/bbc-summary-data/102.summary").write_bytes(b"[SN]RESTBODY[SN]\xff")
    [invalid] = [item for item in read("xsum", tmp_path)[1] if item.id == "102"]
    assert "102.summary" in invalid.reason
