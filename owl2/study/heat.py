"""Heat maps: how much of a picture is behind a word, and the picture painted with it.

::

    a word's tokens: decoder's weights on the picture's K queries ──┐ composed
    the abstractor: each query over the patches ────────────────────┴─► grid ──► (H, W)

Shapes: K learnable queries, g x g patches, H x W pixels.
"""

import re

import numpy as np
from PIL import Image

from owl2.errors import InputError
from owl2.study.looks import Looks

LONGEST = 1024  # pixels of a map's longer edge: it is made of some hundred patches
# A Chinese character is a word of its own, as no spaces part them.
_WORD = re.compile(r"[\u3400-\u9fff]|[^\W\u3400-\u9fff]+")
# From nothing to the most: black, violet, red, orange, light yellow (RGB).
COLOURS = np.array(
    [[10, 8, 40], [92, 20, 110], [190, 45, 85], [246, 130, 40], [253, 240, 160]], np.float32
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
    looks: Looks, words: Words = None, picture: int = 0, layer: int | None = None
) -> np.ndarray:
    """How much each patch of a picture is behind words of the answer.

    Args:
        words: a word, a range of tokens (the last not included), or None: all of the answer.
        picture: which, from 0.
        layer: one of the chosen ones; None: the mean over all.

    Returns:
        (g, g) float32, 1 where it is as much as if all patches had the same.

    Raises:
        InputError: no such picture, word or layer.
    """
    spans = [span for span in looks.spans if span.kind == "picture"]
    if not 0 <= picture < len(spans):
        raise InputError(f"There is no picture {picture}; {len(spans)} were given, from 0 on.")
    first, end = tokens_of(looks, words)
    span = spans[picture]
    # The last of a picture's positions is the same for every picture: nothing of it is in there.
    queries = looks.of_layer(layer)[:, first:end, span.start : span.end - 1].mean((0, 1))  # (K,)
    patches = queries @ looks.patches[picture][:, 1:]  # (g * g,), without CLS
    grid = round(len(patches) ** 0.5)
    most_even: np.ndarray = (patches / patches.mean()).reshape(grid, grid).astype(np.float32)
    return most_even


def heat_map(
    looks: Looks, words: Words = None, picture: int = 0, layer: int | None = None
) -> np.ndarray:
    """`patch_map` over the picture itself: (H, W) float32, 1,024 pixels at most along an edge."""
    grid = patch_map(looks, words, picture, layer)
    width, height = looks.sizes[picture]
    scale = min(1.0, LONGEST / max(width, height))
    width, height = max(1, round(width * scale)), max(1, round(height * scale))
    whole = (width, height)
    if looks.policy == "pad":  # the square that the model saw had margins
        whole = (max(whole), max(whole))
    image = Image.fromarray(grid).resize(whole, Image.Resampling.BICUBIC)
    left, top = (whole[0] - width) // 2, (whole[1] - height) // 2
    map_: np.ndarray = np.asarray(image)[top : top + height, left : left + width].clip(min=0)
    return map_


def overlay(picture: Image.Image, heat: np.ndarray, strength: float = 0.75) -> Image.Image:
    """A picture with a heat map of `heat_map` painted over it, in the picture's size.

    The least is left as it is, though dimmed; the most is bright.

    Args:
        heat: (h, w), any size.
        strength: of the colours where there is most of it, 0 to 1.
    """
    low, high = float(heat.min()), float(heat.max())
    level = (heat - low) / max(high - low, 1e-12)
    resized = Image.fromarray(level.astype(np.float32)).resize(
        picture.size, Image.Resampling.BILINEAR
    )
    level = np.asarray(resized).clip(0, 1)[..., None]  # (H, W, 1)
    stops = np.linspace(0, 1, len(COLOURS))
    colours = np.stack([np.interp(level[..., 0], stops, COLOURS[:, c]) for c in range(3)], -1)
    share = strength * (0.35 + 0.65 * level)
    painted = (1 - share) * np.asarray(picture.convert("RGB"), np.float32) + share * colours
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
