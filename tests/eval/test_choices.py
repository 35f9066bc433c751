"""The letter that a free answer means."""

import pytest

from owl2.eval.metrics.choices import LETTER, parse_letter, with_options
from owl2.eval.samples import EvalSample, Response

OPTIONS = ("a dog", "a dog house", "two cats", "none of them")


@pytest.mark.parametrize(
    "said, letter",
    [
        ("B", "B"),
        (" b ", "B"),
        ("(c)", "C"),
        ("D.", "D"),
        ("**B**", "B"),
        ("The answer is **B**.", "B"),
        ("B. a dog house", "B"),
        ("B: two cats", "B"),  # the letter is what was asked for
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
        # Nothing, or more than one:
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
def test_an_answer_means_a_letter_or_none(said, letter):
    assert parse_letter(said, OPTIONS) == letter


def test_words_that_begin_like_letters_are_words():
    assert parse_letter("The answer is X-ray", ("MRI", "X-ray")) == "B"
    assert parse_letter("The answer is B-side", ("A-side", "B-side")) == "B"


def test_fewer_options_have_fewer_letters():
    assert parse_letter("C", OPTIONS) == "C"
    assert parse_letter("C", OPTIONS[:2]) is None


def test_options_with_the_same_words_or_none_are_not_told_apart():
    assert parse_letter("yes", ("yes", "yes", "no")) is None
    assert parse_letter("no", ("yes", "yes", "no")) == "C"
    assert parse_letter("maybe", ("", "no")) is None


def test_options_may_be_numbers_and_signs():
    assert parse_letter("12", ("1", "12", "2")) == "B"
    assert parse_letter("It is 3.5", ("3", "3.5")) == "B"
    assert parse_letter("-2", ("2", "-2")) == "B"
    assert parse_letter("x + 1", ("x", "x + 1")) == "B"


def test_options_are_written_below_the_question():
    assert with_options("Which?", ["red", "blue"]) == "Which?\nA. red\nB. blue"


def test_accuracy_counts_what_is_unparsed_as_wrong():
    def answer(text, letter):
        return Response(
            EvalSample(text, "?", [], (letter,), metadata={"options": OPTIONS}), "", text
        )

    scores = LETTER.score(
        [answer("B", "B"), answer("C.", "B"), answer("hm", "A"), answer("D", "D")]
    )
    assert scores.per_sample == [1.0, 0.0, 0.0, 1.0]
    assert scores.metrics == {"accuracy": 0.5, "unparsed": 0.25}
