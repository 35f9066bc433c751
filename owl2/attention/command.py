"""`owl2 attend`: a question about images, and where the model looked, as figures and numbers."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from owl2.attention.attention_maps import MAX_NEW_TOKENS, Looks, look
from owl2.attention.heatmap import patch_map, tokens_of, words_of
from owl2.attention.plots import draw_heat, draw_maps, draw_shares, require_matplotlib
from owl2.engine.engine import Engine
from owl2.engine.load_model import ModelArgs
from owl2.errors import InputError
from owl2.files import atomic_directory
from owl2.processing.chat_template import user_message, validate_prompt
from owl2.processing.image_io import load_image

MEAN = "mean"
MOST_WORDS = 7  # that are painted where none were chosen

Words = list[tuple[str, tuple[int, int]]]


@dataclass(frozen=True)
class Settings:
    """What `owl2 attend` draws.

    Attributes:
        layers: numbers from 0 (negative: from the end) and "mean", separated by commas; None: the
            first, the middle, the last and the mean, as in the paper.
        words: of the answer, to be painted; none: all, up to `MOST_WORDS`.
        without_mam: also draw the same with the text weights for images.
        answer: to look at instead of the model's own.
    """

    model: ModelArgs
    question: str
    images: Sequence[str]
    output: Path
    layers: str | None = None
    words: Sequence[str] = ()
    without_mam: bool = False
    answer: str | None = None
    max_new_tokens: int = MAX_NEW_TOKENS


def attend(settings: Settings, console: Console) -> None:
    """Ask, and write ``attention.png``, ``shares.png``, ``heat.png`` (if there is an image) and
    ``attention.npz`` into the folder.

    Raises:
        InputError: see `look` and `tokens_of`; no matplotlib; a folder with other things in it.
    """
    require_matplotlib()
    _require_own(settings.output)
    messages = [user_message(settings.question, settings.images)]
    validate_prompt(messages)
    processor = settings.model.load_processor()
    limit = processor.image_processor.max_pixels
    images = [load_image(image, limit) for image in settings.images]
    messages = [user_message(settings.question, images)]
    engine = Engine(settings.model.load_model(), processor, enable_prefix_caching=True)
    layers = _layers(settings.layers, engine.model.config.num_hidden_layers)
    asked: dict[str, Any] = {
        "layers": [layer for layer in layers if layer is not None],
        "max_new_tokens": settings.max_new_tokens,
    }
    looks = [look(engine, processor, messages, answer=settings.answer, **asked)]
    if settings.without_mam:
        answer = looks[0].answer
        looks.append(look(engine, processor, messages, answer=answer, use_mam=False, **asked))
    words = _words(looks[0], settings.words)
    with atomic_directory(settings.output) as folder:
        draw_maps(folder / "attention.png", looks, layers, settings.question)
        draw_shares(folder / "shares.png", looks, settings.question)
        if images:
            draw_heat(folder / "heat.png", looks, images, words, settings.question)
        numbers: Any = arrays(looks, words)
        np.savez_compressed(folder / "attention.npz", **numbers)
    console.print(looks[0].answer, markup=False, highlight=False)
    console.print(f"the figures and the numbers are in {settings.output}", markup=False)


def arrays(looks: Sequence[Looks], words: Words) -> dict[str, np.ndarray]:
    """What ``attention.npz`` holds, by name; nothing in it is pickled.

    Of each of `looks`: `attention`, `mean` and `shares` (see `Looks`) and `heat` (words, N, g, g),
    see `patch_map`; without MAM with ``without_mam_`` before the name. Once: the texts `tokens` and
    `prompt_tokens`, `layers`, `words`, and of each span `spans` (start, end), `kinds` and
    `images` (-1: none), and `patches`.
    """
    first = looks[0]
    count = sum(span.kind == "image" for span in first.spans)
    found: dict[str, np.ndarray] = {
        "tokens": np.array(first.tokens, np.str_),
        "prompt_tokens": np.array(first.prompt_tokens, np.str_),
        "layers": np.array(first.layers, np.int64),
        "words": np.array([word for word, _ in words], np.str_),
        "spans": np.array([(span.start, span.end) for span in first.spans]),
        "kinds": np.array([span.kind for span in first.spans]),
        "images": np.array([-1 if s.image is None else s.image for s in first.spans]),
        "patches": first.patches,
    }
    for number, own in enumerate(looks):
        before = "without_mam_" if number else ""
        grid = round((own.patches.shape[-1] - 1) ** 0.5)
        heat = [patch_map(own, tokens, n) for _, tokens in words for n in range(count)]
        found |= {
            f"{before}attention": own.attention,
            f"{before}mean": own.mean,
            f"{before}shares": own.shares,
            f"{before}heat": np.array(heat, np.float32).reshape(len(words), count, grid, grid),
        }
    return found


def _layers(text: str | None, count: int) -> list[int | None]:
    """Layers to draw; None: the mean."""
    if text is None:
        return [*sorted({0, (count - 1) // 2, count - 1}), None]
    layers: list[int | None] = []
    for name in text.split(","):
        name = name.strip()
        if name == MEAN:
            layers.append(None)
            continue
        try:
            number = int(name)
        except ValueError as error:
            raise InputError(
                f"--layers has {name!r}: give numbers and 'mean': 0,15,mean"
            ) from error
        if not -count <= number < count:
            raise InputError(f"There is no layer {number}: they go from 0 to {count - 1}.")
        layers.append(number % count)
    return layers


def _words(looks: Looks, chosen: Sequence[str]) -> Words:
    if chosen:
        return [(word, tokens_of(looks, word)) for word in chosen]
    different: dict[str, tuple[str, tuple[int, int]]] = {}
    for word, tokens in words_of(looks):
        different.setdefault(word.lower(), (word, tokens))
    # An answer may be signs only.
    return [*different.values()][:MOST_WORDS] or [(looks.answer, (0, len(looks.tokens)))]


def _require_own(folder: Path) -> None:
    """Refuse a folder that holds other things than `attend` writes: it is replaced."""
    own = {"attention.png", "shares.png", "heat.png", "attention.npz"}
    if folder.is_dir() and (other := sorted({file.name for file in folder.iterdir()} - own)):
        raise InputError(
            f"{folder} holds other things, such as {other[0]}: give a folder of its own."
        )
