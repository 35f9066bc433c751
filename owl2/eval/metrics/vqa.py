"""VQA accuracy: how many of ten people gave the same answer.

Each of the ten is left out once; among the nine others an answer scores min(1, matches / 3), and
the mean of the ten is its score. Both sides are normalised first. This is the rule of Antol et al.
(2015) as visualqa.org's evaluation code has it; VQAv2, OK-VQA, VizWiz and TextVQA use it.

The code comes in editions. In one, nothing is normalised where all ten people agree, so that
"Yes" then misses their "yes"; here both sides always are. TextVQA's has a step before the others
(see `normalise_textvqa`), which lmms-eval also uses for OK-VQA and VizWiz.
"""

import re
from collections.abc import Callable, Sequence
from functools import lru_cache

from owl2.eval.metrics import Metric, Scores, mean
from owl2.eval.samples import Answer

_SIGNS = ';/[]"{}()=+\\_-><@`,?!'
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


def _respelled() -> dict[str, str]:
    """What a word becomes: each contraction is also known with any one apostrophe left out."""
    table = {word: str(number) for number, word in enumerate(_NUMBERS)} | {"none": "0"}
    for right in _CONTRACTIONS.split():
        for place, sign in enumerate(right):
            if sign == "'":
                table[right[:place] + right[place + 1 :]] = right
    return table | {"somebody'd": "somebodyd"}  # the wrong way round in the official table, too


_RESPELLED = _respelled()


@lru_cache(maxsize=1 << 16)  # people's answers repeat
def normalise(answer: str) -> str:
    """Lower case, no articles, no punctuation but in numbers, digits for numbers up to ten."""
    text = answer.replace("\n", " ").replace("\t", " ").strip()
    words = text
    for sign in _SIGNS:
        # Beside a space it goes; between two words it becomes one, if there is no "10,000".
        is_edge = f"{sign} " in text or f" {sign}" in text or _COMMA_IN_NUMBER.search(text)
        words = words.replace(sign, "" if is_edge else " ")
    kept = [word for word in _PERIOD.sub("", words).lower().split() if word not in _ARTICLES]
    return " ".join(_RESPELLED.get(word, word) for word in kept)


@lru_cache(maxsize=1 << 16)
def normalise_textvqa(answer: str) -> str:
    """As `normalise`, but first commas and question marks go, and "'s" becomes a word."""
    return normalise(answer.lower().replace(",", "").replace("?", "").replace("'s", " 's"))


def accuracy(said: str, answers: Sequence[str], normal: Callable[[str], str] = normalise) -> float:
    """The score of an answer, 0 … 1, among those of people: of one at least.

    Of fewer than four people nothing scores 1; of one, nothing more than 0.
    """
    count = len(answers)
    same = sum(normal(answer) == normal(said) for answer in answers)
    # `same` times one of those is left out that said so, else another one.
    return (same * min(1, (same - 1) / 3) + (count - same) * min(1, same / 3)) / count


def _metric(name: str, normal: Callable[[str], str]) -> Metric:
    def score(answers: Sequence[Answer]) -> Scores:
        each = [accuracy(answer.text, answer.question.expected, normal) for answer in answers]
        return Scores({"accuracy": mean(each)}, list(each))

    return Metric(name, "1", "accuracy", score)


VQA = _metric("vqa_accuracy", normalise)
TEXTVQA = _metric("textvqa_accuracy", normalise_textvqa)
