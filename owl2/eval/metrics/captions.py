"""CIDEr: how much of a caption several people's captions of the same image share.

pycocoevalcap computes it from words that the Penn Treebank's tokeniser of Stanford CoreNLP made;
both are as in COCO's own evaluation. The tokeniser needs java. Without it ours stands in, which
agrees on plain sentences; `results.json` says which of the two it was. The figure is told as papers
tell it, a hundred times pycocoevalcap's.

A phrase weighs the more, the fewer of the *evaluated* images have it in their references: the
CIDEr of a part of a benchmark says nothing about the whole, and that of one image is 0.
"""

import re
import shutil
import subprocess
from collections.abc import Sequence
from importlib.resources import as_file, files
from importlib.util import find_spec

from owl2.errors import InputError
from owl2.eval.metrics import Metric, Scores
from owl2.eval.samples import Answer

PTB = "PTBTokenizer, Stanford CoreNLP 3.4.1"
STAND_IN = "ours, close to PTBTokenizer, as there is no java"
TOKENISER = PTB if shutil.which("java") else STAND_IN

# What COCO's evaluation drops. Brackets stay as words there, by a slip: it looks for capitals.
_DROPPED = {"''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"}
_HIGHEST = 10.0  # by pycocoevalcap, of a caption that is equal to all references


def check_installed() -> None:
    """For readers, so that it is known before anything is asked.

    Raises:
        InputError: pycocoevalcap is not there.
    """
    if find_spec("pycocoevalcap") is None:
        raise InputError("CIDEr needs the package pycocoevalcap: pip install 'owl2-vlm[eval]'.")


def _score(answers: Sequence[Answer]) -> Scores:
    check_installed()
    from pycocoevalcap.cider.cider import Cider

    said = tokenised([answer.text for answer in answers])
    expected = tokenised([text for answer in answers for text in answer.question.expected])
    rest = iter(expected)
    references = {
        place: [next(rest) for _ in answer.question.expected]
        for place, answer in enumerate(answers)
    }
    cider, each = Cider().compute_score(references, {n: [words] for n, words in enumerate(said)})
    return Scores({"CIDEr": 100 * float(cider)}, [float(score) / _HIGHEST for score in each])


def tokenised(captions: Sequence[str]) -> list[str]:
    """Each caption's words in lower case with a space between, without punctuation.

    Raises:
        InputError: java fails.
    """
    lines = [" ".join(caption.split()) for caption in captions]
    words = _by_java(lines) if TOKENISER == PTB else [stand_in(line) for line in lines]
    return [" ".join(word for word in line if word not in _DROPPED) for line in words]


def _by_java(lines: Sequence[str]) -> list[list[str]]:
    """pycocoevalcap's own wrapper writes beside the package and takes a failure for no words."""
    with as_file(files("pycocoevalcap.tokenizer") / "stanford-corenlp-3.4.1.jar") as jar:
        command = ["java", "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer"]
        text = "".join(f"{line}\n" for line in lines)
        done = subprocess.run(
            [*command, "-preserveLines", "-lowerCase"],
            input=text.encode(errors="replace"),
            capture_output=True,
        )
    made = done.stdout.decode().splitlines()
    if done.returncode or len(made) != len(lines):
        said = done.stderr.decode(errors="replace").strip()[-300:]
        raise InputError(f"java's PTBTokenizer, which CIDEr needs, failed: {said}")
    return [line.split() for line in made]


# ------------------------------------------------------------------ without java

_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_TWO_WORDS = re.compile(r"\b(can)(not)\b|\b(gon|wan)(na)\b|\b(got)(ta)\b|\b(gim|lem)(me)\b")
_CLITIC = re.compile(r"(?<=\w)(n't|'(?:s|re|ve|ll|d|m))(?!\w)")
_TOKEN = re.compile(
    r"""-(?:lrb|rrb|lsb|rsb|lcb|rcb)-  # a bracket
    | n't | '(?:s|re|ve|ll|d|m)(?!\w)  # what was parted from its word
    | (?:[a-z]\.){2,}                  # p.m.
    | (?:mr|mrs|ms|dr|st|vs|etc)\.     # abbreviations that keep their period
    | \w+(?:[.,:]\d+)+                 # 10,000 5:30
    | \w+(?:[-/'@.]\w+)*               # t-shirt black/white o'clock
    | \.\.\. | -- | \S""",
    re.VERBOSE,
)


def stand_in(line: str) -> list[str]:
    """The words of a caption, punctuation too, nearly as PTBTokenizer parts them."""
    text = line.lower().replace("’", "'").replace("‘", "'")
    text = re.sub(r'["“”]', " `` ", text)
    text = "".join(f" {_BRACKETS[sign]} " if sign in _BRACKETS else sign for sign in text)
    text = _TWO_WORDS.sub(lambda found: " ".join(filter(None, found.groups())), text)
    return _TOKEN.findall(_CLITIC.sub(r" \1", text))


CIDER = Metric("cider", "1", "CIDEr", _score, {"tokeniser": TOKENISER})
