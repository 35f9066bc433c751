"""MME, POPE, MMBench and SEED-Bench: known scores of a few responses."""

import pytest

from owl2.eval.metrics.choices import CIRCULAR, SEED_BENCH
from owl2.eval.metrics.yes_no import COGNITION, MME, PERCEPTION, POPE, says_yes, yes_or_no
from tests.eval.reading import response

OPTIONS = ["red", "green", "blue"]


# ------------------------------------------------------------------ MME


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Yes", "yes"),
        ("yes.", "yes"),
        ("Y", None),
        ("n", None),
        ("y.e.s", None),
        ("No, it is not", "no"),
        (" NO", "no"),
        ("Not sure", "no"),
        ("It is. Yes", None),  # only the first four letters count
        ("", None),
        ("x", None),
    ],
)
def test_mme_parses_the_first_four_letters(text, expected):
    assert yes_or_no(text) == expected


def pair(category, image, *texts):
    """Responses to the two questions about an image; the first expected answer is yes."""
    return [
        response(text, expected, category=category, image=image)
        for text, expected in zip(texts, ("Yes", "No"), strict=False)
    ]


def test_mme_sums_accuracy_and_accuracy_plus_of_each_category():
    responses = [
        *pair("existence", "1", "Yes", "No"),  # both correct
        *pair("existence", "2", "Yes", "Yes"),  # one
        *pair("existence", "3", "no", "yes"),  # none
        *pair("existence", "4", "hm", "No"),  # one
        *pair("OCR", "1", "Yes", "No"),  # another image, though its name is the same
        *pair("code_reasoning", "1", "Yes", "Yes"),
    ]
    scores = MME.score(responses)
    # existence: 4 of 8 right, 1 of 4 images; OCR: all; code_reasoning: 1 of 2, no image.
    assert scores.metrics == pytest.approx(
        {
            "perception": (50 + 25) + 200,
            "cognition": 50,
            "accuracy": 7 / 12,
            "accuracy_plus": 2 / 6,
        }
    )
    assert MME.score(responses[:8]).metrics == {
        "perception": 75,
        "accuracy": 0.5,
        "accuracy_plus": 0.25,
    }
    assert scores.per_sample == [1, 1, 1, 0, 0, 0, 0, 1, 1, 1, 1, 0]


def test_mme_image_with_a_single_question():
    responses = [*pair("count", "1", "Yes", "No"), *pair("count", "2", "Yes")]
    assert MME.score(responses).metrics["perception"] == 200
    assert MME.score(pair("count", "2", "Yes")).metrics["perception"] == 100


def test_best_score_of_mme():
    responses = [a for name in (*PERCEPTION, *COGNITION) for a in pair(name, "1", "Yes", "No")]
    metrics = MME.score(responses).metrics
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
        ("Yes. But not here", True),  # only the first sentence counts
        ("Nothing", True),
        ("", True),
        ("No\nthere is", True),  # the script splits at spaces only
        ("Yes\nNo", True),
        ("no\n", True),
        ("No\u00a0there", True),
    ],
)
def test_pope_parses_the_first_sentence(text, yes):
    assert says_yes(text) == yes


def test_metrics_of_pope():
    # 3 true positives, 1 false positive, 2 false negatives, 4 true negatives.
    responses = [response("yes", "yes")] * 3 + [response("Yes.", "no")]
    responses += [response("No", "yes")] * 2 + [response("no", "no")] * 4
    scores = POPE.score(responses)
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


def test_pope_of_a_constant_no():
    metrics = POPE.score([response("no", "yes"), response("no", "no")]).metrics
    assert metrics == {"f1": 0, "accuracy": 0.5, "precision": 0, "recall": 0, "yes_ratio": 0}


# ------------------------------------------------------------------ MMBench, SEED-Bench


def rounds(question, *pairs):
    return [response(text, letter, options=OPTIONS, question=question) for text, letter in pairs]


def test_question_of_mmbench_is_correct_if_all_rounds_are():
    responses = [
        *rounds("1", ("A", "A"), ("C", "C"), ("B", "B")),
        *rounds("2", ("A", "A"), ("A", "C"), ("A", "B")),
        *rounds("3", ("green", "B"), ("hm", "A")),
    ]
    scores = CIRCULAR.score(responses)
    assert scores.metrics["accuracy"] == pytest.approx(1 / 3)
    assert scores.metrics["accuracy_of_rounds"] == pytest.approx(5 / 8)
    assert scores.metrics["unparsed"] == pytest.approx(1 / 8)
    assert scores.per_sample == [1, 1, 1, 1, 0, 0, 1, 0]


def test_seed_bench_has_a_score_for_images_and_one_for_videos():
    def answer(text, letter, media):
        return response(text, letter, options=OPTIONS, media=media)

    responses = [answer("A", "A", "image"), answer("B", "A", "image"), answer("C", "C", "video")]
    metrics = SEED_BENCH.score(responses).metrics
    assert metrics["accuracy"] == pytest.approx(2 / 3)
    assert (metrics["accuracy_image"], metrics["accuracy_video"]) == (0.5, 1.0)
    assert "accuracy_video" not in SEED_BENCH.score(responses[:2]).metrics
