"""The letter of the option that a response means."""

import csv

import pytest

from owl2.data.datasets.prompts import with_options
from owl2.eval.metrics.choices import LETTER, parse_letter, parse_letter_mmbench
from tests.eval.reading import FIXTURES, response

OPTIONS = ("a dog", "a dog house", "two cats", "none of them")
ANIMALS = ("a red dog", "a cat", "two birds", "the house")


def test_letter_of_a_response():
    """Responses with the letter that a person reads in them, or "-" for none or several."""
    with (FIXTURES / "letters.tsv").open(encoding="utf-8", newline="") as file:
        rows = [*csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)]
    found = {}
    for row in rows:
        text = row["response"].replace("\\n", "\n").replace("\\\\", "\\")
        letter = parse_letter(text, row["options"].split("/")) or "-"
        if letter != row["letter"]:
            found[text] = letter
    assert not found
    assert len(rows) > 1000


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("A is incorrect.", "A"),  # a short response with one letter
        ("It is rich in vitamin C", "C"),
        ("A and B", None),
        ("The answer is A, not B", "A"),
        ("A rather long text about the answer, not a letter", None),
        ("a cat", "B"),
        ("Z", None),  # the letter for no option
        ("选B", "B"),  # left to the other parser
        ("Sorry, I can't help with images of people yet. A", None),  # a refusal
        ("Cannot determine the answer: A", None),
    ],
)
def test_mmbench_has_the_rule_of_vlmevalkit(text, letter):
    assert parse_letter_mmbench(text, ANIMALS) == letter


@pytest.mark.parametrize(
    ("text", "letter", "options"),
    [
        ("The answer is X-ray", "B", ("MRI", "X-ray")),
        ("The answer is B-side", "B", ("A-side", "B-side")),
        ("C++", "A", ("C++", "Java", "Rust")),
        ("C", None, OPTIONS[:2]),
        ("yes", None, ("yes", "yes", "no")),  # equal options
        ("no", "C", ("yes", "yes", "no")),
        ("maybe", None, ("", "no")),
        ("12", "B", ("1", "12", "2")),
        ("It is 3.5", "B", ("3", "3.5")),
        ("-2", "B", ("2", "-2")),
        ("x + 1", "B", ("x", "x + 1")),
    ],
)
def test_letter_of_unusual_options(text, letter, options):
    assert parse_letter(text, options) == letter


def test_options_follow_the_question():
    assert with_options("Which?", ["red", "blue"]) == "Which?\nA. red\nB. blue"


def test_unparsed_responses_are_wrong():
    pairs = [("B", "B"), ("C.", "B"), ("hm", "A"), ("D", "D")]
    scores = LETTER.score([response(text, letter, options=OPTIONS) for text, letter in pairs])
    assert scores.per_sample == [1.0, 0.0, 0.0, 1.0]
    assert scores.metrics == {"accuracy": 0.5, "unparsed": 0.25}
