"""Benchmarks that a language model scores: prompts, parsing of the replies, and metrics.

The judge gets the question, the reference and the response, and never the image. The prompts follow
the rules of MM-Vet (arXiv:2308.02490) and MMHal-Bench (arXiv:2309.14525), whose authors used GPT-4
with other prompts, so that scores are similar to theirs but not equal.

`judge_score` of the metadata of a sample is the score of the judge; None without one.
"""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from owl2.eval.metrics import Metric, Scores, mean
from owl2.eval.samples import Response

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

MIN_FAITHFUL_RATING = 3  # a response with a lower rating contains a hallucination


@dataclass(frozen=True)
class Rubric:
    """The prompt of a judge, and the form of its replies.

    Attributes:
        prompt: Contains ``{question}``, ``{reference}``, ``{answer}`` and keys of the metadata.
        label: Precedes the score in a reply.
        max_score: The best score; the worst one is 0.
        is_integer: Whether all scores are integers.
    """

    prompt: str
    label: str
    max_score: float
    is_integer: bool

    def format(self, question: str, metadata: Mapping[str, Any], response: str) -> str:
        """The prompt for one response."""
        values = {**metadata, "question": question, "answer": response.strip() or "(no answer)"}
        # As in the script of MM-Vet.
        values["reference"] = re.sub(r"\s*<(AND|OR)>\s*", r" <\1> ", str(values["reference"]))
        # In one pass, so that braces within a response are kept.
        return re.sub(r"\{(\w+)\}", lambda found: str(values[found[1]]), self.prompt)

    def parse(self, reply: str) -> float | None:
        """The number after the label, or the complete reply; None without exactly one score.

        >>> RUBRICS["mm_vet"].parse("The color is wrong.\\nScore: 0.5")
        0.5
        >>> RUBRICS["mmhal"].parse("It invents a dog. **Rating: 2/6**")
        2.0
        """
        # "0,5" is ambiguous: a half, or 0 and another number.
        number = r"-?[0-9.]*[0-9](?!,?[0-9])"
        pattern = rf"{self.label}(?: is| of)?[\s:*=]*({number})(?:\s*/\s*({number}))?"
        found = set(re.findall(pattern, reply, re.IGNORECASE)) or {(reply.strip(), "")}
        try:
            values = {float(value) for value, _ in found}
            maxima = {float(value) for _, value in found if value}
        except ValueError:
            return None
        value = values.pop()
        if values or not maxima <= {self.max_score} or not 0 <= value <= self.max_score:
            return None
        return value if value.is_integer() or not self.is_integer else None


# By the name of the metric.
RUBRICS = {
    "mm_vet": Rubric(MM_VET_PROMPT, "score", 1, is_integer=False),
    "mmhal": Rubric(MMHAL_PROMPT, "rating", 6, is_integer=True),
}

# ------------------------------------------------------------------ metrics


def _score(name: str, responses: Sequence[Response]) -> tuple[Scores, list[float]]:
    """The metrics of all rubrics, and the known scores of the judge."""
    scores = [response.sample.metadata.get("judge_score") for response in responses]
    known = [score for score in scores if score is not None]
    metrics = {"judged": len(known) / len(responses)}
    if known:
        metrics["score"] = mean(known)
    best = RUBRICS[name].max_score
    return Scores(metrics, [None if score is None else score / best for score in scores]), known


def _mm_vet(responses: Sequence[Response]) -> Scores:
    scores, _ = _score("mm_vet", responses)
    capabilities: dict[str, list[float]] = defaultdict(list)
    for response, score in zip(responses, scores.per_sample, strict=True):
        if score is not None:
            for capability in response.sample.metadata["capabilities"]:
                capabilities[capability].append(score)
    scores.metrics.update((name, mean(values)) for name, values in sorted(capabilities.items()))
    return scores


def _mmhal(responses: Sequence[Response]) -> Scores:
    scores, known = _score("mmhal", responses)
    if known:
        unfaithful = [float(rating < MIN_FAITHFUL_RATING) for rating in known]
        scores.metrics["hallucination_rate"] = mean(unfaithful)
    return scores


MM_VET = Metric("mm_vet", "1", "score", _mm_vet)
MMHAL = Metric("mmhal", "1", "score", _mmhal)
