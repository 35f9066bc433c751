from functools import partial

import pytest

from owl2.data.datasets.registry import read_published
from owl2.errors import ErrorCode
from tests.data.datasets.published_files import SHORT, put, split_skipped, summarize, summarize_all
from tests.errors import raises_input_error

ocr_vqa = partial(read_published, "ocr_vqa")


def cover(split: int, *pairs: tuple[str, str], url: object = "http://e.com/I/61Y5.jpg") -> dict:
    return {
        "imageURL": url,
        "questions": [question for question, _ in pairs],
        "answers": [answer for _, answer in pairs],
        "title": "Mom's Family Wall Calendar 2016",
        "authorName": "Sandra Boynton",
        "genre": "Calendars",
        "split": split,
    }


WHO = ("Who wrote this book?", "Sandra Boynton")


@pytest.fixture
def folder(tmp_path):
    rows = {
        "761183272": cover(1, WHO, ("Is this a comic?", "No")),
        "B00": cover(2, WHO, url="http://e.com/I/7.gif?x=1.jpg"),
        "1111": cover(3, WHO),
    }
    put(tmp_path, "dataset.json", rows)
    return tmp_path


def test_one_conversation_per_cover(folder):
    assert summarize_all(ocr_vqa(folder)) == [
        (
            "images/761183272.jpg",
            [
                (f"<|image|>\nWho wrote this book?{SHORT}", "Sandra Boynton"),
                (f"Is this a comic?{SHORT}", "No"),
            ],
        )
    ]


def test_val_is_separate(folder):
    assert [image for image, _ in summarize_all(ocr_vqa(folder, split="val"))] == ["images/B00.gif"]


def test_covers_and_questions_are_skipped(tmp_path):
    rows = {
        "1": cover(1, WHO, url=""),
        "2": cover(1, WHO, url=None),
        "3": cover(1, ("Who?", ""), WHO),
        "4": cover(1, ("", "x")),
    }
    put(tmp_path, "dataset.json", rows)
    samples, skipped = split_skipped(ocr_vqa(tmp_path))
    assert [summarize(sample) for sample in samples] == [
        ("images/3.jpg", [(f"<|image|>\nWho wrote this book?{SHORT}", "Sandra Boynton")])
    ]
    assert skipped == {
        "covers without an image URL": 2,
        "questions without text or without an answer": 2,
    }


@pytest.mark.parametrize(
    ("change", "expected_error"),
    [
        ({"answers": []}, (ErrorCode.INVALID_FORMAT, "2")),
        ({"split": 4}, (ErrorCode.INVALID_FORMAT, "split")),
        ({"split": "train"}, (ErrorCode.INVALID_TYPE, "split")),
        ({"questions": "Who?"}, (ErrorCode.INVALID_TYPE, "questions")),
        ({"imageURL": 3}, (ErrorCode.INVALID_TYPE, "imageURL")),
    ],
)
def test_a_malformed_row_is_named(tmp_path, change, expected_error):
    rows = {"9": cover(1, WHO), "10": cover(1, WHO, WHO) | change}
    path = put(tmp_path, "dataset.json", rows)
    with raises_input_error(*expected_error) as caught:
        list(ocr_vqa(tmp_path))
    assert str(caught.value).startswith(f"{path}, '10': ")
