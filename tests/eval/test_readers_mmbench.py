"""The file of MMBench: hints, options, images in base64, rounds."""

import base64
import csv
import io
import shutil

import pytest
from PIL import Image

from owl2.errors import ErrorCode
from owl2.processing.image_io import load_image
from tests.errors import raises_input_error
from tests.eval.reading import (
    FIXTURES,
    LETTER,
    LETTER_REQUEST,
    by_id,
    images,
    prompt_text,
    read,
    score,
)

FILE = "mmbench/mmbench_dev_20230712.tsv"


@pytest.fixture
def data(tmp_path):
    """A copy of the fixture."""
    shutil.copytree(FIXTURES / "mmbench", tmp_path / "mmbench")
    return tmp_path


def test_prompt_has_hint_question_and_options():
    sample = by_id("mmbench")["1000252"]
    assert prompt_text(sample) == (
        'The image has one color.\nIt is "warm".\nWhich of the two is true?\n'
        "A. It is cold.\nB. It is warm." + LETTER_REQUEST
    )
    assert prompt_text(by_id("mmbench")["241"]).startswith("N/A\n")
    plain = {sample.id: prompt_text(sample) for sample in read("mmbench", prompts="plain")[0]}
    assert plain["1000252"].endswith("B. It is warm." + LETTER)
    assert not plain["241"].startswith("N/A")
    assert sample.expected == ("B",)
    assert sample.metadata["question"] == "252"
    assert sample.category == "logic_reasoning"


def test_later_rounds_have_the_image_of_the_first():
    samples = by_id("mmbench")
    assert images(samples["3000241"]) == images(samples["241"])
    assert load_image(*images(samples["241"])).getpixel((5, 5))[2] > 200  # blue


def test_rounds_of_a_question_are_adjacent():
    firsts = [sample.metadata["question"] for sample in by_id("mmbench").values()]
    assert firsts == ["241"] * 4 + ["252"] * 2


def change_rows(path, function):
    with path.open(newline="") as file:
        rows = function(list(csv.DictReader(file, delimiter="\t")))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)


def test_rounds_are_added_to_a_file_without_them(data):
    change_rows(data / FILE, lambda rows: rows[:2])
    assert by_id("mmbench", data) == by_id("mmbench")


def test_circular_score_of_a_constant_letter():
    metrics = score("mmbench", lambda sample: "A")
    assert metrics["accuracy"] == 0 and metrics["accuracy_of_rounds"] == pytest.approx(2 / 6)


def test_large_images(data):
    out = io.BytesIO()
    Image.effect_noise((400, 400), 90).save(out, "PNG")
    large = base64.b64encode(out.getvalue()).decode()
    assert len(large) > 131_072  # the default limit of csv
    change_rows(data / FILE, lambda rows: [{**row, "image": large} for row in rows])
    samples, _ = read("mmbench", data)
    assert load_image(*images(samples[0])).size == (400, 400)


def test_rows_without_an_image_are_invalid(data):
    change_rows(data / FILE, lambda rows: [{**row, "image": "241"} for row in rows])
    samples, invalid = read("mmbench", data)
    assert samples == [] and len(invalid) == 6


@pytest.mark.parametrize(
    ("function", "needle"),
    [
        (lambda row: {k: v for k, v in row.items() if k != "answer"}, "answer"),
        (lambda row: {**row, "answer": ""}, "row 1: "),
        (lambda row: {**row, "answer": "E"}, "'E'"),
        (lambda row: {**row, "index": "x"}, "'x'"),
    ],
)
def test_file_without_valid_rows_is_an_error(function, needle, data):
    change_rows(data / FILE, lambda rows: [function(row) for row in rows])
    with raises_input_error(ErrorCode.INVALID_FORMAT, needle):
        read("mmbench", data)


@pytest.mark.parametrize("change", [{"answer": "E"}, {"index": "x"}, {"index": ""}])
def test_invalid_row_is_reported_and_skipped(change, data):
    published = {sample.id for sample in read("mmbench", data)[0]}
    change_rows(data / FILE, lambda rows: [*rows[:-1], rows[-1] | change])
    samples, [invalid] = read("mmbench", data)
    assert len(samples) == len(published) - 1
    assert f"{data / FILE}, row {len(published)}: " in invalid.reason
