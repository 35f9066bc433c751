"""Metrics of texts: exact match, ROUGE, and the scores of lm-eval, averaged over all responses.

`scores` of the metadata of a sample are those of lm-eval (`adapters.text_tasks`). The score of a
group such as MMLU is the mean over all its samples: lm-eval weights its parts by their sizes.
"""

import unicodedata
from collections.abc import Sequence

from owl2.eval.metrics import Metric, Scores, mean, mean_metric
from owl2.eval.samples import Response

# Full-width characters and Chinese punctuation.
_HALF_WIDTH = {code: chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)}
_HALF_WIDTH |= {0x3000: " ", ord("。"): ".", ord("｡"): ".", ord("、"): ","}


def to_half_width(text: str) -> str:
    """Composed characters (NFC), and ASCII for full-width characters and Chinese punctuation."""
    return unicodedata.normalize("NFC", text).translate(_HALF_WIDTH)


def normalize(answer: str) -> str:
    """Lower case, half width, without surrounding white space and without one final period."""
    return to_half_width(answer).strip().lower().removesuffix(".").rstrip()


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
    """F1 of stemmed words, pairs of words and longest common subsequences."""
    from rouge_score.rouge_scorer import RougeScorer

    names = ("rouge1", "rouge2", "rougeL")
    scorer = RougeScorer(names, use_stemmer=True)
    found = [scorer.score_multi(list(item.sample.expected), item.text) for item in responses]
    values = {name: [float(scores[name].fmeasure) for scores in found] for name in names}
    return Scores({name: mean(values[name]) for name in names}, [*values["rougeL"]])


EXACT = mean_metric(
    "exact_match", lambda one: normalize(one.text) in map(normalize, one.sample.expected)
)
ACC = _lm_eval("acc")
ACC_NORM = _lm_eval("acc_norm")
EXACT_MATCH = _lm_eval("exact_match")
ROUGE_SETTINGS = {"stemmer": "Porter", "package": "rouge-score"}
ROUGE = Metric("rouge", "1", "rougeL", _rouge, ROUGE_SETTINGS, package="rouge_score")
