"""lm-eval's scores over answers, and ROUGE by hand."""

import sys

import pytest

from owl2.errors import InputError
from owl2.eval.metrics.text import ACC, ACC_NORM, ROUGE
from owl2.eval.samples import EvalSample, Response


def answer(text, *expected, **metadata):
    return Response(EvalSample("q", "?", [], expected, metadata=metadata), "", text)


def test_means_of_the_suites_scores():
    answers = [
        answer("A", scores={"acc": 1.0, "acc_norm": 0.0}),
        answer("B", scores={"acc": 0.0, "acc_norm": 0.0}),
        answer("6", scores={"acc": 1.0}),  # AGIEval's written answers have no other score
    ]
    scores = ACC.score(answers)
    assert scores.metrics == {"acc": pytest.approx(2 / 3), "acc_norm": 0.0}
    assert scores.per_sample == [1.0, 0.0, 1.0]
    assert ACC_NORM.score(answers[:2]).per_sample == [0.0, 0.0]


def test_rouge():
    pytest.importorskip("rouge_score")
    # 4 of 5 words said are among the 6 expected: 2 * 4 / (5 + 6); in order "the owl the town": 4
    # (stems: "flies" and "fly" are one); pairs: "the owl", "owl fly" -> 2 * 2 / (4 + 5)
    scores = ROUGE.score(
        [
            answer("the owl flies to town", "the owl flies over the town"),
            answer("", "the owl"),
        ]
    )
    assert scores.per_sample == [pytest.approx(8 / 11), 0.0]
    assert scores.metrics["rouge1"] == pytest.approx(4 / 11)
    assert scores.metrics["rouge2"] == pytest.approx(2 / 9)
    assert ROUGE.score([answer("Flying owls", "an owl flies")]).metrics["rouge1"] == 4 / 5


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "rouge_score", None)
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(InputError, match=r"owl2-vlm\[eval\]"):
        ROUGE.score([answer("a", "b")])
