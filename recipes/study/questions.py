"""Captions, questions and negatives from the titles of drawings.

An answer is the title itself. Conversations are short, so that earlier answers rarely contain later
ones ("blue folder", then "blue"), and the model must use the image.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from drawings import EDGE, title_key
from PIL import Image

Row = dict[str, Any]

CAPTION = "Describe the image."
NAME = "What is it?"
KIND = "What kind of thing is it?"
COLOR = "What is the main color?"
COUNT = "How many objects are there?"
NUMBERS = ("one", "two", "three", "four", "five", "six")
CELLS = 3  # per edge of the grid on which objects are placed
MIN_SHARE = 0.6  # of the visible pixels with the main color


@dataclass(frozen=True)
class Titled:
    """An image of the data with its title.

    Attributes:
        image: The path relative to the data.
        group: Titles of the same group are negatives of each other in the hard questions: the kind,
            or the source if the kind is unknown.
    """

    image: str
    title: str
    group: str
    kind: str = ""
    color: str = ""


def with_article(title: str) -> str:
    """ "is there a dog", "is there an owl", "are there clouds"."""
    last = title.split()[-1]
    if last.endswith("s") and not last.endswith(("ss", "us", "is")):
        return f"Are there {title}?"
    return f"Is there {'an' if title[0] in 'aeiou' else 'a'} {title}?"


def which(titles: Sequence[str]) -> str:
    """The question with four options in the text."""
    return f"Which of these is it: {', '.join(titles[:-1])} or {titles[-1]}?"


def negatives(
    one: Titled, others: Sequence[Titled], count: int, rng: Random, hard: bool = False
) -> list[str]:
    """Titles of other things; with `hard` of the same group as far as there are enough.

    A title that shares a word with that of the image is not a negative.
    """
    words = set(title_key(one.title).split())
    titles = sorted(
        {other.title for other in others if not words & set(title_key(other.title).split())}
    )
    near = sorted({other.title for other in others if other.group == one.group} & set(titles))
    if hard and len(near) >= count:
        titles = near
    return rng.sample(titles, min(count, len(titles)))


def conversation(image: str | None, *rounds: tuple[str, str]) -> Row:
    """A row in LLaVA's format; the image precedes the first question."""
    turns = []
    for index, (question, answer) in enumerate(rounds):
        start = "<image>\n" if image and not index else ""
        turns += [
            {"from": "human", "value": f"{start}{question}"},
            {"from": "gpt", "value": answer},
        ]
    return {**({"image": image} if image else {}), "conversations": turns}


def training_rows(images: Sequence[Titled], rng: Random) -> Iterator[Row]:
    """Four conversations about each image: its name, yes, no, and one of four names."""
    for one in images:
        more = [(COLOR, one.color)] if one.color else []
        kind = [(KIND, one.kind)] if one.kind else []
        yield conversation(one.image, (NAME, one.title), *kind)
        [wrong, *distractors] = negatives(one, images, 4, rng, hard=rng.random() < 0.5)
        yield conversation(one.image, (with_article(one.title), "yes"), *more)
        yield conversation(one.image, (with_article(wrong), "no"), *more)
        options = rng.sample([one.title, *distractors], 1 + len(distractors))
        yield conversation(one.image, (which(options), one.title), *more)


def exact_questions(images: Sequence[Titled], rng: Random) -> Iterator[Row]:
    """Test questions with one answer: the name, one of four names, the kind and the color."""
    for one in images:
        asked = {"name": (NAME, one.title)}
        options = [one.title, *negatives(one, images, 3, rng)]
        asked["which"] = (which(rng.sample(options, len(options))), one.title)
        if one.kind:
            asked["kind"] = (KIND, one.kind)
        if one.color:
            asked["color"] = (COLOR, one.color)
        for category, (question, answer) in asked.items():
            yield {"image": one.image, "question": question, "answers": [answer],
                   "category": category, "metric": "exact"}  # fmt: skip


def choice_questions(images: Sequence[Titled], rng: Random) -> Iterator[Row]:
    """Test questions with four options that are ranked; half of them with hard distractors."""
    for index, one in enumerate(images):
        hard = index % 2 == 1
        options = [one.title, *negatives(one, images, 3, rng, hard)]
        yield {"image": one.image, "question": NAME, "options": rng.sample(options, len(options)),
               "answer": one.title, "category": "hard" if hard else "random",
               "metric": "likelihood"}  # fmt: skip


def probe_questions(images: Sequence[Titled], rng: Random) -> Iterator[Row]:
    """Balanced questions "is there a ...", as in POPE (arXiv:2305.10355).

    Each image has one question with the answer yes and one with no, whose object is random, one of
    the most frequent titles, or of the same group ("adversarial"); the category of both is this.
    """
    counts: dict[str, int] = {}
    for one in images:
        counts[one.title] = counts.get(one.title, 0) + 1
    popular = set(sorted(counts, key=lambda title: (-counts[title], title))[: len(counts) // 5 + 1])
    frequent = [one for one in images if one.title in popular]
    for index, one in enumerate(images):
        kind = ("random", "popular", "adversarial")[index % 3]
        others = frequent if kind == "popular" else images
        wrong = negatives(one, others, 1, rng, kind == "adversarial") or negatives(
            one, images, 1, rng
        )
        for title, answer in ((one.title, "yes"), (wrong[0], "no")):
            yield {"image": one.image, "question": with_article(title), "answer": answer,
                   "category": kind, "metric": "yes_no"}  # fmt: skip


# ------------------------------------------------------------------ colors and counts


def main_color(image: Image.Image) -> str:
    """The name of the color of most pixels that are not white; "" if no color is that frequent."""
    rgb = np.asarray(image.convert("RGB"), np.int16).reshape(-1, 3)
    hue, saturation, value = np.asarray(image.convert("HSV"), np.int32).reshape(-1, 3).T
    visible = rgb.min(-1) < 235
    if visible.mean() < 0.05:
        return ""
    degrees = hue * 360 // 256
    gray = (saturation < 45) | (value < 50)
    orange = ~gray & (degrees >= 15) & (degrees < 45)
    masks = {
        "black": gray & (value < 70),
        "gray": gray & (value >= 70),
        "brown": orange & (value < 170),
        "orange": orange & (value >= 170),
        "red": ~gray & ((degrees < 15) | (degrees >= 345)),
        "yellow": ~gray & (degrees >= 45) & (degrees < 70),
        "green": ~gray & (degrees >= 70) & (degrees < 165),
        "blue": ~gray & (degrees >= 165) & (degrees < 260),
        "purple": ~gray & (degrees >= 260) & (degrees < 310),
        "pink": ~gray & (degrees >= 310) & (degrees < 345),
    }
    shares = {name: (mask & visible).sum() / visible.sum() for name, mask in masks.items()}
    best = max(shares, key=lambda name: shares[name])
    return best if shares[best] >= MIN_SHARE else ""


def draw_copies(image: Image.Image, count: int, rng: Random, edge: int = EDGE) -> Image.Image:
    """`count` copies of a drawing on white, in different cells of a grid."""
    canvas = Image.new("RGB", (edge, edge), "white")
    cell = edge // CELLS
    size = cell * 7 // 8
    small = image.resize((size, size), Image.Resampling.LANCZOS)
    for place in rng.sample(range(CELLS * CELLS), count):
        shift = (rng.randrange(cell - size + 1), rng.randrange(cell - size + 1))
        canvas.paste(small, (place % CELLS * cell + shift[0], place // CELLS * cell + shift[1]))
    return canvas


def count_rows(
    folder: Path, images: Sequence[Titled], number: int, name: str, rng: Random
) -> list[tuple[str, str]]:
    """Write images with one to six copies of drawings.

    Returns:
        Their paths relative to `folder`, and the numbers in words.
    """
    rows = []
    for index in range(number if images else 0):
        count = rng.randrange(len(NUMBERS)) + 1
        one = images[rng.randrange(len(images))]
        path = f"images/{name}/{index:04d}.png"
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        with Image.open(folder / one.image) as image:
            draw_copies(image.convert("RGB"), count, rng).save(folder / path)
        rows.append((path, NUMBERS[count - 1]))
    return rows
