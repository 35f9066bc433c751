"""MME: folders by category, a text an image with its two questions (arXiv:2306.13394).

Text and image stand side by side, or in ``questions_answers_YN/`` and ``images/``. A text's
lines are a question and its answer, Yes or No, with a tab between.
"""

from collections.abc import Iterator
from pathlib import Path

from owl2.errors import InputError
from owl2.eval.metrics.mme import COGNITION, PERCEPTION
from owl2.eval.readers import Source, with_image
from owl2.eval.samples import Broken, Question

TEXTS = "questions_answers_YN"
REQUEST = "Please answer yes or no."  # the recipe's prompt has its own


def mme(source: Source) -> Iterator[Question | Broken]:
    """Ids such as "OCR/0001#1"; kinds are the 14 categories.

    Raises:
        MissingData: a category without texts.
    """
    for category in (*PERCEPTION, *COGNITION):
        first = source.file(f"{category}/*.txt", f"{category}/{TEXTS}/*.txt")
        texts = sorted(first.parent.glob("*.txt"))
        source.read += texts[1:]
        for text in texts:
            try:
                yield from _questions(source, category, text)
            except InputError as error:  # one of many files, such as somebody's notes
                yield Broken(f"{category}/{text.stem}", str(error))


def _questions(source: Source, category: str, text: Path) -> Iterator[Question | Broken]:
    """The two of an image. Raises `InputError`: a text that is no such pair of lines."""
    image = _image_of(text)
    for number, (words, answer) in enumerate(_lines(text), start=1):
        identity = f"{category}/{text.stem}#{number}"
        if image is None:
            yield Broken(identity, f"the image of {text} is not there")
            continue
        bare = words.removesuffix(REQUEST).rstrip()
        yield Question(
            identity,
            bare,
            with_image(image, source.ask(bare)),
            (answer,),
            kind=category,
            facts={"category": category, "image": text.stem},
        )


def _image_of(text: Path) -> Path | None:
    beside = text.parent.parent / "images" if text.parent.name == TEXTS else text.parent
    names = (f"{text.stem}{suffix}" for suffix in (".jpg", ".png", ".jpeg"))
    return next((beside / name for name in names if (beside / name).exists()), None)


def _lines(path: Path) -> list[tuple[str, str]]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}.") from error
    pairs = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        words, tab, answer = line.rpartition("\t")
        if not tab or answer.strip().lower() not in ("yes", "no"):
            raise InputError(
                f"{path}, line {number}: {line!r:.80} is not a question, a tab, and Yes or No."
            )
        pairs.append((words.strip(), answer.strip()))
    return pairs
