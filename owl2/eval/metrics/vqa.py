"""VQA accuracy: agreement with the answers of ten annotators.

Each annotator is excluded in turn; a response scores min(1, matches / 3) against the other nine,
and its score is the mean over the ten. Responses and answers are normalized first. This is the rule
of Antol et al. (2015) in the code of visualqa.org; VQAv2, OK-VQA, VizWiz and TextVQA use it.

There are several versions of that code. One does not normalize if all ten annotators agree, so that
"Yes" does not match their "yes"; here both sides are always normalized. The version of TextVQA has
an additional first step (`normalize_textvqa`), which lmms-eval also uses for OK-VQA and VizWiz.
Chinese punctuation and full-width characters are treated as their ASCII forms.
"""

import re
from collections.abc import Callable, Sequence
from functools import lru_cache

from owl2.eval.metrics import mean_metric
from owl2.eval.metrics.text import to_half_width

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,+\d")
_PERIOD = re.compile(r"\.(?!\d)")
_ARTICLES = ("a", "an", "the")
_NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
_CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
    haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've
    might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
    shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
    someone's something'd something'd've something'll that's there'd there'd've there're there's
    they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're
    what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're
    why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're
    you've
"""


def _replacements() -> dict[str, str]:
    """Numbers as digits, and contractions without one of their apostrophes."""
    table = {word: str(number) for number, word in enumerate(_NUMBERS)} | {"none": "0"}
    for word in _CONTRACTIONS.split():
        for index, char in enumerate(word):
            if char == "'":
                table[word[:index] + word[index + 1 :]] = word
    return table | {"somebody'd": "somebodyd"}  # reversed in the official table as well


_REPLACEMENTS = _replacements()


@lru_cache(maxsize=1 << 16)  # answers repeat
def normalize(answer: str) -> str:
    """Lower case, digits for numbers up to ten, no articles, punctuation only in numbers."""
    text = to_half_width(answer).replace("\n", " ").replace("\t", " ").strip()
    words = text
    for char in _PUNCTUATION:
        # Removed next to a space; a space between two words, unless there is a number like 10,000.
        is_edge = f"{char} " in text or f" {char}" in text or _COMMA_IN_NUMBER.search(text)
        words = words.replace(char, "" if is_edge else " ")
    kept = [word for word in _PERIOD.sub("", words).lower().split() if word not in _ARTICLES]
    return " ".join(_REPLACEMENTS.get(word, word) for word in kept)


@lru_cache(maxsize=1 << 16)
def normalize_textvqa(answer: str) -> str:
    """As `normalize`, after removing commas and question marks and separating "'s"."""
    return normalize(
        to_half_width(answer).lower().replace(",", "").replace("?", "").replace("'s", " 's")
    )


def vqa_accuracy(
    response: str, answers: Sequence[str], normalizer: Callable[[str], str] = normalize
) -> float:
    """The score of a response, from 0 to 1, against one or more answers.

    With fewer than four answers no response scores 1; with one answer all score 0.
    """
    count = len(answers)
    matches = sum(normalizer(answer) == normalizer(response) for answer in answers)
    # In `matches` of the `count` cases the excluded annotator gave the same answer.
    without_one = matches * min(1, (matches - 1) / 3)
    return (without_one + (count - matches) * min(1, matches / 3)) / count


VQA = mean_metric("vqa_accuracy", lambda one: vqa_accuracy(one.text, one.sample.expected))
TEXTVQA = mean_metric(
    "textvqa_accuracy",
    lambda one: vqa_accuracy(one.text, one.sample.expected, normalize_textvqa),
)
