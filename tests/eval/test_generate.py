"""Answers: in the questions' order, the same whatever the batch, written as they come."""

import json
from dataclasses import replace

import pytest

from owl2.eval.generate import Round, decoding_of
from owl2.eval.readers import Source
from owl2.eval.response_cache import Journal
from owl2.eval.samples import Question
from owl2.eval.sharding import Team

ALONE = Team()


@pytest.fixture
def answer(engine, task, plain, tmp_path):
    def run(questions, batch_size, team=ALONE, settings="same"):
        journal = Journal(tmp_path, "made", {"settings": settings}, team)
        round_ = Round("made", task, Source((), "{question}"), questions, journal)
        round_.ask(engine, batch_size, team, plain)
        return round_

    return run


@pytest.fixture
def batches(engine, monkeypatch):
    """The texts of each batch that the engine gets."""
    seen = []
    batch = engine.batch

    def look(conversations, **options):
        seen.append([turns[0]["content"][1]["text"] for turns in conversations])
        return batch(conversations, **options)

    monkeypatch.setattr(engine, "batch", look)
    return seen


def with_image(question, path):
    image, words = question.messages[0]["content"]
    return replace(
        question, messages=[{"role": "user", "content": [{**image, "path": str(path)}, words]}]
    )


def test_the_batch_size_changes_nothing(answer, engine, task, questions):
    alone = [engine.chat(question.messages, **decoding_of(task)) for question in questions]
    assert len(set(alone)) > 5, "or answers in a wrong order would not be noticed"
    for batch_size in (1, 3, 16, 100):
        asked = answer(questions, batch_size, settings=batch_size).gather()
        assert [item.question for item in asked.answers] == questions
        assert [item.text for item in asked.answers] == alone
        assert [item.prompt for item in asked.answers][:1] == [
            f"USER: <|image|>{questions[0].text} ASSISTANT:"
        ]
        assert asked.broken == []
        assert asked.seconds > 0


def test_batches_are_of_similar_length(answer, batches, questions):
    answer(questions, 6)
    assert [len(row) for row in batches] == [6, 6, 6, 2]
    lengths = [len(text) for row in batches for text in row]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] > lengths[-1]


def test_lines_are_there_before_the_next_batch(answer, engine, questions, monkeypatch, tmp_path):
    seen = []
    batch = engine.batch

    def look(conversations, **options):
        lines = (tmp_path / "made.part.jsonl").read_text(encoding="utf-8").splitlines()
        seen.append([json.loads(line) for line in lines][1:])  # the first line is the settings
        return batch(conversations, **options)

    monkeypatch.setattr(engine, "batch", look)
    answer(questions, 8)
    assert [len(rows) for rows in seen] == [0, 8, 16]
    assert seen[2][3].keys() == {"id", "key", "prompt", "answer", "images", "seconds"}


def test_nothing_is_asked_twice(answer, batches, questions):
    first = answer(questions[:12], 8).gather()
    batches.clear()
    asked = answer(questions, 8).gather()
    assert sum(map(len, batches)) == 8
    assert asked.answers[:12] == first.answers
    assert asked.seconds > first.seconds, "the time of both starts"
    batches.clear()
    answer(questions, 8)
    assert batches == []
    answer(questions, 8, settings="others")
    assert sum(map(len, batches)) == 20


def test_one_image_that_cannot_be_read_fails_nothing_else(
    answer, questions, images, tmp_path, plain
):
    (tmp_path / "torn.png").write_bytes((images / "red.png").read_bytes()[:40])
    changed = list(questions)
    changed[7] = with_image(changed[7], tmp_path / "torn.png")
    changed[11] = with_image(changed[11], tmp_path / "nowhere.png")
    asked = answer(changed, 100).gather()
    assert [item.id for item in asked.broken] == ["made#7", "made#11"]
    assert "torn.png" in asked.broken[0].reason
    assert "nowhere.png" in asked.broken[1].reason
    left = [question for place, question in enumerate(changed) if place not in (7, 11)]
    assert [item.question for item in asked.answers] == left
    for text, question in zip([a.text for a in asked.answers], left, strict=True):
        assert (text in question.expected) == (int(question.id.split("#")[1]) % 2 == 1)


def test_a_repaired_image_is_asked_about_again(answer, questions, images, tmp_path):
    path = tmp_path / "late.png"
    changed = [with_image(questions[0], path)]
    assert len(answer(changed, 4).gather().broken) == 1
    path.write_bytes((images / "red.png").read_bytes())
    assert len(answer(changed, 4).gather().answers) == 1


def test_a_question_that_cannot_be_asked_is_named(answer, questions):
    wrong = Question("made#99", "?", [{"role": "nobody", "content": "?"}], ("a",), "later")
    long = replace(questions[0], id="made#98", messages=[{"role": "user", "content": "so " * 500}])
    asked = answer([*questions, wrong, long], 8).gather()
    assert [item.id for item in asked.broken] == ["made#99", "made#98"]
    assert "nobody" in asked.broken[0].reason
    assert "context" in asked.broken[1].reason
    assert len(asked.answers) == 20


def test_two_processes_share_the_questions(answer, batches, questions):
    one = answer(questions, 8, settings="alone").gather()
    batches.clear()
    second = answer(questions, 8, Team(1, 2))
    assert sum(map(len, batches)) == 10
    first = answer(questions, 8, Team(0, 2))
    assert sum(map(len, batches)) == 20
    assert first.gather().answers == one.answers == second.gather().answers
