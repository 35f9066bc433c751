"""The letter of the option that a response means."""

import pytest

from owl2.eval.metrics.choices import LETTER, parse_letter, with_options
from tests.eval.reading import response

OPTIONS = ("a dog", "a dog house", "two cats", "none of them")


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        (" b ", "B"),
        ("(c)", "C"),
        ("D.", "D"),
        ("**B**", "B"),
        ("The answer is **B**.", "B"),
        ("B. a dog house", "B"),
        ("B: two cats", "B"),  # the letter precedes the text
        ("(B) a dog house", "B"),
        ("C) two cats", "C"),
        ("c) two cats", "C"),
        ("B\nBecause it has a roof.", "B"),
        ("B a dog house", "B"),
        ("A, a dog", "A"),
        ("The answer is B.", "B"),
        ("The answer is A", "A"),
        ("Answer: (C)", "C"),
        ("The correct answer is: D because there is nothing", "D"),
        ("I would choose option C here.", "C"),
        ("Neither A nor B fits; the answer is C.", "C"),
        ("It must be (D), I think", "D"),
        ("B is correct.", "B"),
        ("A is the right one", "A"),
        ("C because there are two", "C"),
        ("I choose D.", "D"),
        ("I would say A", "A"),
        ("It's B", "B"),
        ("a dog", "A"),
        ("A dog", "A"),
        ("A dog house.", "B"),
        ("There are two cats in the image", "C"),
        ("The answer is: A dog house", "B"),
        # No option, or several:
        ("", None),
        ("E", None),
        ("The answer is E.", None),
        ("I think so", None),
        ("It is rich in vitamin C", None),
        ("D flat", None),
        ("It is a C major chord", None),
        ("A bird", None),
        ("The answer is B or C", None),
        ("(A) or (B)", None),
        ("Option A and option B", None),
        ("two cats and a dog", None),
        ("dogs", None),
        ("a doghouse", None),
        ("The answer", None),
    ],
)
def test_letter_of_a_response(text, letter):
    assert parse_letter(text, OPTIONS) == letter


def test_words_that_start_with_a_letter_and_a_hyphen():
    assert parse_letter("The answer is X-ray", ("MRI", "X-ray")) == "B"
    assert parse_letter("The answer is B-side", ("A-side", "B-side")) == "B"


def test_fewer_options_have_fewer_letters():
    assert parse_letter("C", OPTIONS) == "C"
    assert parse_letter("C", OPTIONS[:2]) is None


def test_equal_and_empty_options_are_ambiguous():
    assert parse_letter("yes", ("yes", "yes", "no")) is None
    assert parse_letter("no", ("yes", "yes", "no")) == "C"
    assert parse_letter("maybe", ("", "no")) is None


def test_options_may_contain_numbers_and_signs():
    assert parse_letter("12", ("1", "12", "2")) == "B"
    assert parse_letter("It is 3.5", ("3", "3.5")) == "B"
    assert parse_letter("-2", ("2", "-2")) == "B"
    assert parse_letter("x + 1", ("x", "x + 1")) == "B"


def test_options_follow_the_question():
    assert with_options("Which?", ["red", "blue"]) == "Which?\nA. red\nB. blue"


def test_unparsed_responses_are_wrong():
    pairs = [("B", "B"), ("C.", "B"), ("hm", "A"), ("D", "D")]
    scores = LETTER.score([response(text, letter, options=OPTIONS) for text, letter in pairs])
    assert scores.per_sample == [1.0, 0.0, 0.0, 1.0]
    assert scores.metrics == {"accuracy": 0.5, "unparsed": 0.25}
