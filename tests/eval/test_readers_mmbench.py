"""MMBench's file: hints, options, images in base64, rounds."""

import base64
import csv
import io
import shutil

import pytest
from PIL import Image

from owl2.errors import InputError
from owl2.processing.image_io import load_image
from tests.eval.reading import FIXTURES, LETTER, by_id, images, read, score, words

FILE = "mmbench/mmbench_dev_20230712.tsv"


@pytest.fixture
def data(tmp_path):
    """A copy of the fixture."""
    shutil.copytree(FIXTURES / "mmbench", tmp_path / "mmbench")
    return tmp_path


def test_mmbench_asks_hint_question_and_options():
    question = by_id("mmbench")["1000252"]
    assert words(question) == (
        'The image has one colour.\nIt is "warm".\nWhich of the two is true?\n'
        "A. It is cold.\nB. It is warm." + LETTER
    )
    assert question.expected == ("B",)
    assert question.facts["question"] == "252"
    assert question.kind == "logic_reasoning"


def test_later_rounds_of_mmbench_show_the_first_ones_image():
    questions = by_id("mmbench")
    assert images(questions["3000241"]) == images(questions["241"])
    assert load_image(*images(questions["241"])).getpixel((5, 5))[2] > 200  # blue


def test_the_rounds_of_a_question_come_one_after_the_other():
    firsts = [question.facts["question"] for question in by_id("mmbench").values()]
    assert firsts == ["241"] * 4 + ["252"] * 2


def change_rows(path, function):
    with path.open(newline="") as file:
        rows = function(list(csv.DictReader(file, delimiter="\t")))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)


def test_rounds_of_mmbench_are_made_where_the_file_has_none(data):
    change_rows(data / FILE, lambda rows: rows[:2])
    made, published = by_id("mmbench", data), by_id("mmbench")
    assert made.keys() == published.keys()
    for identity, question in made.items():
        assert question == published[identity]


def test_a_model_that_likes_a_letter_gets_nothing_of_mmbench():
    figures = score("mmbench", lambda question: "A")
    assert figures["accuracy"] == 0 and figures["accuracy_of_rounds"] == pytest.approx(2 / 6)


def test_images_of_mmbench_may_be_large(data):
    out = io.BytesIO()
    Image.effect_noise((400, 400), 90).save(out, "PNG")
    large = base64.b64encode(out.getvalue()).decode()
    assert len(large) > 131_072  # csv's own limit
    change_rows(data / FILE, lambda rows: [{**row, "image": large} for row in rows])
    questions, _ = read("mmbench", data)
    assert load_image(*images(questions[0])).size == (400, 400)


def test_rows_of_mmbench_without_a_image_are_broken(data):
    change_rows(data / FILE, lambda rows: [{**row, "image": "241"} for row in rows])
    questions, broken = read("mmbench", data)
    assert questions == [] and len(broken) == 6


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda row: {k: v for k, v in row.items() if k != "answer"}, "no column answer.*dev"),
        (lambda row: {**row, "answer": ""}, "row 1: the answer ''"),
        (lambda row: {**row, "answer": "E"}, "row 1: the answer 'E'"),
        (lambda row: {**row, "index": "x"}, "row 1: the index 'x'"),
    ],
)
def test_what_is_wrong_in_mmbenchs_file_is_named(function, message, data):
    change_rows(data / FILE, lambda rows: [function(row) for row in rows])
    with pytest.raises(InputError, match=message):
        read("mmbench", data)


@pytest.mark.parametrize("change", [{"answer": "E"}, {"index": "x"}, {"index": ""}])
def test_a_row_of_mmbench_that_is_none_is_broken(change, data):
    published = {question.id for question in read("mmbench", data)[0]}
    change_rows(data / FILE, lambda rows: [*rows[:-1], rows[-1] | change])
    questions, [broken] = read("mmbench", data)
    assert len(questions) == len(published) - 1
    assert f"{data / FILE}, row {len(published)}: " in broken.reason
