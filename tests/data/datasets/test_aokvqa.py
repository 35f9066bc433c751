from functools import partial
from random import Random

import pytest

from owl2.data.datasets.questions import different_order
from owl2.data.datasets.registry import read_published
from owl2.errors import ErrorCode
from tests.data.datasets.published_files import LETTER, SHORT, put, split_skipped, summarize_all
from tests.errors import raises_input_error

aokvqa = partial(read_published, "aokvqa")
OPTIONS = ["man", "stranger", "player", "dog"]


def question(**change: object) -> dict:
    return {
        "split": "train",
        "image_id": 299207,
        "question_id": "22MexNkBPpdZGX6sxbxVBH",
        "question": "Who is on the court?",
        "choices": OPTIONS,
        "correct_choice_idx": 2,
        "direct_answers": ["ball", "player", "player", "ball"],
        "difficult_direct_answer": False,
        "rationales": ["A player hits the ball."],
    } | change


@pytest.fixture
def folder(tmp_path):
    put(tmp_path, "aokvqa_v1p0_train.json", [question()])
    return tmp_path


def test_a_question_has_three_forms(folder):
    direct, choice, reordered = summarize_all(aokvqa(folder))
    image = "train2017/000000299207.jpg"
    assert direct == (image, [(f"<|image|>\nWho is on the court?{SHORT}", "ball")])
    text = "<|image|>\nWho is on the court?\nA. man\nB. stranger\nC. player\nD. dog\n"
    assert choice == (image, [(text + LETTER, "C")])
    ((words, letter),) = reordered[1]
    begin, *lines, end = words.split("\n")[1:]
    assert (begin, end) == ("Who is on the court?", LETTER)
    assert [line[:3] for line in lines] == ["A. ", "B. ", "C. ", "D. "]
    options = [line[3:] for line in lines]
    assert sorted(options) == sorted(OPTIONS)
    assert options != OPTIONS
    assert f"{letter}. player" in lines


def test_the_reordered_options_depend_on_the_seed(folder):
    orders = set()
    for seed in range(30):
        (((_, ((words, letter),)),)) = summarize_all(aokvqa(folder, forms="reordered", seed=seed))
        assert f"\n{letter}. player\n" in words
        orders.add(words)
    assert len(orders) > 5
    assert summarize_all(aokvqa(folder, seed=3)) == summarize_all(aokvqa(folder, seed=3))


def test_forms_are_selectable(folder):
    (choice, direct) = split_skipped(aokvqa(folder, forms="choice,direct"))[0]
    assert choice.source.endswith("row 1, choice")
    assert direct.source.endswith("row 1, direct")
    with raises_input_error(ErrorCode.UNKNOWN_NAME, "reordered"):
        list(aokvqa(folder, forms="direct,order"))


@pytest.mark.parametrize("length", [2, 3, 4, 9])
def test_different_order_is_never_the_identity(length):
    for seed in range(30):
        order = different_order(length, Random(seed))
        assert order != list(range(length))
        assert sorted(order) == list(range(length))


def test_a_missing_direct_answer_is_counted(tmp_path):
    put(tmp_path, "aokvqa_v1p0_train.json", [question(direct_answers=[])])
    samples, skipped = split_skipped(aokvqa(tmp_path))
    assert len(samples) == 2
    assert skipped == {"questions without text or without an answer": 1}


def test_val_is_separate(tmp_path, folder):
    put(tmp_path, "aokvqa_v1p0_val.json", [question(split="val")])
    ((image, _),) = summarize_all(aokvqa(tmp_path, split="val", forms="direct"))
    assert image == "val2017/000000299207.jpg"
    with raises_input_error(ErrorCode.INVALID_VALUE, "train"):
        list(aokvqa(tmp_path, file="aokvqa_v1p0_val.json"))


@pytest.mark.parametrize(
    ("change", "expected_error"),
    [
        ({"correct_choice_idx": 4}, (ErrorCode.INVALID_FORMAT, "correct_choice_idx")),
        ({"correct_choice_idx": -1}, (ErrorCode.INVALID_FORMAT, "correct_choice_idx")),
        ({"correct_choice_idx": None}, (ErrorCode.INVALID_TYPE, "correct_choice_idx")),
        ({"choices": ["one"]}, (ErrorCode.INVALID_FORMAT,)),
        ({"choices": ["one", ""]}, (ErrorCode.INVALID_FORMAT,)),
        ({"choices": [1, 2]}, (ErrorCode.INVALID_TYPE,)),
        ({"image_id": "299207"}, (ErrorCode.INVALID_TYPE, "image_id")),
        ({"direct_answers": "player"}, (ErrorCode.INVALID_TYPE, "direct_answers")),
    ],
)
def test_a_malformed_row_is_named(tmp_path, change, expected_error):
    path = put(tmp_path, "aokvqa_v1p0_train.json", [question(), question(**change)])
    with raises_input_error(*expected_error) as caught:
        list(aokvqa(tmp_path))
    assert str(caught.value).startswith(f"{path}, row 2")
