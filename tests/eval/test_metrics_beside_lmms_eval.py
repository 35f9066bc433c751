"""MME's and MMBench's figures equal those of lmms-eval's functions, on answers of all sorts."""

import contextlib
import io
import random

import pytest

from owl2.eval.metrics.choices import CIRCULAR
from owl2.eval.metrics.yes_no import COGNITION, MME, PERCEPTION
from owl2.eval.samples import EvalSample, Response

pytestmark = pytest.mark.slow  # lmms-eval takes ten seconds to import

SAID = ("Yes", "No", "yes.", "no, it is not", "Not sure", "hm", "Y", "n", "It is yes", "", "Nope")
OPTIONS = ("one fish", "two birds", "three cows", "four ants")


def said(text, expected, **metadata):
    return Response(EvalSample("", "", [], (expected,), metadata=metadata), "", text)


def test_mme():
    theirs = pytest.importorskip("lmms_eval.tasks.mme.utils")
    drawn = random.Random(1)
    answers, rows = [], []
    for category in (*PERCEPTION, *COGNITION):
        for image in map(str, range(20)):
            for expected in ("Yes", "No"):
                text = drawn.choice(SAID)
                answers.append(said(text, expected, category=category, image=image))
                doc = {"answer": expected, "category": category, "question_id": image}
                rows.append(theirs.mme_process_results(doc, [text]))
    metrics = MME.score(answers).metrics
    for name in ("perception", "cognition"):
        of_it = [row[f"mme_{name}_score"] for row in rows if f"mme_{name}_score" in row]
        assert metrics[name] == pytest.approx(theirs.mme_aggregate_results(of_it))


def test_mmbench():
    evals = pytest.importorskip("lmms_eval.tasks.mmbench.mmbench_evals")
    drawn = random.Random(2)
    answers, rows = [], []
    for question in range(60):
        count = drawn.choice((2, 3, 4))
        place = drawn.randrange(count)
        for number in range(count):
            turned = [*OPTIONS[number:count], *OPTIONS[:number]]
            right = (place - number) % count
            letter = "ABCD"[right]
            text = drawn.choice(
                [letter, letter, f"{letter}.", f"({letter})", turned[right], "A", f"{letter}. it"]
            )
            answers.append(said(text, letter, options=turned, question=str(question)))
            cells = {name: float("nan") for name in "ABCD"} | dict(
                zip("ABCD", turned, strict=False)
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
    accuracy = CIRCULAR.score(answers).metrics["accuracy"]
    assert 0.1 < accuracy < 0.9
    assert accuracy == pytest.approx(overall)
