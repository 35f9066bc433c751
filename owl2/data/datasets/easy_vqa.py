"""easy-VQA: images of one colored shape, with questions that have 13 possible answers.

The PyPI package `easy-vqa` contains 4,000 images of 64×64 pixels with 38,575 questions for
training, and 1,000 images with 9,673 questions for testing. The splits are those of the package.
"""

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from types import ModuleType

from owl2.data.datasets.prompts import VQA_PROMPT
from owl2.data.sample import Message, Sample
from owl2.errors import ErrorCode, InputError
from owl2.json_records import check_max_rounds
from owl2.registry import look_up

SHORT_PROMPT = "{question}"

SHAPES = ("circle", "rectangle", "triangle")
COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")


@dataclass(frozen=True)
class EasyVqaQuestion:
    """A row of the package's `questions.json`; `number` is its index, from 0."""

    number: int
    text: str
    answer: str


@dataclass(frozen=True)
class EasyVqaImage:
    """An image of a split with its questions, in the order of the package."""

    number: int
    path: str
    questions: tuple[EasyVqaQuestion, ...]


def easy_vqa(
    split: str,
    *,
    style: str = "single",
    prompt: str = VQA_PROMPT,
    max_rounds: int | None = None,
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
        InputError: An unknown split, style or prompt, captions of the test split, or the package is
            not installed.
    """
    look_up("style of the dataset easy_vqa", style, dict.fromkeys(("captions", "joined", "single")))
    prompt = SHORT_PROMPT if prompt == "short" else prompt
    if not isinstance(prompt, str) or "{question}" not in prompt:
        raise InputError(
            f"prompt must be 'short' or contain {{question}}, not {prompt!r}",
            ErrorCode.INVALID_VALUE,
        )
    if max_rounds is not None:
        check_max_rounds(max_rounds)
        if style != "joined":
            raise InputError("max_rounds needs style=joined", ErrorCode.CONFLICT)
    if style == "captions" and split == "test":
        raise InputError(
            "captions of easy_vqa are derived from answers, and those of the test split are "
            "reserved for evaluation",
            ErrorCode.INVALID_VALUE,
        )
    images = easy_vqa_images(split)
    if style == "captions":
        return [
            Sample([_user(image), _assistant(caption(image))], _source(split, image))
            for image in images
        ]
    if style == "joined":
        return [
            sample for image in images for sample in _joined(image, split, prompt, max_rounds, seed)
        ]
    # In the order of the package, so that evaluation results can be compared with its file.
    pairs = sorted(
        ((question, image) for image in images for question in image.questions),
        key=lambda pair: pair[0].number,
    )
    return [
        Sample(
            [_user(image, _ask(prompt, question)), _assistant(question.answer)],
            f"easy_vqa/{split}#{question.number}",
        )
        for question, image in pairs
    ]


def _joined(
    image: EasyVqaImage, split: str, prompt: str, max_rounds: int | None, seed: int
) -> list[Sample]:
    questions = Random(f"{seed}/{image.number}").sample(image.questions, len(image.questions))
    length = max_rounds or len(questions)
    samples = []
    for start in range(0, len(questions), length):
        messages: list[Message] = []
        for question in questions[start : start + length]:
            messages.append(_user(None if messages else image, _ask(prompt, question)))
            messages.append(_assistant(question.answer))
        samples.append(Sample(messages, _source(split, image)))
    return samples


def easy_vqa_images(split: str) -> list[EasyVqaImage]:
    """The images of a split, by number. Raises `InputError` as `easy_vqa`."""
    package = _package()
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
        EasyVqaImage(number, path, tuple(questions[number]))
        for number, path in sorted(get_paths().items())
    ]


def _package() -> ModuleType:
    try:
        import easy_vqa as package
    except ImportError as error:
        raise InputError(
            "the dataset easy_vqa needs the package easy-vqa: pip install 'owl2-vlm[data]'",
            ErrorCode.MISSING_DEPENDENCY,
        ) from error
    return package


def _ask(prompt: str, question: EasyVqaQuestion) -> str:
    # Not str.format, because a prompt may contain other braces.
    return prompt.replace("{question}", question.text)


def _user(image: EasyVqaImage | None, text: str = "") -> Message:
    parts: list[Message] = []
    if image is not None:
        parts.append({"type": "image", "path": image.path})
    if text:
        parts.append({"type": "text", "text": text})
    return {"role": "user", "content": parts}


def _assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


def _source(split: str, image: EasyVqaImage) -> str:
    return f"easy_vqa/{split}/images/{image.number}.png"


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
