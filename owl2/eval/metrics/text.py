"""Text benchmarks: the scores of lm-eval, averaged over all responses; and ROUGE.

`scores` of the metadata of a sample are those of lm-eval (`adapters.text_tasks`). The score of a
group such as MMLU is the mean over all its samples: lm-eval weights its parts by their sizes.
"""

from collections.abc import Sequence

from owl2.errors import ErrorCode, InputError
from owl2.eval.metrics import Metric, Scores, mean
from owl2.eval.samples import Response


def _lm_eval(main: str) -> Metric:
    """The means of the scores of lm-eval; `main` is the score of a sample, from 0 to 1."""

    def score(responses: Sequence[Response]) -> Scores:
        found = [response.sample.metadata["scores"] for response in responses]
        names = dict.fromkeys(name for scores in found for name in scores)
        metrics = {
            name: mean([scores[name] for scores in found if name in scores]) for name in names
        }
        return Scores(metrics, [scores[main] for scores in found])

    return Metric(f"lm-eval {main}", "1", main, score)


def _rouge(responses: Sequence[Response]) -> Scores:
    """F1 of stemmed words, pairs of words and longest common subsequences.

    Raises:
        InputError: The package rouge-score is not installed.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ModuleNotFoundError as error:
        raise InputError(
            "ROUGE needs the package rouge-score: pip install 'owl2-vlm[eval]'.",
            ErrorCode.MISSING_DEPENDENCY,
        ) from error
    names = ("rouge1", "rouge2", "rougeL")
    scorer = RougeScorer(names, use_stemmer=True)
    found = [scorer.score_multi(list(item.sample.expected), item.text) for item in responses]
    values = {name: [float(scores[name].fmeasure) for scores in found] for name in names}
    return Scores({name: mean(values[name]) for name in names}, [*values["rougeL"]])


ACC = _lm_eval("acc")
ACC_NORM = _lm_eval("acc_norm")
EXACT_MATCH = _lm_eval("exact_match")
ROUGE = Metric("rouge", "1", "rougeL", _rouge, {"stemmer": "Porter", "package": "rouge-score"})
