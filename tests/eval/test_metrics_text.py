"""Exact match, ROUGE, and the means of the scores of lm-eval."""

import pytest

from owl2.errors import ErrorCode
from owl2.eval.metrics.text import ACC, ACC_NORM, EXACT, ROUGE, normalize
from owl2.eval.metrics.vqa import normalize as normalize_vqa
from owl2.eval.metrics.vqa import normalize_textvqa
from owl2.eval.tasks import find_tasks
from tests.errors import raises_input_error
from tests.eval.reading import response


@pytest.mark.parametrize(
    ("text", "expected", "is_correct"),
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
def test_exact_match(text, expected, is_correct):
    assert EXACT.score([response(text, *expected)]).per_sample == [float(is_correct)]


def test_accuracy_is_the_mean():
    scores = EXACT.score([response("red", "red"), response("red", "blue"), response("a", "A.")])
    assert scores.metrics == {"accuracy": pytest.approx(2 / 3)}
    assert scores.per_sample == [1.0, 0.0, 1.0]
    assert EXACT.to_dict() == {"name": "exact_match", "version": "1"}


def test_normalization_is_idempotent():
    for text in ("Yes.", " no . ", "A Red Circle", ".", "3.5"):
        assert normalize(normalize(text)) == normalize(text)
    assert normalize("3.5") == "3.5"


def test_means_of_the_scores_of_lm_eval():
    responses = [
        response("A", scores={"acc": 1.0, "acc_norm": 0.0}),
        response("B", scores={"acc": 0.0, "acc_norm": 0.0}),
        response("6", scores={"acc": 1.0}),  # open questions of AGIEval have no other score
    ]
    scores = ACC.score(responses)
    assert scores.metrics == {"acc": pytest.approx(2 / 3), "acc_norm": 0.0}
    assert scores.per_sample == [1.0, 0.0, 1.0]
    assert ACC_NORM.score(responses[:2]).per_sample == [0.0, 0.0]


def test_rouge():
    pytest.importorskip("rouge_score")
    # 4 of 5 generated words are among the 6 expected: 2 * 4 / (5 + 6); in order "the owl the town":
    # 4 (stems: "flies" and "fly" are one); pairs: "the owl", "owl fly" -> 2 * 2 / (4 + 5)
    scores = ROUGE.score(
        [
            response("the owl flies to town", "the owl flies over the town"),
            response("", "the owl"),
        ]
    )
    assert scores.per_sample == [pytest.approx(8 / 11), 0.0]
    assert scores.metrics["rouge1"] == pytest.approx(4 / 11)
    assert scores.metrics["rouge2"] == pytest.approx(2 / 9)
    assert ROUGE.score([response("Flying owls", "an owl flies")]).metrics["rouge1"] == 4 / 5


def test_missing_package_is_an_error(monkeypatch):
    monkeypatch.setattr("owl2.errors.find_spec", lambda name: None)
    [rouge, exact] = find_tasks("xsum,textvqa")
    with raises_input_error(ErrorCode.MISSING_DEPENDENCY, "rouge_score", "owl2-vlm[eval]"):
        rouge.read(rouge.data(None))
    with raises_input_error(ErrorCode.FILE_NOT_FOUND):
        exact.read(exact.data(None))


@pytest.mark.parametrize(
    "response", ["红色", "红色。", "红色｡", "红色.", " 红色 。", "\u3000红色。"], ids=ascii
)
def test_chinese_is_normalized_like_english(response):
    assert normalize(response) == "红色"
    assert normalize_vqa(response) == normalize_vqa("红色")
    assert normalize_textvqa(response) == normalize_textvqa("红色")


def test_unicode_forms_are_equal():
    for normalizer in (normalize, normalize_vqa, normalize_textvqa):
        assert normalizer("cafe\u0301") == normalizer("caf\u00e9")
        assert normalizer("ＡＢ１２") == normalizer("ab12")
        assert normalizer("对，是！") == normalizer("对,是!")
