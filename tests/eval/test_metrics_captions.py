"""CIDEr: known scores, those of pycocoevalcap, and the tokenizer without java."""

import math
import shutil
import subprocess

import pytest

from owl2.errors import ErrorCode
from owl2.eval.metrics import captions
from owl2.eval.metrics.captions import CIDER, FALLBACK, PTB, tokenize, tokenize_fallback
from tests.errors import raises_input_error
from tests.eval.reading import response

java = pytest.mark.skipif(not shutil.which("java"), reason="java is not installed")

SENTENCES = [
    "A man's dog doesn't like the t-shirt.",
    "A black/white cat (very big) costs $5.00, isn't it?",
    "I cannot go; 10,000 people at 5:30 p.m. near St. Mary's...",
    'Two dogs\' bowls "off" -- [1] {x} *star* #1! U.S. flag & 50%',
    "They've said he'll go, I'd go: a 20-year-old ice-cream",
    "",
    "   red,white \n and\u2028blue\t ",
    "gonna wanna gotta",
    "A dog. It runs on grass, fast.",
    "vs. a man at 5 p.m. in the U.S. on a bench etc. near Mr. Smith",
]
REFERENCES = [
    ["A dog runs over a green lawn.", "The dog is running on grass.", "A dog, running."],
    ["Two men play chess in a park.", "Men at a chess board outdoors."],
    ["A plate of fish and chips.", "Fish with chips on a plate."],
]


def responses(*texts, references=REFERENCES):
    return [response(text, *own) for own, text in zip(references, texts, strict=True)]


@pytest.fixture
def without_java(monkeypatch):
    monkeypatch.setattr(captions, "TOKENIZER", FALLBACK)


def test_known_scores(without_java):
    """Three images with one-word references that do not occur in those of other images."""
    pytest.importorskip("pycocoevalcap")
    found = responses("red", "blue", "pink", references=[["Red."], ["blue"], ["lime"]])
    # The cosine of one-word vectors is 1 or 0; of the four lengths of phrases there is one: 10/4.
    scores = CIDER.score(found)
    assert scores.per_sample == pytest.approx([0.25, 0.25, 0])
    assert scores.metrics == pytest.approx({"CIDEr": 100 * 2 * 2.5 / 3})
    assert CIDER.main in scores.metrics


def test_longer_caption_has_a_lower_score(without_java):
    pytest.importorskip("pycocoevalcap")
    words = "one two three four five six"
    found = responses(words, f"{words} seven", references=[[words], [words + " eight"]])
    alone = CIDER.score(found).per_sample
    # All phrases of the references' first six words are in both images: their weight is 0.
    assert alone[0] == pytest.approx(0)
    found = responses("x y z w", "a b c d e f", references=[["x y z w"], ["a b c d"]])
    each = CIDER.score(found).per_sample
    assert each[0] == pytest.approx(1)
    # n-gram overlap k of m and the Gaussian of two words' difference, sigma 6.
    parts = [4 / math.sqrt(4 * 6), 3 / math.sqrt(3 * 5), 2 / math.sqrt(2 * 4), 1 / math.sqrt(3)]
    assert each[1] == pytest.approx(sum(parts) / 4 * math.exp(-(2**2) / (2 * 6**2)))


@java
def test_scores_equal_those_of_pycocoevalcap():
    """Its tokenizer and its CIDEr, from unprocessed captions."""
    cider = pytest.importorskip("pycocoevalcap.cider.cider").Cider()
    texts = ["A dog is running on a lawn.", "Two men in a park", "a cat."]
    scores = CIDER.score(responses(*texts))
    tokenizer = pytest.importorskip("pycocoevalcap.tokenizer.ptbtokenizer").PTBTokenizer()

    def words(captions):
        return tokenizer.tokenize(
            {n: [{"caption": text} for text in texts] for n, texts in enumerate(captions)}
        )

    score, each = cider.compute_score(words(REFERENCES), words([[text] for text in texts]))
    assert score > 0.5
    assert scores.metrics == pytest.approx({"CIDEr": 100 * score})
    assert scores.per_sample == pytest.approx([value / 10 for value in each])


@java
def test_fallback_equals_the_tokenizer_in_java(monkeypatch):
    pytest.importorskip("pycocoevalcap")
    tokenized = tokenize(SENTENCES)
    monkeypatch.setattr(captions, "TOKENIZER", FALLBACK)
    assert tokenize(SENTENCES) == tokenized
    assert tokenized[5] == ""
    assert tokenized[0] == "a man 's dog does n't like the t-shirt"


def test_words_of_the_fallback():
    words = "the man 's -lrb- old -rrb- hat , is n't it ?"
    assert tokenize_fallback("The man's (old) hat, isn't it?") == words.split()


def test_settings_contain_the_tokenizer():
    expected = PTB if shutil.which("java") else FALLBACK
    assert CIDER.to_dict() == {
        "name": "cider",
        "version": "1",
        "tokenizer": expected,
        "chinese": "characters",
    }


def test_failure_of_java_is_an_error(monkeypatch):
    pytest.importorskip("pycocoevalcap")
    monkeypatch.setattr(captions, "TOKENIZER", PTB)

    def run(command, **_):
        return subprocess.CompletedProcess(command, 1, b"a b\n", b"no main class")

    monkeypatch.setattr(captions.subprocess, "run", run)
    with raises_input_error(ErrorCode.MISSING_DEPENDENCY, "no main class"):
        tokenize(["a b"])


def test_chinese_is_split_into_characters():
    assert tokenize(["一只red狗。", "「一只」，ＲＥＤ……狗"]) == ["一 只 red 狗", "一 只 red 狗"]


def test_cider_of_chinese_captions_depends_on_the_words():
    expected = ["一只红色的狗在草地上", "两个男人在踢足球", "桌子上有一杯咖啡"]
    texts = ["一只红色的狗在草地上。", "两个男人在打篮球", "一只红色的狗在草地上"]
    scores = CIDER.score([response(*pair) for pair in zip(texts, expected, strict=True)]).per_sample
    assert scores[0] > 0.9 > scores[1] > 0.2 > scores[2]
