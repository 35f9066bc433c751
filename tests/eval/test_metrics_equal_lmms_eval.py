"""Scores of MME and MMBench equal those of lmms-eval for random responses."""

import contextlib
import io
import random

import pytest

from owl2.eval.metrics.choices import CIRCULAR
from owl2.eval.metrics.yes_no import COGNITION, MME, PERCEPTION
from tests.eval.reading import response

pytestmark = pytest.mark.slow  # lmms-eval takes ten seconds to import

# Without "Y" and "N", which lmms-eval accepts and the script of MME does not.
TEXTS = ("Yes", "No", "yes.", "no, it is not", "Not sure", "hm", "It is yes", "", "Nope")
OPTIONS = ("one fish", "two birds", "three cows", "four ants")


def test_mme():
    utils = pytest.importorskip("lmms_eval.tasks.mme.utils")
    draw = random.Random(1)
    responses, rows = [], []
    for category in (*PERCEPTION, *COGNITION):
        for image in map(str, range(20)):
            for expected in ("Yes", "No"):
                text = draw.choice(TEXTS)
                responses.append(response(text, expected, category=category, image=image))
                doc = {"answer": expected, "category": category, "question_id": image}
                rows.append(utils.mme_process_results(doc, [text]))
    metrics = MME.score(responses).metrics
    for name in ("perception", "cognition"):
        scores = [row[f"mme_{name}_score"] for row in rows if f"mme_{name}_score" in row]
        assert metrics[name] == pytest.approx(utils.mme_aggregate_results(scores))


def test_mmbench():
    evals = pytest.importorskip("lmms_eval.tasks.mmbench.mmbench_evals")
    draw = random.Random(2)
    responses, rows = [], []
    for question in range(60):
        count = draw.choice((2, 3, 4))
        place = draw.randrange(count)
        for number in range(count):
            rotated = [*OPTIONS[number:count], *OPTIONS[:number]]
            correct = (place - number) % count
            letter = "ABCD"[correct]
            text = draw.choice(
                [
                    letter,
                    letter,
                    f"{letter}.",
                    f"({letter})",
                    rotated[correct],
                    "A",
                    f"{letter}. it",
                ]
            )
            responses.append(response(text, letter, options=rotated, question=str(question)))
            cells = {name: float("nan") for name in "ABCD"} | dict(
                zip("ABCD", rotated, strict=False)
            )
            rows.append(
                {
                    "index": question + number * 10**6,
                    "prediction": text,
                    "answer": letter,
                    "question": "?",
                    "hint": "nan",
                    "category": "one",
                    "l2-category": "one",
                    "source": "",
                    "split": "dev",
                    **cells,
                }
            )
    with contextlib.redirect_stdout(io.StringIO()):
        overall, *_ = evals.MMBench_Evaluator().eval_result(rows, "static")
    accuracy = CIRCULAR.score(responses).metrics["accuracy"]
    assert 0.1 < accuracy < 0.9
    assert accuracy == pytest.approx(overall)
