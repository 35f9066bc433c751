"""easy-VQA: an image has one coloured shape; 13 answers tell all that is asked about it.

The PyPI package `easy-vqa` carries it: 4,000 images of 64×64 pixels with 38,575 questions to
train on, 1,000 with 9,673 to test on. The splits are the package's own.
"""

import re
from collections import defaultdict
from dataclasses import dataclass
from random import Random
from types import ModuleType
from typing import Any

from owl2.data.datasets.prompts import VQA_PROMPT
from owl2.data.sample import Message, Sample
from owl2.errors import InputError
from owl2.registry import look_up

SHORT_PROMPT = "{question}"

SHAPES = ("circle", "rectangle", "triangle")
COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")


@dataclass(frozen=True)
class EasyVqaQuestion:
    """A row of the package's `questions.json`; `number` is its place there, from 0."""

    number: int
    text: str
    answer: str


@dataclass(frozen=True)
class EasyVqaImage:
    """An image of a split with all that is asked about it, in the package's order."""

    number: int
    path: str
    questions: tuple[EasyVqaQuestion, ...]


def easy_vqa(
    split: str,
    *,
    style: str = "single",
    prompt: str = VQA_PROMPT,
    most: int | None = None,
    seed: int = 0,
) -> list[Sample]:
    """The Samples of a split, `train` or `test`, in one of three styles.

    - `captions` (stage 1; training split only): an image and what its questions and answers tell
      of it, such as "a red circle."; see `caption`.
    - `joined` (stage 2, SPEC §2): all questions about an image in one conversation, the order
      shuffled by `seed`. Earlier answers give later ones away, so mix with `single`, or let a
      conversation have `most` questions: the others go on to further ones about the image.
    - `single`: a conversation a question, in the package's order.

    `prompt`: the user's words, with `{question}` in it; default: SPEC 1.5's form for VQA; `short`:
    the question alone, which is enough for a model that knows nothing else.

    Raises:
        InputError: another split, style or prompt; captions of the test split; no such package.
    """
    styles = {"captions": _captions, "joined": _joined, "single": _single}
    make = look_up("style of the dataset easy_vqa", style, styles)
    prompt = SHORT_PROMPT if prompt == "short" else prompt
    if not isinstance(prompt, str) or "{question}" not in prompt:
        raise InputError(f"The prompt must be 'short' or have {{question}} in it, not {prompt!r}.")
    if most is not None and (style != "joined" or not isinstance(most, int) or most < 1):
        raise InputError(f"`most` is {most!r}; it is a number from 1 on, for the style joined.")
    return make(images(split), split, prompt, seed, most)


def images(split: str) -> list[EasyVqaImage]:
    """The images of a split in the order of their numbers. Raises `InputError` as `easy_vqa`."""
    package = _package()
    questions, paths = look_up(
        "split of the dataset easy_vqa",
        split,
        {
            "train": (package.get_train_questions, package.get_train_image_paths),
            "test": (package.get_test_questions, package.get_test_image_paths),
        },
    )
    asked: dict[int, list[EasyVqaQuestion]] = defaultdict(list)
    for number, (text, answer, image) in enumerate(zip(*questions(), strict=True)):
        asked[image].append(EasyVqaQuestion(number, text, answer))
    return [
        EasyVqaImage(number, path, tuple(asked[number])) for number, path in sorted(paths().items())
    ]


def _package() -> ModuleType:
    try:
        import easy_vqa as package
    except ImportError as error:
        raise InputError(
            "The dataset 'easy_vqa' needs the package easy-vqa: pip install 'owl2-vlm[data]'."
        ) from error
    return package


# ------------------------------------------------------------------ the three styles


def _captions(
    given: list[EasyVqaImage], split: str, prompt: str, seed: int, most: int | None
) -> list[Sample]:
    if split != "train":
        raise InputError(
            "Captions of easy_vqa are made of answers, and the test split's answers are for "
            "evaluation only: use split train."
        )
    return [
        Sample([_user(image), _assistant(caption(image))], _source(split, image)) for image in given
    ]


def _joined(
    given: list[EasyVqaImage], split: str, prompt: str, seed: int, most: int | None
) -> list[Sample]:
    samples = []
    for image in given:
        questions = list(image.questions)
        Random(f"{seed}/{image.number}").shuffle(questions)
        length = most or len(questions)
        for start in range(0, len(questions), length):
            conversation = questions[start : start + length]
            messages: list[Message] = []
            for number, question in enumerate(conversation):
                messages.append(_user(None if number else image, _ask(prompt, question)))
                messages.append(_assistant(question.answer))
            samples.append(Sample(messages, _source(split, image)))
    return samples


def _single(
    given: list[EasyVqaImage], split: str, prompt: str, seed: int, most: int | None
) -> list[Sample]:
    # In the package's own order, so that an evaluation's rows can be laid beside its file.
    pairs = sorted(
        ((question, image) for image in given for question in image.questions),
        key=lambda pair: pair[0].number,
    )
    return [
        Sample(
            [_user(image, _ask(prompt, question)), _assistant(question.answer)],
            f"easy_vqa/{split}#{question.number}",
        )
        for question, image in pairs
    ]


def _ask(prompt: str, question: EasyVqaQuestion) -> str:
    # Not str.format: braces elsewhere in a prompt are words like any other.
    return prompt.replace("{question}", question.text)


def _user(image: EasyVqaImage | None, words: str = "") -> Message:
    parts: list[dict[str, Any]] = []
    if image is not None:
        parts.append({"type": "image", "path": image.path})
    if words:
        parts.append({"type": "text", "text": words})
    return {"role": "user", "content": parts}


def _assistant(words: str) -> Message:
    return {"role": "assistant", "content": words}


def _source(split: str, image: EasyVqaImage) -> str:
    return f"easy_vqa/{split}/images/{image.number}.png"


# ------------------------------------------------------------------ captions


def caption(image: EasyVqaImage) -> str:
    """What the questions and answers tell of an image: "a red circle.", or less if they tell less.

    A word is known when an answer says it, when a question takes it for granted ("what is the
    *blue* shape?"), when a yes or no affirms it, or when all other words of its kind are denied.
    Unknown: "a circle.", "a red shape.", "a shape.".
    """
    shape = _known(image, SHAPES)
    colour = _known(image, COLORS)
    return f"a {f'{colour} ' if colour else ''}{shape or 'shape'}."


def _known(image: EasyVqaImage, kind: tuple[str, ...]) -> str | None:
    """The word of this kind that is true of the image, or None where the questions leave it open.

    Raises:
        InputError: the questions and answers contradict each other.
    """
    affirmed: set[str] = set()
    denied: set[str] = set()
    for question in image.questions:
        holds = _holds(question)
        said = set(re.findall(r"\w+", question.text)) & set(kind)
        (affirmed if holds else denied).update(said)
        if question.answer in kind:
            affirmed.add(question.answer)
    possible = (affirmed or set(kind)) - denied
    if len(affirmed) > 1 or not possible:
        raise InputError(
            f"{image.path}: its questions and answers contradict each other: of "
            f"{', '.join(kind)} they affirm {sorted(affirmed)} and deny {sorted(denied)}."
        )
    return possible.pop() if len(possible) == 1 else None


def _holds(question: EasyVqaQuestion) -> bool:
    """Whether what the question names is in the image, according to its answer."""
    if question.answer not in ("yes", "no"):
        return True  # "what color is the circle?" takes the circle for granted
    negated = re.search(r"\b(not|no)\b", question.text) is not None
    return (question.answer == "yes") != negated
