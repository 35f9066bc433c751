"""CIDEr: the similarity of a caption to several reference captions of the same image.

pycocoevalcap computes it from words of the Penn Treebank tokenizer of Stanford CoreNLP, as in the
evaluation of COCO. The tokenizer needs java. Without java, `tokenize_fallback` replaces it, which
agrees on plain sentences; `results.json` contains the name of the tokenizer. The value is that of
pycocoevalcap times 100, as in papers.

A phrase has more weight if fewer of the *evaluated* images have it in their references, so that
CIDEr of some images cannot be compared with that of all, and CIDEr of a single image is 0.
"""

import re
import shutil
import subprocess
from collections.abc import Sequence
from importlib.resources import as_file, files

from owl2.errors import ErrorCode, InputError
from owl2.eval.metrics import Metric, Scores
from owl2.eval.metrics.text import to_half_width
from owl2.eval.samples import Response

PTB = "PTBTokenizer, Stanford CoreNLP 3.4.1"
FALLBACK = "NLTKWordTokenizer, close to PTBTokenizer"
TOKENIZER = PTB if shutil.which("java") else FALLBACK

# Tokens that the evaluation of COCO drops. It keeps brackets, as it compares them in upper case.
_DROPPED = {"''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"}
_SENTENCE_END = re.compile(r"\b(?!(?:mr|mrs|ms|dr|st|vs|etc)\.)(\w\w+)\.(?=\s)")
# PTBTokenizer does not segment Chinese and Japanese: each character is a token.
_CHINESE = re.compile("[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")
_CHINESE_PUNCTUATION = re.compile("[\u3001-\u303f\u30fb·—…]")  # brackets, dashes, ellipses
_MAX_CIDER = 10.0  # of pycocoevalcap, for a caption that equals all references


def _score(responses: Sequence[Response]) -> Scores:
    from pycocoevalcap.cider.cider import Cider

    captions = tokenize([response.text for response in responses])
    expected = tokenize([text for response in responses for text in response.sample.expected])
    rest = iter(expected)
    references = {
        index: [next(rest) for _ in response.sample.expected]
        for index, response in enumerate(responses)
    }
    candidates = {index: [caption] for index, caption in enumerate(captions)}
    cider, scores = Cider().compute_score(references, candidates)
    return Scores({"CIDEr": 100 * float(cider)}, [float(score) / _MAX_CIDER for score in scores])


def tokenize(captions: Sequence[str]) -> list[str]:
    """Each caption in lower case with a space between words, without punctuation.

    Raises:
        InputError: java fails.
    """
    half = (_CHINESE_PUNCTUATION.sub(" ", to_half_width(caption)) for caption in captions)
    lines = [" ".join(_CHINESE.sub(r" \g<0> ", caption).split()) for caption in half]
    tokenized = (
        _run_java(lines) if TOKENIZER == PTB else [tokenize_fallback(line) for line in lines]
    )
    return [" ".join(word for word in words if word not in _DROPPED) for words in tokenized]


def _run_java(lines: Sequence[str]) -> list[list[str]]:
    """The wrapper of pycocoevalcap writes into its package and ignores failures."""
    with as_file(files("pycocoevalcap.tokenizer") / "stanford-corenlp-3.4.1.jar") as jar:
        command = ["java", "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer"]
        done = subprocess.run(
            [*command, "-preserveLines", "-lowerCase"],
            input="".join(f"{line}\n" for line in lines).encode(errors="replace"),
            capture_output=True,
        )
    tokenized = done.stdout.decode().splitlines()
    if done.returncode or len(tokenized) != len(lines):
        message = done.stderr.decode(errors="replace").strip()[-300:]
        raise InputError(
            f"PTBTokenizer, which CIDEr needs, failed in java: {message}",
            ErrorCode.MISSING_DEPENDENCY,
        )
    return [line.split() for line in tokenized]


def tokenize_fallback(line: str) -> list[str]:
    """The words and punctuation marks of a caption, close to PTBTokenizer."""
    from nltk.tokenize import NLTKWordTokenizer

    # The tokenizer of nltk expects single sentences.
    text = _SENTENCE_END.sub(r"\1 .", line.lower().replace("’", "'").replace("‘", "'"))
    words = NLTKWordTokenizer().tokenize(text, convert_parentheses=True)
    return [word.lower() for word in words]


SETTINGS = {"tokenizer": TOKENIZER, "chinese": "characters"}
CIDER = Metric("cider", "1", "CIDEr", _score, SETTINGS, package="pycocoevalcap")
