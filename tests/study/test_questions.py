"""Questions and negatives: one correct answer, balanced answers, no revealing rounds."""

from random import Random

import pytest
from PIL import Image, ImageOps
from questions import (
    KIND,
    NAME,
    Titled,
    choice_questions,
    draw_copies,
    exact_questions,
    negatives,
    probe_questions,
    training_rows,
    with_article,
)

IMAGES = [
    Titled(f"images/{group}/{title}.png", title, group, group, color)
    for group, titles in {
        "animal": ("dog", "guide dog", "cat", "owl", "cow", "rat"),
        "food": ("bread", "apples", "cheese", "pizza", "cake", "soup"),
        "tool": ("hammer", "saw", "drill", "axe", "rake", "file"),
    }.items()
    for title, color in zip(titles, ("red", "", "blue", "", "green", ""), strict=True)
]


@pytest.mark.parametrize(
    ("title", "question"),
    [
        ("dog", "Is there a dog?"),
        ("owl", "Is there an owl?"),
        ("apples", "Are there apples?"),
        ("cross", "Is there a cross?"),
        ("hot dogs", "Are there hot dogs?"),
    ],
)
def test_article(title, question):
    assert with_article(title) == question


def test_negatives_share_no_word_and_may_be_of_the_same_group():
    rng = Random(0)
    dog = IMAGES[0]
    for hard in (False, True):
        found = {title for _ in range(50) for title in negatives(dog, IMAGES, 3, rng, hard)}
        assert not {"dog", "guide dog"} & found
        assert found <= {"cat", "owl", "cow", "rat"} if hard else len(found) > 10


def test_training_rows_do_not_repeat_an_answer():
    rows = [*training_rows(IMAGES, Random(0))]
    assert len(rows) == 4 * len(IMAGES)
    replies = []
    for row in rows:
        turns = row["conversations"]
        assert turns[0]["value"].startswith("<image>\n")
        asked = [turn["value"].removeprefix("<image>\n") for turn in turns[::2]]
        given = [turn["value"] for turn in turns[1::2]]
        assert not any("<image>" in text for text in asked[1:])
        assert KIND not in asked or asked[0] == NAME
        replies += given[:1]
    assert replies.count("yes") == replies.count("no") == len(IMAGES)
    assert rows == [*training_rows(IMAGES, Random(0))]


def test_exact_questions_have_one_answer():
    rows = [*exact_questions(IMAGES, Random(0))]
    counts = dict.fromkeys(("name", "which", "kind", "color"), 0)
    for row in rows:
        counts[row["category"]] += 1
        [answer] = row["answers"]
        if row["category"] == "which":
            assert row["question"].count(",") == 2 and answer in row["question"]
    assert counts == {"name": 18, "which": 18, "kind": 18, "color": 9}


def test_options_are_in_random_order_and_half_are_hard():
    rows = [row for seed in range(20) for row in choice_questions(IMAGES, Random(seed))]
    groups = {one.title: one.group for one in IMAGES}
    positions = [row["options"].index(row["answer"]) for row in rows]
    assert all(0.15 < positions.count(place) / len(rows) < 0.35 for place in range(4))
    assert all(len(set(row["options"])) == 4 for row in rows)
    for row in rows:
        if row["category"] == "hard":
            assert {groups[option] for option in row["options"]} == {groups[row["answer"]]}
    assert [row["category"] for row in rows].count("hard") == len(rows) // 2


def test_probe_is_balanced_in_each_category():
    rows = [*probe_questions(IMAGES, Random(0))]
    for category in ("random", "popular", "adversarial"):
        answers = [row["answer"] for row in rows if row["category"] == category]
        assert answers.count("yes") == answers.count("no") == len(IMAGES) // 3
    for yes, no in zip(rows[::2], rows[1::2], strict=True):
        assert yes["image"] == no["image"] and yes["question"] != no["question"]


@pytest.mark.parametrize("count", [1, 4, 6])
def test_copies_are_separate(count):
    image = draw_copies(Image.new("RGB", (112, 112), "red"), count, Random(count))
    gray = ImageOps.invert(image.convert("L")).point(lambda value: value > 40 and 255)
    area = gray.histogram()[255]
    side = image.size[0] // 3 * 7 // 8
    assert area == count * side * side
