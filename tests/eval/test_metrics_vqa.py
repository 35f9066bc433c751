"""VQA accuracy: known values, its definition, and the normalization of lmms-eval."""

import importlib.util
from pathlib import Path
from random import Random

import pytest

from owl2.eval.metrics.vqa import TEXTVQA, VQA, normalize, normalize_textvqa, vqa_accuracy
from tests.eval.reading import response


@pytest.mark.parametrize(
    ("raw", "normalized"),
    [
        ("A red Dog.", "red dog"),
        ("two\tdogs\n", "2 dogs"),
        ("none", "0"),
        ("an  the a", ""),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("yall'll", "y'all'll"),
        ("somebody'd", "somebodyd"),
        ("t-shirt", "t shirt"),  # between two words: a space
        ("big, red", "big red"),  # next to a space: removed
        ("10,000", "10000"),  # a comma in a number: all signs go
        ("t-shirt 10,000", "tshirt 10000"),
        ("3.5 m.", "3.5 m"),
        ("p.m.", "pm"),
        ("(left)", "left"),
        ("yes!", "yes"),
        ("what's", "what's"),
        ("ten%", "ten%"),
    ],
)
def test_normalization(raw, normalized):
    assert normalize(raw) == normalized


def test_textvqa_removes_punctuation_first():
    assert (normalize_textvqa("joe's"), normalize("joe's")) == ("joe 's", "joe's")
    assert (normalize_textvqa("red,blue"), normalize("red,blue")) == ("redblue", "red blue")
    assert normalize_textvqa("What?") == "what"


def test_score_with_ten_annotators():
    annotators = ["red"] * 1 + ["blue"] * 2 + ["green"] * 3 + ["teal"] * 4
    # One annotator: excluded once (0), included nine times (1/3 each). Three: 3 × 2/3 and 7 × 1.
    scores = {"red": 0.3, "blue": 0.6, "green": 0.9, "teal": 1.0, "pink": 0.0}
    for text, score in scores.items():
        assert vqa_accuracy(text, annotators) == pytest.approx(score)
    assert vqa_accuracy("The RED.", annotators) == pytest.approx(0.3)
    assert vqa_accuracy("Yes", ["yes"] * 10) == 1


def test_score_with_fewer_annotators():
    assert vqa_accuracy("red", ["red"]) == 0
    assert vqa_accuracy("red", ["red"] * 3) == pytest.approx(2 / 3)
    assert vqa_accuracy("red", ["red"] * 4) == 1


def test_accuracy_equals_the_definition():
    """The official code excludes each annotator in turn."""
    draw = Random(0)
    for _ in range(200):
        annotators = draw.choices(["a1", "b2", "c3"], k=draw.choice([1, 4, 9, 10]))
        parts = []
        for place in range(len(annotators)):
            others = annotators[:place] + annotators[place + 1 :]
            parts.append(min(1, others.count("a1") / 3))
        assert vqa_accuracy("a1", annotators) == pytest.approx(sum(parts) / len(parts))


def test_metric():
    responses = [response("A red", *["red"] * 10), response("joe", *["joe"] * 2, *["joe's"] * 8)]
    scores = VQA.score(responses)
    assert scores.per_sample == pytest.approx([1, 0.6])
    assert scores.metrics == pytest.approx({"accuracy": 0.8})
    assert VQA.main in scores.metrics
    assert VQA.to_dict() == {"name": "vqa_accuracy", "version": "1"}
    assert TEXTVQA.to_dict() == {"name": "textvqa_accuracy", "version": "1"}
    # The two metrics replace a comma between two words differently.
    responses = [response("red, blue", *["red,blue"] * 10)]
    assert (VQA.score(responses).per_sample, TEXTVQA.score(responses).per_sample) == ([1], [0])


def test_normalization_equals_that_of_lmms_eval():
    """Only its file is loaded: the package takes seconds to import."""
    package = importlib.util.find_spec("lmms_eval")
    if package is None:
        pytest.skip("lmms-eval is not installed")
    path = Path(package.origin).parent / "tasks" / "_task_utils" / "vqa_eval_metric.py"
    spec = importlib.util.spec_from_file_location("vqa_eval_metric", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    process = module.EvalAIAnswerProcessor()
    known = [*process.CONTRACTIONS, *process.NUMBER_MAP, *process.ARTICLES]
    parts_of_text = [
        *known,
        *known,
        *process.PUNCTUATIONS,
        *" .,'?",
        "10,000",
        "3.5",
        "dog",
        "It",
        "\n",
    ]
    draw = Random(1)
    random = ["".join(draw.choices([*parts_of_text, " ", " ", " "], k=9)) for _ in range(2000)]
    for text in [*known, *random]:
        assert normalize_textvqa(text) == process(text), text
        plain = text.replace("\n", " ").replace("\t", " ").strip()
        expected = process.process_digit_article(process.process_punctuation(plain))
        assert normalize(text) == expected, text
