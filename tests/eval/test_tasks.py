"""Tasks: their names, samples, prompts and the baseline without images."""

import json
import sys
from collections import Counter
from pathlib import Path

import pytest

from owl2.errors import ErrorCode, InputError
from owl2.eval.samples import EvalSample
from owl2.eval.task_config import SUITES, task_configs
from owl2.eval.tasks import find_tasks
from tests.errors import raises_input_error

easy_vqa = pytest.importorskip("easy_vqa")


def read(prompt):
    [task] = find_tasks("easy_vqa")
    questions, invalid = task.read(task.data(None, prompt))
    assert invalid == []
    return questions


@pytest.fixture(scope="module")
def questions():
    return read("Tell me: {question}")


def test_easy_vqa_is_the_complete_test_split(questions):
    texts, answers, images = easy_vqa.get_test_questions()
    assert len(questions) == 9673
    assert [question.question for question in questions] == texts
    assert [question.expected for question in questions] == [(answer,) for answer in answers]
    assert [question.id for question in questions[:2]] == ["easy_vqa/test#0", "easy_vqa/test#1"]
    assert len({question.id for question in questions}) == 9673
    paths = easy_vqa.get_test_image_paths()
    for question, number in zip(questions, images, strict=True):
        [turn] = question.messages
        image, text = turn["content"]
        assert turn["role"] == "user"
        assert image == {"type": "image", "path": paths[number]}
        assert text == {"type": "text", "text": f"Tell me: {question.question}"}
        assert "test" in Path(image["path"]).parts


def test_categories(questions):
    answers = {question.expected[0]: question.category for question in questions}
    assert Counter(answers.values()) == {"yes or no": 2, "shape": 3, "color": 8}
    assert (answers["no"], answers["teal"], answers["circle"]) == ("yes or no", "color", "shape")


def test_prompts():
    [task] = find_tasks("easy_vqa")
    assert task.data(None).prompt.endswith("using a single word or phrase.")
    assert task.data(None, "short").prompt == "{question}"
    assert task.data(None, "Q: {question}").prompt == "Q: {question}"
    [turn] = read(None)[0].messages
    assert turn["content"][1]["text"] == (
        "what is the red shape?\nAnswer the question using a single word or phrase."
    )
    with pytest.raises(InputError) as error:
        read("What is this?")
    assert "{question}" in str(error.value)


def test_no_image():
    image = {"type": "image", "path": "a.png"}
    messages = [
        {"role": "user", "content": [image, {"type": "text", "text": "in <|image|>, what?"}]},
        {"role": "assistant", "content": "a dog"},
        {"role": "user", "content": "<|image|>and here?"},
    ]
    sample = EvalSample("1", "", messages, ())
    assert sample.without_images().messages == [
        {"role": "user", "content": [{"type": "text", "text": "in , what?"}]},
        {"role": "assistant", "content": "a dog"},
        {"role": "user", "content": "and here?"},
    ]
    assert messages[0]["content"][0] is image, "the original is unchanged"


def names(*arguments):
    return [task.name for task in find_tasks(*arguments)]


def test_tasks_by_name():
    assert names("easy_vqa") == ["easy_vqa"]
    assert names(" pope_random, easy_vqa,pope_random") == ["pope_random", "easy_vqa"]
    with raises_input_error(ErrorCode.UNKNOWN_NAME, "'easy_vqa'"):
        find_tasks("easy-vqa")
    with raises_input_error(ErrorCode.MISSING_VALUE, "easy_vqa"):
        find_tasks(" , ")


def test_suites():
    by_suite = {suite: names(None, suite) for suite in SUITES}
    assert all(by_suite.values())
    assert {config.suite for config in task_configs().values()} == {*SUITES, None}
    assert names(None, "paper") == [
        name
        for suite, own in by_suite.items()
        for name in own
        if suite not in ("document", "scoring") and name != "mmmu"
    ]
    assert "easy_vqa" not in names(None, "paper")
    assert names("easy_vqa,coco", "captions") == ["easy_vqa", "coco", "flickr30k"]
    with raises_input_error(ErrorCode.UNKNOWN_NAME, "'captions'"):
        find_tasks(None, "caption")


def test_benchmarks_have_the_results_of_the_paper():
    """Specification §3."""
    paper = {
        "coco": 137.3, "flickr30k": 85.1, "vqav2": 79.4, "okvqa": 57.7, "gqa": 56.1,
        "vizwiz": 54.5, "textvqa": 54.3, "science_qa": 68.7, "mme": 1450.19, "mmbench": 64.5,
        "mm_vet": 36.2, "seed_bench": 57.8, "q_bench": 62.9, "pope_random": 87.85,
        "pope_popular": 85.60, "pope_adversarial": 83.80, "mmhal": 2.17, "mmlu": 53.4,
        "bbh": 45.0, "agieval": 32.7, "arc_c": 65.8, "arc_e": 79.9, "msrvtt_qa": 23.6,
        "msvd_qa": 42.4, "tgif_qa": 61.6,
    }  # fmt: skip
    without = {"boolq", "triviaqa", "xsum", "hellaswag"}  # a plot without values
    table = task_configs()
    assert {*paper, *without} == {*names(None, "paper")}
    for task in find_tasks(None, "paper"):
        if task.name in paper:
            assert paper[task.name] in table[task.name].paper.values(), task.name
        if len(table[task.name].paper) == 1:
            assert task.metric.main in table[task.name].paper


def test_custom_questions(tmp_path):
    def write(path, **changes):
        path.parent.mkdir(exist_ok=True)
        row = {"question": "What?", "answers": ["a dog"], **changes}
        path.write_text(json.dumps(row) + "\n", encoding="utf-8")
        return str(path)

    mine = write(tmp_path / "mine.jsonl")
    assert names(f"easy_vqa,{mine}") == ["easy_vqa", "mine"]
    [task] = find_tasks(mine)
    [question], invalid = task.read(task.data(None))
    assert (question.question, question.expected, invalid) == ("What?", ("a dog",), [])
    with raises_input_error(ErrorCode.FILE_NOT_FOUND, "none.jsonl"):
        find_tasks(str(tmp_path / "none.jsonl"))
    with raises_input_error(ErrorCode.CONFLICT, "'coco'"):
        find_tasks(write(tmp_path / "coco.jsonl"))
    with raises_input_error(ErrorCode.CONFLICT, "mine.jsonl"):
        find_tasks(f"{mine},{write(tmp_path / 'other' / 'mine.jsonl')}")


def test_missing_file_is_named_with_origin_and_license(tmp_path):
    [task] = find_tasks("vqav2")
    needles = ("v2_OpenEnded_mscoco_val2014_questions.json", "visualqa.org", "CC BY 4.0")
    with raises_input_error(ErrorCode.FILE_NOT_FOUND, "--data", *needles):
        task.read(task.data(None))
    with raises_input_error(ErrorCode.FILE_NOT_FOUND, tmp_path / "vqav2", *needles):
        task.read(task.data(tmp_path))


def test_easy_vqa_needs_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "easy_vqa", None)
    with pytest.raises(InputError) as error:
        read("{question}")
    assert "owl2-vlm[data]" in str(error.value)
