"""CIDEr beside pycocoevalcap from end to end, and the tokenizer that stands in for java's."""

import math
import shutil
import subprocess

import pytest

from owl2.errors import InputError
from owl2.eval.metrics import captions
from owl2.eval.metrics.captions import CIDER, FALLBACK, PTB, tokenize, tokenize_fallback
from owl2.eval.samples import EvalSample, Response

java = pytest.mark.skipif(not shutil.which("java"), reason="there is no java")

SENTENCES = [
    "A man's dog doesn't like the t-shirt.",
    "A black/white cat (very big) costs $5.00, isn't it?",
    "I cannot go; 10,000 people at 5:30 p.m. near St. Mary's...",
    'Two dogs\' bowls "off" -- [1] {x} *star* #1! U.S. flag & 50%',
    "They've said he'll go, I'd go: a 20-year-old ice-cream",
    "",
    "   red,white \n and\u2028blue\t ",
    "gonna wanna gotta",
]
REFERENCES = [
    ["A dog runs over a green lawn.", "The dog is running on grass.", "A dog, running."],
    ["Two men play chess in a park.", "Men at a chess board outdoors."],
    ["A plate of fish and chips.", "Fish with chips on a plate."],
]


def answers(*texts, references=REFERENCES):
    asked = [EvalSample(str(n), "?", [], tuple(given)) for n, given in enumerate(references)]
    return [Response(question, "", text) for question, text in zip(asked, texts, strict=True)]


@pytest.fixture
def without_java(monkeypatch):
    monkeypatch.setattr(captions, "TOKENIZER", FALLBACK)


def test_by_hand(without_java):
    """Three images, one word each, of which every one is in one image's references only."""
    pytest.importorskip("pycocoevalcap")
    given = answers("red", "blue", "pink", references=[["Red."], ["blue"], ["lime"]])
    # The cosine of one-word vectors is 1 or 0; of the four lengths of phrases there is one: 10/4.
    scores = CIDER.score(given)
    assert scores.per_sample == pytest.approx([0.25, 0.25, 0])
    assert scores.metrics == pytest.approx({"CIDEr": 100 * 2 * 2.5 / 3})
    assert CIDER.main in scores.metrics


def test_a_longer_caption_costs(without_java):
    pytest.importorskip("pycocoevalcap")
    words = "one two three four five six"
    given = answers(words, f"{words} seven", references=[[words], [words + " eight"]])
    alone = CIDER.score(given).per_sample
    # All phrases of the references' first six words are in both images: they weigh nothing.
    assert alone[0] == pytest.approx(0)
    given = answers("x y z w", "a b c d e f", references=[["x y z w"], ["a b c d"]])
    each = CIDER.score(given).per_sample
    assert each[0] == pytest.approx(1)
    # n-gram overlap k of m and the Gaussian of two words' difference, sigma 6.
    parts = [4 / math.sqrt(4 * 6), 3 / math.sqrt(3 * 5), 2 / math.sqrt(2 * 4), 1 / math.sqrt(3)]
    assert each[1] == pytest.approx(sum(parts) / 4 * math.exp(-(2**2) / (2 * 6**2)))


@java
def test_as_pycocoevalcap():
    """Its own tokenizer and CIDEr, from the raw captions on."""
    cider = pytest.importorskip("pycocoevalcap.cider.cider").Cider()
    said = ["A dog is running on a lawn.", "Two men in a park", "a cat."]
    scores = CIDER.score(answers(*said))
    tokenizer = pytest.importorskip("pycocoevalcap.tokenizer.ptbtokenizer").PTBTokenizer()

    def words(captions):
        return tokenizer.tokenize(
            {n: [{"caption": text} for text in texts] for n, texts in enumerate(captions)}
        )

    score, each = cider.compute_score(words(REFERENCES), words([[text] for text in said]))
    assert score > 0.5
    assert scores.metrics == pytest.approx({"CIDEr": 100 * score})
    assert scores.per_sample == pytest.approx([value / 10 for value in each])


@java
def test_the_stand_in_is_near(monkeypatch):
    pytest.importorskip("pycocoevalcap")
    theirs = tokenize(SENTENCES)
    monkeypatch.setattr(captions, "TOKENIZER", FALLBACK)
    assert tokenize(SENTENCES) == theirs
    assert theirs[5] == ""
    assert theirs[0] == "a man 's dog does n't like the t-shirt"


def test_stand_in():
    words = "the man 's -lrb- old -rrb- hat , is n't it ?"
    assert tokenize_fallback("The man's (old) hat, isn't it?") == words.split()


def test_the_result_says_which_tokenizer():
    expected = PTB if shutil.which("java") else FALLBACK
    assert CIDER.to_dict() == {"name": "cider", "version": "1", "tokenizer": expected}


def test_java_that_fails(monkeypatch):
    pytest.importorskip("pycocoevalcap")
    monkeypatch.setattr(captions, "TOKENIZER", PTB)

    def run(command, **_):
        return subprocess.CompletedProcess(command, 1, b"a b\n", b"no main class")

    monkeypatch.setattr(captions.subprocess, "run", run)
    with pytest.raises(InputError, match="no main class"):
        tokenize(["a b"])


def test_without_the_package(monkeypatch):
    monkeypatch.setattr(captions, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'owl2-vlm\[eval\]'"):
        CIDER.score(answers("a", "b", "c"))
