"""Benchmarks that a judging model scores: what it is asked, how it is read, what comes of it.

The judge sees the question, the reference and the answer, never the image. The words are ours,
after the rules of MM-Vet (arXiv:2308.02490) and MMHal-Bench (arXiv:2309.14525), whose authors asked
GPT-4: figures of another judge, or of these words, are near theirs and not the same.

A judged answer has the judge's figure among its question's facts as `judged`.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from owl2.eval.metrics import Each, Metric, Scores, mean
from owl2.eval.samples import Answer

MM_VET_PROMPT = """\
You compare a model's answer to a question about an image with a reference, and give a score \
from 0.0 (entirely wrong) to 1.0 (entirely right), in steps of 0.1.
- The image is not shown to you: the reference alone says what is true.
- <AND> in the reference joins parts that must all be in the answer; an answer with some of them \
gets the share of the score that those parts are worth.
- <OR> joins alternatives, each of which is enough.
- Judge the meaning, not the wording. What the answer says beyond the reference costs nothing \
unless it contradicts it. Numbers and names must be right.

Examples, each as reference; answer; score:
12 <AND> 15; There are 12 of the one kind and 15 of the other.; 1.0
12 <AND> 15; 12; 0.5
grey <OR> silver; It is silver.; 1.0
grey <OR> silver; It is a dark car.; 0.2
Friday; The meeting is on Monday.; 0.0

Question: {question}
Reference: {reference}
Answer: {answer}

Reply with one line: Score: X"""

MMHAL_PROMPT = """\
You judge a model's answer to a question about an image: how informative it is, and whether it \
hallucinates, which means that it states something as being in the image that is not there, or \
states it wrongly.
You do not see the image. You know which things are in it, and a reference answer written by a \
person. What follows from these, or from general knowledge, is no hallucination. Some questions \
take for granted what is not in the image: the right answer says that it is not there.

Things in the image: {content}
Question: {question}
Reference answer: {reference}
Answer to judge: {answer}

Rate it by this scale:
6: very informative, with analysis or reasoning beyond the question; no hallucination
5: very informative; no hallucination
4: somewhat informative; no hallucination
3: not informative; no hallucination
2: very informative; with hallucination
1: somewhat informative; with hallucination
0: not informative; with hallucination

Explain in one or two sentences. Then end with one line: Rating: N"""

HIGHEST_RATING = 6
LEAST_FAITHFUL_RATING = 3  # below it the answer hallucinates


@dataclass(frozen=True)
class Rubric:
    """How a judge is asked about an answer.

    Attributes:
        prompt: with ``{question}``, ``{reference}``, ``{answer}`` and the question's other facts.
        read: the judge's reply → its figure; None: there is none in it.
        highest: the best figure.
    """

    prompt: str
    read: Callable[[str], float | None]
    highest: float

    def ask(self, question: str, facts: Mapping[str, Any], answer: str) -> str:
        """What the judge is sent."""
        given = {**facts, "question": question, "answer": answer.strip() or "(no answer)"}
        # One pass, so that braces in an answer are words like any other.
        return re.sub(r"\{(\w+)\}", lambda found: str(given[found[1]]), self.prompt)


def read_score(reply: str) -> float | None:
    """The figure from 0 to 1 after "Score:", or the whole reply; None where there is none or two.

    >>> read_score("The colour is wrong.\\nScore: 0.5")
    0.5
    """
    return _only("score", reply, 1.0)


def read_rating(reply: str) -> float | None:
    """The whole number from 0 to 6 after "Rating:", or the whole reply; None: none, or two.

    >>> read_rating("It invents a dog. **Rating: 2**")
    2.0
    """
    figure = _only("rating", reply, HIGHEST_RATING)
    return figure if figure is not None and figure.is_integer() else None


def _only(name: str, reply: str, highest: float) -> float | None:
    """The figure after a name, which may say of what it is ("4/6")."""
    # "0,5" is none: it could be a half, or 0 and something else.
    figure = r"-?[0-9.]*[0-9](?!,?[0-9])"
    pattern = rf"{name}(?: is| of)?[\s:*=]*({figure})(?:\s*/\s*({figure}))?"
    found = set(re.findall(pattern, reply, re.IGNORECASE)) or {(reply.strip(), "")}
    try:
        figures = {float(said) for said, _ in found}
        scales = {float(scale) for _, scale in found if scale}
    except ValueError:
        return None
    told = figures.pop()
    return told if not figures and scales <= {highest} and 0 <= told <= highest else None


# ------------------------------------------------------------------ metrics


def _figures(answers: Sequence[Answer], highest: float) -> tuple[list[float], list[Each]]:
    each = [answer.question.facts.get("judged") for answer in answers]
    known = [figure for figure in each if figure is not None]
    return known, [None if figure is None else figure / highest for figure in each]


def _mm_vet(answers: Sequence[Answer]) -> Scores:
    known, each = _figures(answers, 1.0)
    metrics = {"judged": len(known) / len(answers)}
    if known:
        metrics["score"] = mean(known)
    capabilities: dict[str, list[Each]] = defaultdict(list)
    for answer, score in zip(answers, each, strict=True):
        for capability in answer.question.facts["capabilities"]:
            capabilities[capability].append(score)
    for capability, scores in sorted(capabilities.items()):
        if any(score is not None for score in scores):
            metrics[capability] = mean(scores)
    return Scores(metrics, each)


def _mmhal(answers: Sequence[Answer]) -> Scores:
    known, each = _figures(answers, HIGHEST_RATING)
    metrics = {"judged": len(known) / len(answers)}
    if known:
        metrics["score"] = mean(known)
        false = [float(rating < LEAST_FAITHFUL_RATING) for rating in known]
        metrics["hallucination_rate"] = mean(false)
    return Scores(metrics, each)


MM_VET = Metric("mm_vet", "1", "score", _mm_vet)
MMHAL = Metric("mmhal", "1", "score", _mmhal)

# By the metric's name.
RUBRICS = {
    "mm_vet": Rubric(MM_VET_PROMPT, read_score, 1.0),
    "mmhal": Rubric(MMHAL_PROMPT, read_rating, HIGHEST_RATING),
}
