from functools import partial

import pytest

from owl2.data.datasets.registry import read_published
from owl2.errors import ErrorCode
from tests.data.datasets.published_files import SHORT, put, summarize_all
from tests.errors import raises_input_error

gqa = partial(read_published, "gqa")


def question(image: str, text: str, answer: str) -> dict:
    return {
        "semantic": [{"operation": "select", "dependencies": [], "argument": "sky (2486325)"}],
        "entailed": ["02930160"],
        "equivalent": ["02930152"],
        "question": text,
        "imageId": image,
        "isBalanced": True,
        "groups": {"global": None, "local": "06-sky_dark"},
        "answer": answer,
        "semanticStr": "select: sky (2486325)->verify color: dark [0]",
        "annotations": {"answer": {}, "question": {"2": "2486325"}, "fullAnswer": {}},
        "types": {"detailed": "verifyAttr", "semantic": "attr", "structural": "verify"},
        "fullAnswer": "Yes, the sky is dark.",
    }


def test_short_answers_grouped_by_image(tmp_path):
    rows = {
        "02930152": question("2354786", "Is the sky dark?", "yes"),
        "07333408": question("2375429", "What is on the wall?", "pipe"),
        "07333405": question("2354786", "Is it red?", "no"),
    }
    put(tmp_path, "train_balanced_questions.json", rows)
    assert summarize_all(gqa(tmp_path)) == [
        (
            "images/2354786.jpg",
            [(f"<|image|>\nIs the sky dark?{SHORT}", "yes"), (f"Is it red?{SHORT}", "no")],
        ),
        ("images/2375429.jpg", [(f"<|image|>\nWhat is on the wall?{SHORT}", "pipe")]),
    ]


def test_val_is_another_file(tmp_path):
    put(tmp_path, "val_balanced_questions.json", {"1": question("5", "Is it?", "yes")})
    assert [image for image, _ in summarize_all(gqa(tmp_path, split="val"))] == ["images/5.jpg"]


@pytest.mark.parametrize("key", ["question", "answer", "imageId"])
def test_a_row_with_a_missing_key_is_named(tmp_path, key):
    row = question("5", "Is it?", "yes")
    del row[key]
    path = put(tmp_path, "train_balanced_questions.json", {"0123": row})
    with raises_input_error(ErrorCode.MISSING_VALUE) as caught:
        list(gqa(tmp_path))
    assert str(caught.value).startswith(str(path))
