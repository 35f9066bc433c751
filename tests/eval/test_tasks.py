"""Tasks: which questions, asked how, and what is left of them when blind."""

import sys
from collections import Counter
from pathlib import Path

import pytest

from owl2.errors import InputError
from owl2.eval.tasks import TASKS, find_tasks, full_prompt, without_pictures

easy_vqa = pytest.importorskip("easy_vqa")


@pytest.fixture(scope="module")
def questions():
    return TASKS["easy_vqa"].read("Tell me: {question}")


def test_easy_vqa_is_the_whole_test_split(questions):
    texts, answers, pictures = easy_vqa.get_test_questions()
    assert len(questions) == 9673
    assert [question.text for question in questions] == texts
    assert [question.expected for question in questions] == [(answer,) for answer in answers]
    assert [question.id for question in questions[:2]] == ["easy_vqa/test#0", "easy_vqa/test#1"]
    assert len({question.id for question in questions}) == 9673
    paths = easy_vqa.get_test_image_paths()
    for question, picture in zip(questions, pictures, strict=True):
        [turn] = question.messages
        image, words = turn["content"]
        assert turn["role"] == "user"
        assert image == {"type": "image", "path": paths[picture]}
        assert words == {"type": "text", "text": f"Tell me: {question.text}"}
        assert "test" in Path(image["path"]).parts


def test_kinds(questions):
    answers = {question.expected[0]: question.kind for question in questions}
    assert Counter(answers.values()) == {"yes or no": 2, "shape": 3, "colour": 8}
    assert (answers["no"], answers["teal"], answers["circle"]) == ("yes or no", "colour", "shape")


def test_prompts():
    task = TASKS["easy_vqa"]
    assert full_prompt(task, None).endswith("using a single word or phrase.")
    assert full_prompt(task, "short") == "{question}"
    assert full_prompt(task, "Q: {question}") == "Q: {question}"
    [turn] = task.read(full_prompt(task, None))[0].messages
    assert turn["content"][1]["text"] == (
        "what is the red shape?\nAnswer the question using a single word or phrase."  # SPEC 1.5
    )
    with pytest.raises(InputError, match=r"\{question\}"):
        task.read("What is this?")


def test_blind():
    image = {"type": "image", "path": "a.png"}
    messages = [
        {"role": "user", "content": [image, {"type": "text", "text": "in <|image|>, what?"}]},
        {"role": "assistant", "content": "a dog"},
        {"role": "user", "content": "<|image|>and here?"},
    ]
    assert without_pictures(messages) == [
        {"role": "user", "content": [{"type": "text", "text": "in , what?"}]},
        {"role": "assistant", "content": "a dog"},
        {"role": "user", "content": "and here?"},
    ]
    assert messages[0]["content"][0] is image, "the others still need theirs"


def test_tasks_by_name(monkeypatch):
    monkeypatch.setitem(TASKS, "other", TASKS["easy_vqa"])
    assert find_tasks("easy_vqa") == [TASKS["easy_vqa"]]
    assert len(find_tasks("other, easy_vqa,other")) == 2
    with pytest.raises(InputError, match="'easy_vqa'"):
        find_tasks("easy-vqa")
    with pytest.raises(InputError, match="No task"):
        find_tasks(" , ")


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "easy_vqa", None)
    with pytest.raises(InputError, match=r"mplug-owl2\[data\]"):
        TASKS["easy_vqa"].read("{question}")
