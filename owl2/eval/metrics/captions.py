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
from importlib.util import find_spec

from owl2.errors import ErrorCode, InputError
from owl2.eval.metrics import Metric, Scores
from owl2.eval.samples import Response

PTB = "PTBTokenizer, Stanford CoreNLP 3.4.1"
FALLBACK = "fallback of owl2 without java, close to PTBTokenizer"
TOKENIZER = PTB if shutil.which("java") else FALLBACK

# Tokens that the evaluation of COCO drops. It keeps brackets, as it compares them in upper case.
_DROPPED = {"''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"}
_MAX_CIDER = 10.0  # of pycocoevalcap, for a caption that equals all references


def require_pycocoevalcap() -> None:
    """Lets readers fail before the first response is generated.

    Raises:
        InputError: pycocoevalcap is not installed.
    """
    if find_spec("pycocoevalcap") is None:
        raise InputError(
            "CIDEr needs the package pycocoevalcap: pip install 'owl2-vlm[eval]'.",
            ErrorCode.MISSING_DEPENDENCY,
        )


def _score(responses: Sequence[Response]) -> Scores:
    require_pycocoevalcap()
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
    lines = [" ".join(caption.split()) for caption in captions]
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


# ------------------------------------------------------------------ without java

_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_TWO_WORDS = re.compile(r"\b(can)(not)\b|\b(gon|wan)(na)\b|\b(got)(ta)\b|\b(gim|lem)(me)\b")
_CLITIC = re.compile(r"(?<=\w)(n't|'(?:s|re|ve|ll|d|m))(?!\w)")
_TOKEN = re.compile(
    r"""-(?:lrb|rrb|lsb|rsb|lcb|rcb)-  # a bracket
    | n't | '(?:s|re|ve|ll|d|m)(?!\w)  # a clitic
    | (?:[a-z]\.){2,}                  # p.m.
    | (?:mr|mrs|ms|dr|st|vs|etc)\.     # abbreviations that keep their period
    | \w+(?:[.,:]\d+)+                 # 10,000 5:30
    | \w+(?:[-/'@.]\w+)*               # t-shirt black/white o'clock
    | \.\.\. | -- | \S""",
    re.VERBOSE,
)


def tokenize_fallback(line: str) -> list[str]:
    """The words and punctuation marks of a caption, close to PTBTokenizer."""
    text = line.lower().replace("’", "'").replace("‘", "'")
    text = re.sub(r'["“”]', " `` ", text)
    text = "".join(f" {_BRACKETS[sign]} " if sign in _BRACKETS else sign for sign in text)
    text = _TWO_WORDS.sub(lambda found: " ".join(filter(None, found.groups())), text)
    return _TOKEN.findall(_CLITIC.sub(r" \1", text))


CIDER = Metric("cider", "1", "CIDEr", _score, {"tokenizer": TOKENIZER})
