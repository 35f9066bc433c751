"""Answers: in the questions' order, the same whatever the batch, written as they come."""

import json

import pytest

from owl2.errors import InputError
from owl2.eval.answering import answer_all, decoding_of
from owl2.eval.progress import Watch
from owl2.eval.tasks import Question


@pytest.fixture
def answer(engine, task, plain, tmp_path):
    def run(questions, batch_size):
        with Watch(plain, "made", len(questions)) as watch:
            part = tmp_path / "part.jsonl"
            return answer_all(engine, task, questions, batch_size, watch, part), part, watch

    return run


def test_the_batch_size_changes_nothing(answer, engine, task, questions):
    alone = [engine.chat(question.messages, **decoding_of(task)) for question in questions]
    assert len(set(alone)) > 5, "or answers in a wrong order would not be noticed"
    for batch_size in (1, 3, 16, 100):
        answers, _, _ = answer(questions, batch_size)
        assert [answer.question for answer in answers] == questions
        assert [answer.text for answer in answers] == alone
        assert [answer.is_right for answer in answers] == [False, True] * (len(questions) // 2)


def test_batches_are_of_similar_length(answer, engine, questions, monkeypatch):
    sizes = []
    batch = engine.batch

    def count(conversations, **options):
        sizes.append([len(turns[0]["content"][1]["text"]) for turns in conversations])
        return batch(conversations, **options)

    monkeypatch.setattr(engine, "batch", count)
    answer(questions, 6)
    assert [len(row) for row in sizes] == [6, 6, 6, 2]
    lengths = [length for row in sizes for length in row]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] > lengths[-1]


def test_every_answer_is_a_line(answer, questions):
    answers, part, watch = answer(questions, 8)
    rows = [json.loads(line) for line in part.read_text(encoding="utf-8").splitlines()]
    assert sorted(row["id"] for row in rows) == sorted(question.id for question in questions)
    by_id = {row["id"]: row for row in rows}
    assert by_id["made#3"] == {
        "id": "made#3",
        "question": questions[3].text,
        "kind": "first",
        "prompt": f"USER: <|image|>{questions[3].text} ASSISTANT:",
        "expected": list(questions[3].expected),
        "answer": answers[3].text,
        "correct": True,
    }
    assert (watch.done, watch.right) == (len(questions), len(questions) // 2)


def test_lines_are_there_before_the_next_batch(answer, engine, questions, monkeypatch, tmp_path):
    seen = []
    batch = engine.batch

    def look(conversations, **options):
        seen.append(len((tmp_path / "part.jsonl").read_text(encoding="utf-8").splitlines()))
        return batch(conversations, **options)

    monkeypatch.setattr(engine, "batch", look)
    answer(questions, 8)
    assert seen == [0, 8, 16]


def test_a_question_that_cannot_be_asked_is_named(answer, questions):
    wrong = Question("made#99", "?", [{"role": "nobody", "content": "?"}], ("a",), "later")
    with pytest.raises(InputError, match=r"made#99: .*nobody"):
        answer([*questions, wrong], 8)
