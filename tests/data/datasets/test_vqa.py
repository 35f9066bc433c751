from functools import partial

import pytest

from owl2.data.datasets.registry import read_published
from owl2.errors import ErrorCode
from tests.data.datasets.published_files import SHORT, put, split_skipped, summarize, summarize_all
from tests.errors import raises_input_error

vqav2, okvqa = partial(read_published, "vqav2"), partial(read_published, "okvqa")
NAMES = {
    vqav2: ("v2_OpenEnded_mscoco_train2014_questions.json", "v2_mscoco_train2014_annotations.json"),
    okvqa: ("OpenEnded_mscoco_train2014_questions.json", "mscoco_train2014_annotations.json"),
}


def questions(*rows: tuple[int, int, str], subtype: str = "train2014") -> dict:
    return {
        "info": {"description": "This is v2.0 of the VQA dataset.", "version": "2.0"},
        "task_type": "Open-Ended",
        "data_type": "mscoco",
        "license": {"name": "Creative Commons Attribution 4.0 International License"},
        "data_subtype": subtype,
        "questions": [
            {"image_id": image, "question": text, "question_id": number}
            for image, number, text in rows
        ],
    }


def annotations(*rows: tuple[int, int, list[str]], subtype: str = "train2014") -> dict:
    return {
        "info": {"description": "This is v2.0 of the VQA dataset.", "version": "2.0"},
        "license": {"name": "Creative Commons Attribution 4.0 International License"},
        "data_subtype": subtype,
        "annotations": [
            {
                "question_type": "what is",
                "multiple_choice_answer": "ignored",
                "answers": [
                    {"answer": answer, "answer_confidence": "yes", "answer_id": place}
                    for place, answer in enumerate(answers, start=1)
                ],
                "image_id": image,
                "answer_type": "other",
                "question_id": number,
            }
            for image, number, answers in rows
        ],
        "data_type": "mscoco",
    }


ASKED = [(458752, 458752000, "What is this?"), (9, 9000, "How many?"), (458752, 458752001, "Why?")]
ANSWERED = [(9, 9000, ["2", "two", "2"]), (458752, 458752000, ["net"] * 2 + ["nets"])]
WHY = (458752, 458752001, ["fun", "sport", "sport", "fun"])


@pytest.mark.parametrize("read", [vqav2, okvqa])
def test_majority_answers_grouped_by_image(tmp_path, read):
    put(tmp_path, NAMES[read][0], questions(*ASKED))
    put(tmp_path, NAMES[read][1], annotations(*ANSWERED, WHY))
    expected = [
        (
            "train2014/COCO_train2014_000000458752.jpg",
            [(f"<|image|>\nWhat is this?{SHORT}", "net"), (f"Why?{SHORT}", "fun")],
        ),
        ("train2014/COCO_train2014_000000000009.jpg", [(f"<|image|>\nHow many?{SHORT}", "2")]),
    ]
    assert summarize_all(read(tmp_path)) == expected
    of_2017 = summarize_all(read(tmp_path, coco=2017))
    assert [image for image, _ in of_2017] == [
        "train2017/000000458752.jpg",
        "train2017/000000000009.jpg",
    ]


@pytest.mark.parametrize("read", [vqav2, okvqa])
def test_the_validation_split_has_its_own_files_and_images(tmp_path, read):
    names = [name.replace("train", "val") for name in NAMES[read]]
    put(tmp_path, names[0], questions((42, 42000, "What?"), subtype="val2014"))
    put(tmp_path, names[1], annotations((42, 42000, ["surfing"]), subtype="val2014"))
    ((image, rounds),) = summarize_all(read(tmp_path, split="val"))
    assert image == "val2014/COCO_val2014_000000000042.jpg"
    assert rounds == [(f"<|image|>\nWhat?{SHORT}", "surfing")]


def test_file_names_are_options_and_empty_answers_are_skipped(tmp_path):
    put(tmp_path, "q.json", questions(*ASKED))
    put(tmp_path, "a.json", annotations(*ANSWERED, (458752, 458752001, ["", " "])))
    samples, skipped = split_skipped(vqav2(tmp_path, questions="q.json", annotations="a.json"))
    assert [len(summarize(sample)[1]) for sample in samples] == [1, 1]
    assert skipped == {"questions without text or without an answer": 1}


def broken(key: str, row: int, **change: object) -> tuple[dict, dict]:
    question_file, annotation_file = questions(*ASKED), annotations(*ANSWERED, WHY)
    (question_file if key == "questions" else annotation_file)[key][row] |= change
    return question_file, annotation_file


@pytest.mark.parametrize(
    ("files", "expected_error"),
    [
        (
            (questions(*ASKED), annotations(*ANSWERED)),
            (ErrorCode.INVALID_FORMAT, "45875"),
        ),
        ((questions(ASKED[1]), annotations(*ANSWERED)), (ErrorCode.INVALID_FORMAT, "1")),
        ((questions(*ASKED, subtype="test2015"), annotations(WHY)), (ErrorCode.INVALID_VALUE,)),
        (
            (questions(*ASKED, subtype="val2014"), annotations(WHY)),
            (ErrorCode.INVALID_VALUE, "val2014"),
        ),
        (
            (questions(*ASKED), annotations(WHY, subtype="val2014")),
            (ErrorCode.INVALID_VALUE, "val2014"),
        ),
        (broken("questions", 1, question=None), (ErrorCode.INVALID_TYPE, "question")),
        (broken("questions", 1, image_id="9"), (ErrorCode.INVALID_TYPE, "image_id")),
        (broken("annotations", 1, answers={}), (ErrorCode.INVALID_TYPE, "answers")),
        (broken("annotations", 0, answers=[{"answer": 2}]), (ErrorCode.INVALID_TYPE, "answer")),
    ],
)
def test_malformed_files_are_refused(tmp_path, files, expected_error):
    for name, content in zip(NAMES[vqav2], files, strict=True):
        put(tmp_path, name, content)
    with raises_input_error(*expected_error) as caught:
        list(vqav2(tmp_path))
    assert str(caught.value).startswith(str(tmp_path))
