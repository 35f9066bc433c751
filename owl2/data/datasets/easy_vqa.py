"""easy-VQA: images of one colored shape, with questions that have 13 possible answers.

The PyPI package `easy-vqa` contains 4,000 images of 64×64 pixels with 38,575 questions for
training, and 1,000 images with 9,673 questions for testing. The splits are those of the package.
"""

import re
from collections import defaultdict
from collections.abc import Sequence
from operator import itemgetter
from random import Random
from typing import Literal, NamedTuple

from pydantic import PositiveInt

from owl2.data.datasets.prompts import VQA_PROMPT, conversations, image_and_text
from owl2.data.sample import Sample
from owl2.errors import ErrorCode, InputError, require_package
from owl2.registry import look_up

Style = Literal["single", "joined", "captions"]

SHAPES = ("circle", "rectangle", "triangle")
COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")


class EasyVqaQuestion(NamedTuple):
    """A row of the package's `questions.json`; `number` is its index, from 0."""

    number: int
    text: str
    answer: str


class EasyVqaImage(NamedTuple):
    """An image of a split with its questions, in the order of the package."""

    number: int
    path: str
    questions: list[EasyVqaQuestion]


def easy_vqa(
    split: str,
    *,
    style: Style = "single",
    prompt: str = VQA_PROMPT,
    max_rounds: PositiveInt | None = None,
    seed: int = 0,
) -> list[Sample]:
    """The samples of the split `train` or `test`.

    Args:
        style: `single`: a conversation per question, in the order of the package. `joined` (stage
            2, Specification §2): a conversation per image, the questions shuffled by `seed`.
            Earlier answers reveal later ones, so mix it with `single`, or set `max_rounds`.
            `captions` (stage 1, training split only): an image and a caption derived from its
            questions and answers, such as "a red circle."; see `caption`.
        prompt: The user text, with `{question}` in it; default: the VQA prompt of Specification
            §1.5. `short`: only the question, which suffices for a model trained on nothing else.
        max_rounds: Questions per conversation of `joined`; further questions start another one.

    Raises:
        InputError: An unknown split or prompt, captions of the test split, or the package is not
            installed.
    """
    prompt = "{question}" if prompt == "short" else prompt
    if "{question}" not in prompt:
        raise InputError(
            f"prompt must be 'short' or contain {{question}}, not {prompt!r}",
            ErrorCode.INVALID_VALUE,
        )
    if max_rounds is not None and style != "joined":
        raise InputError("max_rounds needs style=joined", ErrorCode.CONFLICT)
    if style == "captions" and split == "test":
        raise InputError(
            "captions of easy_vqa are derived from answers, and those of the test split are "
            "reserved for evaluation",
            ErrorCode.INVALID_VALUE,
        )
    samples: list[Sample] = []
    images = easy_vqa_images(split)
    for image in images:
        source = f"easy_vqa/{split}/images/{image.number}.png"
        # Not str.format, because a prompt may contain other braces.
        pairs = [(prompt.replace("{question}", q.text), q.answer) for q in image.questions]
        if style == "captions":
            samples.append(Sample(image_and_text(image.path, caption(image)), source))
        elif style == "joined":
            shuffled = Random(f"{seed}/{image.number}").sample(pairs, len(pairs))
            samples += conversations(image.path, shuffled, source, max_rounds, separator="")
        else:
            for question, pair in zip(image.questions, pairs, strict=True):
                source = f"easy_vqa/{split}#{question.number}"
                samples += conversations(image.path, [pair], source, separator="")
    if style != "single":
        return samples
    # In the order of the package, so that evaluation results can be compared with its file.
    numbers = [question.number for image in images for question in image.questions]
    return [sample for _, sample in sorted(zip(numbers, samples, strict=True), key=itemgetter(0))]


def easy_vqa_images(split: str) -> list[EasyVqaImage]:
    """The images of a split, by number. Raises `InputError` as `easy_vqa`."""
    require_package("easy_vqa", "The dataset easy_vqa", "data")
    import easy_vqa as package

    get_questions, get_paths = look_up(
        "split of the dataset easy_vqa",
        split,
        {
            "train": (package.get_train_questions, package.get_train_image_paths),
            "test": (package.get_test_questions, package.get_test_image_paths),
        },
    )
    questions: dict[int, list[EasyVqaQuestion]] = defaultdict(list)
    for number, (text, answer, image) in enumerate(zip(*get_questions(), strict=True)):
        questions[image].append(EasyVqaQuestion(number, text, answer))
    return [
        EasyVqaImage(number, path, questions[number])
        for number, path in sorted(get_paths().items())
    ]


# ------------------------------------------------------------------ captions


def caption(image: EasyVqaImage) -> str:
    """A caption from the questions and answers: "a red circle.", or less where they reveal less.

    An attribute is known if an answer names it, a question presupposes it ("what is the *blue*
    shape?"), a yes or no affirms it, or all other values are denied. Otherwise: "a circle.",
    "a red shape.", "a shape.".
    """
    shape = _attribute(image, SHAPES)
    color = _attribute(image, COLORS)
    return f"a {f'{color} ' if color else ''}{shape or 'shape'}."


def _attribute(image: EasyVqaImage, values: Sequence[str]) -> str | None:
    """The value of an attribute of the image, or None if the questions do not determine it.

    Raises:
        InputError: The questions and answers contradict each other.
    """
    affirmed: set[str] = set()
    denied: set[str] = set()
    for question in image.questions:
        named = set(re.findall(r"\w+", question.text)) & set(values)
        (affirmed if _is_affirmed(question) else denied).update(named)
        if question.answer in values:
            affirmed.add(question.answer)
    possible = (affirmed or set(values)) - denied
    if len(affirmed) > 1 or not possible:
        raise InputError(
            f"{image.path}: the questions and answers contradict each other: of "
            f"{', '.join(values)} they affirm {sorted(affirmed)} and deny {sorted(denied)}",
            ErrorCode.INVALID_FORMAT,
        )
    return possible.pop() if len(possible) == 1 else None


def _is_affirmed(question: EasyVqaQuestion) -> bool:
    """Whether the image has what the question names, according to its answer."""
    if question.answer not in ("yes", "no"):
        return True  # "what color is the circle?" presupposes the circle
    is_negated = re.search(r"\b(not|no)\b", question.text) is not None
    return (question.answer == "yes") != is_negated
