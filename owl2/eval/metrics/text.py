"""The text benchmarks: what lm-eval made of each answer, over all of them; and ROUGE.

lm-eval's scores are in a question's facts (`adapters.text_tasks`). A group such as MMLU is
the mean over all its questions, as lm-eval weighs its parts by their sizes.
"""

from collections.abc import Sequence

from owl2.errors import InputError
from owl2.eval.metrics import Metric, Scores, mean
from owl2.eval.samples import Answer


def _suite(main: str) -> Metric:
    """The means of lm-eval's scores; an answer's own is its `main`, from 0 to 1."""

    def score(answers: Sequence[Answer]) -> Scores:
        found = [answer.question.facts["scores"] for answer in answers]
        names = list(dict.fromkeys(name for scores in found for name in scores))
        metrics = {
            name: mean([scores[name] for scores in found if name in scores]) for name in names
        }
        return Scores(metrics, [scores[main] for scores in found])

    return Metric(f"lm-eval {main}", "1", main, score)


ACC = _suite("acc")
ACC_NORM = _suite("acc_norm")
EXACT_MATCH = _suite("exact_match")


def _rouge(answers: Sequence[Answer]) -> Scores:
    """F1 of words, pairs of words and longest common subsequences, stemmed; means over answers.

    Raises:
        InputError: the package rouge-score is missing.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ModuleNotFoundError as error:
        raise InputError("ROUGE needs rouge-score: pip install 'owl2-vlm[eval]'") from error
    names = ("rouge1", "rouge2", "rougeL")
    scorer = RougeScorer(names, use_stemmer=True)
    found = [scorer.score_multi(list(answer.question.expected), answer.text) for answer in answers]
    values = {name: [float(scores[name].fmeasure) for scores in found] for name in names}
    return Scores({name: mean(values[name]) for name in names}, list(values["rougeL"]))


ROUGE = Metric("rouge", "1", "rougeL", _rouge, {"stemmer": "Porter", "package": "rouge-score"})
