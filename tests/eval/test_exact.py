"""What counts as right."""

import pytest

from owl2.eval.metrics.exact import MATCH, normalize
from owl2.eval.samples import EvalSample, Response


def answer(text, expected):
    return Response(EvalSample(text, "?", [], tuple(expected)), "", text)


@pytest.mark.parametrize(
    ("said", "expected", "right"),
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
def test_exact_match(said, expected, right):
    assert MATCH.score([answer(said, expected)]).per_sample == [float(right)]


def test_accuracy_is_the_mean():
    scores = MATCH.score([answer("red", ["red"]), answer("red", ["blue"]), answer("a", ["A."])])
    assert scores.metrics == {"accuracy": pytest.approx(2 / 3)}
    assert scores.per_sample == [1.0, 0.0, 1.0]


def test_normalised_stays_normalised():
    for answer in ("Yes.", " no . ", "A Red Circle", ".", "3.5"):
        assert normalize(normalize(answer)) == normalize(answer)
    assert normalize("3.5") == "3.5"


def test_results_say_which_rule_it_was():
    assert MATCH.to_dict() == {"name": "exact_match", "version": "1"}
