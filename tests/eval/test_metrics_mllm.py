"""MME, POPE, MMBench and SEED-Bench: their figures on answers that can be counted by hand."""

import pytest

from owl2.eval.metrics.choices import CIRCULAR, SEED_BENCH
from owl2.eval.metrics.yes_no import COGNITION, MME, PERCEPTION, POPE, says_yes, yes_or_no
from owl2.eval.samples import EvalSample, Response

OPTIONS = ["red", "green", "blue"]


def said(text, expected, **metadata):
    return Response(EvalSample(text, "?", [], (expected,), metadata=metadata), "", text)


# ------------------------------------------------------------------ MME


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("Yes", "yes"),
        ("yes.", "yes"),
        ("Y", "yes"),
        ("n", "no"),
        ("No, it is not", "no"),
        (" NO", "no"),
        ("Not sure", "no"),
        ("It is. Yes", None),  # the first four letters alone count
        ("", None),
        ("x", None),
    ],
)
def test_mme_reads_the_first_four_letters(text, meant):
    assert yes_or_no(text) == meant


def pair(category, image, *texts):
    """Answers to an image's two questions, of which the first is to be answered yes."""
    return [
        said(text, expected, category=category, image=image)
        for text, expected in zip(texts, ("Yes", "No"), strict=False)
    ]


def test_mme_adds_accuracy_and_accuracy_plus_of_each_category():
    answers = [
        *pair("existence", "1", "Yes", "No"),  # both right
        *pair("existence", "2", "Yes", "Yes"),  # one
        *pair("existence", "3", "no", "yes"),  # none
        *pair("existence", "4", "hm", "No"),  # one
        *pair("OCR", "1", "Yes", "No"),  # another image, though its name is the same
        *pair("code_reasoning", "1", "Yes", "Yes"),
    ]
    scores = MME.score(answers)
    # existence: 4 of 8 right, 1 of 4 images; OCR: all; code_reasoning: 1 of 2, no image.
    assert scores.metrics == pytest.approx(
        {
            "perception": (50 + 25) + 200,
            "cognition": 50,
            "accuracy": 7 / 12,
            "accuracy_plus": 2 / 6,
        }
    )
    assert MME.score(answers[:8]).metrics == {
        "perception": 75,
        "accuracy": 0.5,
        "accuracy_plus": 0.25,
    }
    assert scores.per_sample == [1, 1, 1, 0, 0, 0, 0, 1, 1, 1, 1, 0]


def test_mme_survives_a_question_without_its_partner():
    answers = [*pair("count", "1", "Yes", "No"), *pair("count", "2", "Yes")]
    assert MME.score(answers).metrics["perception"] == 200
    assert MME.score(pair("count", "2", "Yes")).metrics["perception"] == 100


def test_mme_at_its_best_is_2000_and_800():
    answers = [a for name in (*PERCEPTION, *COGNITION) for a in pair(name, "1", "Yes", "No")]
    metrics = MME.score(answers).metrics
    assert (metrics["perception"], metrics["cognition"]) == (2000, 800)


# ------------------------------------------------------------------ POPE


@pytest.mark.parametrize(
    ("text", "yes"),
    [
        ("Yes", True),
        ("yes, there is a dog", True),
        ("No", False),
        ("No, there is none", False),
        ("There is no dog", False),
        ("It is not there", False),
        ("Yes. But not here", True),  # the first sentence alone counts
        ("Nothing", True),
        ("", True),
    ],
)
def test_pope_looks_for_no_and_not_in_the_first_sentence(text, yes):
    assert says_yes(text) == yes


def test_popes_five_figures():
    # 3 hits, 1 false alarm, 2 misses, 4 right refusals.
    answers = [said("yes", "yes")] * 3 + [said("Yes.", "no")]
    answers += [said("No", "yes")] * 2 + [said("no", "no")] * 4
    scores = POPE.score(answers)
    assert scores.metrics == pytest.approx(
        {
            "accuracy": 0.7,
            "precision": 3 / 4,
            "recall": 3 / 5,
            "f1": 2 * 3 / (2 * 3 + 1 + 2),
            "yes_ratio": 0.4,
        }
    )
    assert scores.per_sample == [1, 1, 1, 0, 0, 0, 1, 1, 1, 1]


def test_pope_of_a_model_that_always_says_no_is_zero_and_no_error():
    metrics = POPE.score([said("no", "yes"), said("no", "no")]).metrics
    assert metrics == {"f1": 0, "accuracy": 0.5, "precision": 0, "recall": 0, "yes_ratio": 0}


# ------------------------------------------------------------------ MMBench, SEED-Bench


def rounds(question, *pairs):
    return [said(text, letter, options=OPTIONS, question=question) for text, letter in pairs]


def test_a_question_of_mmbench_is_right_if_all_its_rounds_are():
    answers = [
        *rounds("1", ("A", "A"), ("C", "C"), ("B", "B")),
        *rounds("2", ("A", "A"), ("A", "C"), ("A", "B")),  # likes A
        *rounds("3", ("green", "B"), ("hm", "A")),
    ]
    scores = CIRCULAR.score(answers)
    assert scores.metrics["accuracy"] == pytest.approx(1 / 3)
    assert scores.metrics["accuracy_of_rounds"] == pytest.approx(5 / 8)
    assert scores.metrics["unparsed"] == pytest.approx(1 / 8)
    assert scores.per_sample == [1, 1, 1, 1, 0, 0, 1, 0]


def test_seed_bench_tells_images_and_videos_apart():
    def answer(text, letter, media):
        return said(text, letter, options=OPTIONS, media=media)

    answers = [answer("A", "A", "image"), answer("B", "A", "image"), answer("C", "C", "video")]
    metrics = SEED_BENCH.score(answers).metrics
    assert metrics["accuracy"] == pytest.approx(2 / 3)
    assert (metrics["accuracy_image"], metrics["accuracy_video"]) == (0.5, 1.0)
    assert "accuracy_video" not in SEED_BENCH.score(answers[:2]).metrics
