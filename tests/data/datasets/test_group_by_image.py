from pathlib import Path

import pytest

from owl2.data.datasets.prompts import (
    about_image,
    choice_question,
    image_and_text,
    short_question,
)
from owl2.data.datasets.questions import group_by_image, majority_answer
from tests.data.datasets.published_files import SHORT, split_skipped, summarize


@pytest.mark.parametrize(
    ("answers", "agreed"),
    [
        (["a", "b", "b"], "b"),
        (["b", "a", "a", "b"], "b"),
        (["a", "b", "a", "b"], "a"),
        (["", "", "a"], "a"),
        ([""], ""),
        ([], ""),
    ],
)
def test_majority_answer_with_ties(answers, agreed):
    assert majority_answer(answers) == agreed


def test_one_conversation_per_image_in_order_of_appearance():
    questions = [
        ("2.jpg", ("a?", "1")),
        ("1.jpg", ("b?", "2")),
        ("2.jpg", ("", "3")),
        ("3.jpg", ("c?", "")),
        ("2.jpg", ("d?", "4")),
    ]
    samples, skipped = split_skipped(group_by_image(questions, Path("file.json")))
    assert [summarize(sample) for sample in samples] == [
        ("2.jpg", [("<|image|>\na?", "1"), ("d?", "4")]),
        ("1.jpg", [("<|image|>\nb?", "2")]),
    ]
    assert [sample.source for sample in samples] == [
        "file.json, image 2.jpg",
        "file.json, image 1.jpg",
    ]
    assert skipped == {"questions without text or without an answer": 2}


def test_max_rounds_limits_the_conversation():
    questions = [("1.jpg", (f"{n}?", str(n))) for n in range(5)] + [("2.jpg", ("a?", "b"))]
    samples, _ = split_skipped(group_by_image(questions, Path("file.json"), 2))
    assert [
        (summarize(each)[0], [answer for _, answer in summarize(each)[1]]) for each in samples
    ] == [
        ("1.jpg", ["0", "1"]),
        ("1.jpg", ["2", "3"]),
        ("1.jpg", ["4"]),
        ("2.jpg", ["b"]),
    ]
    assert summarize(samples[1])[1][0][0] == "<|image|>\n2?"


def test_messages_of_conversations_and_pairs():
    assert about_image("a.jpg", [("one?", "1"), ("two?", "2")]) == [
        {
            "role": "user",
            "content": [{"type": "image", "path": "a.jpg"}, {"type": "text", "text": "\none?"}],
        },
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": [{"type": "text", "text": "two?"}]},
        {"role": "assistant", "content": "2"},
    ]
    assert image_and_text("a.jpg", "a dog") == [
        {"role": "user", "content": [{"type": "image", "path": "a.jpg"}]},
        {"role": "assistant", "content": "a dog"},
    ]


def test_prompts_of_the_paper():
    assert short_question("what {question} is it?") == f"what {{question}} is it?{SHORT}"
    assert short_question("") == ""
    assert choice_question("which?", ["cat", "{options}"]) == (
        "which?\nA. cat\nB. {options}\n"
        "Answer with the option's letter from the given choices directly."
    )
