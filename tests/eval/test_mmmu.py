"""MMMU: Parquet files of the hub, prompts, and the rules of its script."""

import shutil

import pytest

from owl2.errors import ErrorCode
from owl2.eval.metrics.mmmu import MMMU, is_open_match, parse_letter_mmmu
from owl2.processing.image_io import load_image
from tests.errors import raises_input_error
from tests.eval.reading import FIXTURES, LETTER_REQUEST, REQUEST, by_id, images, read, response

OPTIONS = ["red", "green", "blue", "B sharp"]


def prompt(sample):
    """The text of the user message, with ``<|image|>`` for images."""
    parts = sample.messages[0]["content"]
    return "".join(part.get("text", "<|image|>") for part in parts)


def test_prompts_have_images_at_their_places():
    samples, [missing] = read("mmmu")
    choice, swapped, number = samples
    assert prompt(choice) == (
        "<|image|> Which color is it? \nA. Red\nB. $5\nC. Blue" + LETTER_REQUEST
    )
    assert (choice.id, choice.category) == ("validation_Accounting_1", "Accounting")
    assert choice.expected == ("A",)
    assert prompt(swapped).startswith("Which of the two is blue?\nA. <|image|>\nB. <|image|>\n")
    blue, red = (load_image(image).getpixel((1, 1)) for image in images(swapped))
    assert (blue, red) == ((0, 0, 255), (255, 0, 0)), "<image 2> comes first"
    assert prompt(number) == "How much is shown in <|image|>?\n" + REQUEST.strip()
    assert number.expected == ("24/7", "3.429")
    assert missing.id == "validation_Accounting_4"


def test_file_that_is_not_parquet_is_unreadable(tmp_path):
    shutil.copytree(FIXTURES / "mmmu", tmp_path / "mmmu")
    path = next((tmp_path / "mmmu").glob("*/*.parquet"))
    path.write_text("x")
    with raises_input_error(ErrorCode.UNREADABLE_FILE, path):
        read("mmmu", tmp_path)


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("(B)", "B"),
        ("A or B", "B"),  # the last one
        ("(A) rather than B", "A"),  # brackets first
        ("The color of the sky is blue", "C"),  # six words
        ("It is blue", None),
        ("", None),
        ("b", None),
    ],
)
def test_letter_by_the_rule_of_the_script(text, letter):
    assert parse_letter_mmmu(text, OPTIONS) == letter


@pytest.mark.parametrize(
    ("text", "answers", "expected"),
    [
        ("The answer is 3.43.", ["24/7", "3.429"], True),  # two decimals
        ("3.43 or 24/7", ["24/7"], True),
        ("It costs 1,234 dollars", ["1234"], True),
        ("x = 5", ["5"], True),
        ("It is red, so blue", ["red"], False),  # the shortest conclusion
        ("5", ["x"], False),
        ("x y", ["x"], True),
        ("xy", ["x"], False),  # a single character is a word
        ("", ["1"], False),
    ],
)
def test_open_answer_by_the_rule_of_the_script(text, answers, expected):
    assert is_open_match(text, answers) == expected


def test_random_option_replaces_a_response_without_one():
    samples = [response(f"no idea {number}", "A", options=OPTIONS) for number in range(400)]
    scores = MMMU.score([*samples, response("7", "7")])
    assert scores.metrics["unparsed"] == 1.0
    assert 70 < sum(scores.per_sample) < 130
    assert scores == MMMU.score([*samples, response("7", "7")]), "the seed is the id"
    assert scores.per_sample[-1] == 1.0


def test_best_score():
    samples = by_id("mmmu").values()
    scores = MMMU.score([response(s.expected[0], *s.expected, **s.metadata) for s in samples])
    assert scores.metrics["accuracy"] == 1.0
