"""Tasks: which questions, asked how, and what is left of them when blind."""

import json
import sys
from collections import Counter
from pathlib import Path

import pytest

from owl2.errors import InputError
from owl2.eval.readers import MissingData
from owl2.eval.task_config import SUITES, recipes
from owl2.eval.tasks import find_tasks, without_images

easy_vqa = pytest.importorskip("easy_vqa")


def read(prompt):
    [task] = find_tasks("easy_vqa")
    questions, broken = task.read(task.source(None, prompt))
    assert broken == []
    return questions


@pytest.fixture(scope="module")
def questions():
    return read("Tell me: {question}")


def test_easy_vqa_is_the_whole_test_split(questions):
    texts, answers, images = easy_vqa.get_test_questions()
    assert len(questions) == 9673
    assert [question.text for question in questions] == texts
    assert [question.expected for question in questions] == [(answer,) for answer in answers]
    assert [question.id for question in questions[:2]] == ["easy_vqa/test#0", "easy_vqa/test#1"]
    assert len({question.id for question in questions}) == 9673
    paths = easy_vqa.get_test_image_paths()
    for question, image in zip(questions, images, strict=True):
        [turn] = question.messages
        image, words = turn["content"]
        assert turn["role"] == "user"
        assert image == {"type": "image", "path": paths[image]}
        assert words == {"type": "text", "text": f"Tell me: {question.text}"}
        assert "test" in Path(image["path"]).parts


def test_kinds(questions):
    answers = {question.expected[0]: question.kind for question in questions}
    assert Counter(answers.values()) == {"yes or no": 2, "shape": 3, "colour": 8}
    assert (answers["no"], answers["teal"], answers["circle"]) == ("yes or no", "colour", "shape")


def test_prompts():
    [task] = find_tasks("easy_vqa")
    assert task.source(None).prompt.endswith("using a single word or phrase.")
    assert task.source(None, "short").prompt == "{question}"
    assert task.source(None, "Q: {question}").prompt == "Q: {question}"
    [turn] = read(None)[0].messages
    assert turn["content"][1]["text"] == (
        "what is the red shape?\nAnswer the question using a single word or phrase."  # SPEC 1.5
    )
    with pytest.raises(InputError, match=r"\{question\}"):
        read("What is this?")


def test_blind():
    image = {"type": "image", "path": "a.png"}
    messages = [
        {"role": "user", "content": [image, {"type": "text", "text": "in <|image|>, what?"}]},
        {"role": "assistant", "content": "a dog"},
        {"role": "user", "content": "<|image|>and here?"},
    ]
    assert without_images(messages) == [
        {"role": "user", "content": [{"type": "text", "text": "in , what?"}]},
        {"role": "assistant", "content": "a dog"},
        {"role": "user", "content": "and here?"},
    ]
    assert messages[0]["content"][0] is image, "the others still need theirs"


def names(*arguments):
    return [task.name for task in find_tasks(*arguments)]


def test_tasks_by_name():
    assert names("easy_vqa") == ["easy_vqa"]
    assert names(" pope_random, easy_vqa,pope_random") == ["pope_random", "easy_vqa"]
    with pytest.raises(InputError, match="'easy_vqa'"):
        find_tasks("easy-vqa")
    with pytest.raises(InputError, match="No task"):
        find_tasks(" , ")


def test_suites():
    by_suite = {suite: names(None, suite) for suite in SUITES}
    assert all(by_suite.values())
    assert names(None, "paper") == [name for own in by_suite.values() for name in own]
    assert "easy_vqa" not in names(None, "paper")
    assert names("easy_vqa,coco", "captions") == ["easy_vqa", "coco", "flickr30k"]
    with pytest.raises(InputError, match="'captions'"):
        find_tasks(None, "caption")


def test_every_benchmark_of_the_paper_with_its_figure():
    """SPEC 3."""
    figures = {
        "coco": 137.3, "flickr30k": 85.1, "vqav2": 79.4, "okvqa": 57.7, "gqa": 56.1,
        "vizwiz": 54.5, "textvqa": 54.3, "science_qa": 68.7, "mme": 1450.19, "mmbench": 64.5,
        "mm_vet": 36.2, "seed_bench": 57.8, "q_bench": 62.9, "pope_random": 87.85,
        "pope_popular": 85.60, "pope_adversarial": 83.80, "mmhal": 2.17, "mmlu": 53.4,
        "bbh": 45.0, "agieval": 32.7, "arc_c": 65.8, "arc_e": 79.9, "msrvtt_qa": 23.6,
        "msvd_qa": 42.4, "tgif_qa": 61.6,
    }  # fmt: skip
    of_mam = {"boolq", "triviaqa", "xsum", "hellaswag"}  # their figure is a plot without numbers
    table = recipes()
    assert {*figures, *of_mam} == {*names(None, "paper")}
    for task in find_tasks(None, "paper"):
        if task.name in figures:
            assert figures[task.name] in table[task.name].paper.values(), task.name
        if len(table[task.name].paper) == 1:
            assert task.metric.main in table[task.name].paper, "or it is never compared"


def test_own_questions(tmp_path):
    def write(path, **changes):
        path.parent.mkdir(exist_ok=True)
        row = {"question": "What?", "answers": ["a dog"], **changes}
        path.write_text(json.dumps(row) + "\n", encoding="utf-8")
        return str(path)

    mine = write(tmp_path / "mine.jsonl")
    assert names(f"easy_vqa,{mine}") == ["easy_vqa", "mine"]
    [task] = find_tasks(mine)
    [question], broken = task.read(task.source(None))
    assert (question.text, question.expected, broken) == ("What?", ("a dog",), [])
    with pytest.raises(InputError, match=r"is no file .*none\.jsonl"):
        find_tasks(str(tmp_path / "none.jsonl"))
    with pytest.raises(InputError, match="called as the task 'coco' is"):
        find_tasks(write(tmp_path / "coco.jsonl"))
    with pytest.raises(InputError, match=r"Two files are called mine\.jsonl"):
        find_tasks(f"{mine},{write(tmp_path / 'other' / 'mine.jsonl')}")


def test_missing_data_says_which_file_where_from_and_under_which_licence(tmp_path):
    [task] = find_tasks("vqav2")
    with pytest.raises(MissingData) as without:
        task.read(task.source(None))
    with pytest.raises(MissingData) as elsewhere:
        task.read(task.source(tmp_path))
    assert "give --data DIR" in str(without.value)
    assert str(tmp_path / "vqav2") in str(elsewhere.value)
    for error in (without, elsewhere):
        for words in ("v2_OpenEnded_mscoco_val2014_questions.json", "visualqa.org", "CC BY 4.0"):
            assert words in str(error.value)


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "easy_vqa", None)
    with pytest.raises(InputError, match=r"owl2-vlm\[data\]"):
        read("{question}")
