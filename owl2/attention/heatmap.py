"""Heat maps: how much of an image is behind a word, and the image painted with it.

::

    a word's tokens: decoder's weights on the image's K queries ──┐ composed
    the abstractor: each query over the patches ────────────────────┴─► grid ──► (H, W)

Shapes: K learnable queries, g x g patches, H x W pixels.
"""

import re

import numpy as np
from PIL import Image

from owl2.attention.attention_maps import Looks
from owl2.attention.tokenized_dialogue import Span
from owl2.errors import InputError

LONGEST = 1024  # pixels of a map's longer edge: it is made of some hundred patches
CLEAR = 3.0  # even shares
BELL = 0.5  # patches: how wide the bell curve is that smooths a map
# A Chinese character is a word of its own, as no spaces part them.
_WORD = re.compile(r"[\u3400-\u9fff]|[^\W\u3400-\u9fff]+")
# From nothing to the most: blue, violet, red, orange, yellow (RGB).
COLOURS = np.array(
    [[60, 60, 200], [120, 40, 190], [215, 40, 110], [250, 120, 30], [255, 225, 60]], np.float32
)

Words = str | tuple[int, int] | None


def words_of(looks: Looks) -> list[tuple[str, tuple[int, int]]]:
    """The answer's words, each with its tokens: the first one's number and the last one's + 1."""
    text = "".join(looks.tokens)
    ends = np.cumsum([len(token) for token in looks.tokens])
    return [(match[0], _range(ends, match.start(), match.end())) for match in _WORD.finditer(text)]


def tokens_of(looks: Looks, words: Words) -> tuple[int, int]:
    """The tokens of a word of the answer (or of several words that follow each other), the first
    time that they are there; of None all.

    Raises:
        InputError: they are not there; names those that are.
    """
    if words is None:
        return 0, len(looks.tokens)
    if not isinstance(words, str):
        first, end = words
        if not 0 <= first < end <= len(looks.tokens):
            raise InputError(f"There are no tokens {first} to {end} of {len(looks.tokens)}.")
        return first, end
    text = "".join(looks.tokens)
    match = re.search(rf"(?<!\w){re.escape(words.strip())}(?!\w)", text, re.IGNORECASE)
    match = match or re.search(re.escape(words.strip()), text, re.IGNORECASE)
    if match is None or not words.strip():
        raise InputError(f"{words!r} is not in the answer, which is: {looks.answer}")
    ends = np.cumsum([len(token) for token in looks.tokens])
    return _range(ends, match.start(), match.end())


def patch_map(
    looks: Looks, words: Words = None, image: int = 0, layer: int | None = None
) -> np.ndarray:
    """How much each patch of an image is behind words of the answer.

    Args:
        words: a word, a range of tokens (the last not included), or None: all of the answer.
        image: which, from 0.
        layer: one of the chosen ones; None: the mean over all.

    Returns:
        (g, g) float32, 1 where it is as much as if all patches had the same.

    Raises:
        InputError: no such image, word or layer.
    """
    first, end = tokens_of(looks, words)
    span = _span_of(looks, image)
    # The last of an image's positions is the same for every image: nothing of it is in there.
    queries = looks.of_layer(layer)[:, first:end, span.start : span.end - 1].mean((0, 1))  # (K,)
    patches = queries @ looks.patches[image][:, 1:]  # (g * g,), without CLS
    grid = round(len(patches) ** 0.5)
    most_even: np.ndarray = (patches / patches.mean()).reshape(grid, grid).astype(np.float32)
    return most_even


def share_of(looks: Looks, words: Words = None, image: int = 0) -> float:
    """How much of the words' attention is on an image, 0 to 1: mean over heads and layers.

    Raises:
        InputError: no such image or word.
    """
    first, end = tokens_of(looks, words)
    span = _span_of(looks, image)
    return float(looks.mean[:, first:end, span.start : span.end].sum(-1).mean())


def heat_map(
    looks: Looks, words: Words = None, image: int = 0, layer: int | None = None
) -> np.ndarray:
    """`patch_map` over the image itself: (H, W) float32, 1,024 pixels at most along an edge."""
    grid = patch_map(looks, words, image, layer)
    width, height = looks.sizes[image]
    scale = min(1.0, LONGEST / max(width, height))
    width, height = max(1, round(width * scale)), max(1, round(height * scale))
    # The square that the model saw is the image stretched, or the image with margins.
    edges = (width, height) if looks.policy == "resize" else (max(width, height),) * 2
    across, down = _smoothing(edges[0], len(grid)), _smoothing(edges[1], len(grid))
    left, top = (edges[0] - width) // 2, (edges[1] - height) // 2
    map_: np.ndarray = down[top : top + height] @ grid @ across[left : left + width].T
    return map_


def _span_of(looks: Looks, image: int) -> Span:
    spans = [span for span in looks.spans if span.kind == "image"]
    if not 0 <= image < len(spans):
        raise InputError(f"There is no image {image}; {len(spans)} were given, from 0 on.")
    return spans[image]


def _smoothing(pixels: int, patches: int) -> np.ndarray:
    """(pixels, patches) float32: a pixel is the mean of the patches around it, by a bell curve.

    Bicubic interpolation would swing beyond the values, and draw rings where nothing is.
    """
    places = (np.arange(pixels) + 0.5) * patches / pixels - 0.5
    weights = np.exp(-(((places[:, None] - np.arange(patches)) / BELL) ** 2) / 2)
    smoothing: np.ndarray = (weights / weights.sum(1, keepdims=True)).astype(np.float32)
    return smoothing


def overlay(image: Image.Image, heat: np.ndarray, strength: float = 0.85) -> Image.Image:
    """An image with a heat map of `heat_map` painted over it, in the image's size.

    Where there is no more of it than an even share (1) the image is as it was, but for its
    colours, which are paler; the most is brightest, if it is `CLEAR` even shares at least. So a
    model that looks nowhere in particular paints nothing.

    Args:
        heat: (h, w), any size.
        strength: of the paint where there is most of it, 0 to 1.
    """
    most = max(float(heat.max()), CLEAR)
    level = ((heat - 1) / (most - 1)).clip(min=0).astype(np.float32)
    resized = Image.fromarray(level).resize(image.size, Image.Resampling.BILINEAR)
    level = np.asarray(resized)  # (H, W)
    stops = np.linspace(0, 1, len(COLOURS))
    paint = np.stack([np.interp(level, stops, own) for own in COLOURS.T], axis=-1)  # (H, W, 3)
    share = strength * level[..., None] ** 0.7
    colours = np.asarray(image.convert("RGB"), np.float32)
    pale = 0.5 * colours + 0.5 * np.asarray(image.convert("L"), np.float32)[..., None]
    painted = (1 - share) * pale + share * paint
    return Image.fromarray(painted.round().astype(np.uint8))


def _range(ends: np.ndarray, begin: int, end: int) -> tuple[int, int]:
    """Which tokens hold the characters from `begin` to `end` of the answer.

    Args:
        ends: (T,) where each token's text ends.
    """
    first, last = np.searchsorted(ends, [begin, end - 1], side="right")
    # The bytes of a character before the one that has its text belong to it.
    while first and ends[first - 1] == (ends[first - 2] if first > 1 else 0) == begin:
        first -= 1
    return int(first), int(last) + 1
