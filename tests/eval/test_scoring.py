"""What counts as right."""

import pytest

from owl2.eval.scoring import EXACT_MATCH, normalise


@pytest.mark.parametrize(
    ("answer", "expected", "right"),
    [
        ("red", ["red"], True),
        (" Red.\n", ["red"], True),
        ("red .", ["red"], True),
        ("red", ["RED."], True),
        ("green", ["red", "green"], True),
        ("a red", ["red"], False),
        ("red circle", ["red"], False),
        ("re", ["red"], False),
        ("red..", ["red"], False),
        (".red", ["red"], False),
        ("", ["red"], False),
        ("yes, red", ["yes"], False),
        ("red", [], False),
    ],
)
def test_exact_match(answer, expected, right):
    assert EXACT_MATCH.is_right(answer, expected) is right


def test_normalised_stays_normalised():
    for answer in ("Yes.", " no . ", "A Red Circle", ".", "3.5"):
        assert normalise(normalise(answer)) == normalise(answer)
    assert normalise("3.5") == "3.5"


def test_results_say_which_rule_it_was():
    assert EXACT_MATCH.to_dict() == {"name": "exact_match", "version": "1"}
