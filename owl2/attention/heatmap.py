"""Heatmaps: the part of an image that the tokens of an answer attend to.

::

    decoder: a token's weights on the K queries of an image ──┐ product
    abstractor: each query's weights on the patches ──────────┴─► grid (g, g) ──► map (H, W)

Shapes: K learnable queries, g x g patches, H x W pixels.
"""

import re

import numpy as np
from PIL import Image

from owl2.attention.attention_maps import AttentionMaps
from owl2.attention.tokenized_conversation import Span
from owl2.errors import ErrorCode, InputError

MAX_EDGE = 1024  # pixels of the longer edge of a map, which has a few hundred patches
MIN_SCALE = 3.0  # the brightest color stands for at least this multiple of a uniform share
MAX_OPACITY = 0.85  # of the color at the maximum
SMOOTHING = 0.5  # standard deviation of the Gaussian that smooths a map, in patches
# Chinese text has no spaces, so that each character counts as a word.
_WORD = re.compile(r"[\u3400-\u9fff]|[^\W\u3400-\u9fff]+")
# RGB from low to high: blue, violet, red, orange, yellow.
COLORS = np.array(
    [[60, 60, 200], [120, 40, 190], [215, 40, 110], [250, 120, 30], [255, 225, 60]], np.float32
)

TokenRange = tuple[int, int]  # first token, last token + 1
Target = str | TokenRange | None  # text of the answer, a range of tokens, or the complete answer


def answer_words(maps: AttentionMaps) -> list[tuple[str, TokenRange]]:
    """The words of the answer, each with its range of tokens."""
    text = "".join(maps.tokens)
    return [(match[0], _tokens_at(maps, *match.span())) for match in _WORD.finditer(text)]


def token_range(maps: AttentionMaps, target: Target) -> TokenRange:
    """The tokens of a text in the answer, at its first occurrence as complete words, if any.

    Raises:
        InputError: The answer does not contain the text or the range.
    """
    if target is None:
        return 0, len(maps.tokens)
    if not isinstance(target, str):
        first, end = target
        if not 0 <= first < end <= len(maps.tokens):
            raise InputError(
                f"Tokens {first} to {end} are out of range: the answer has {len(maps.tokens)}.",
                ErrorCode.INVALID_VALUE,
            )
        return first, end
    text, pattern = "".join(maps.tokens), re.escape(target.strip())
    match = re.search(rf"(?<!\w){pattern}(?!\w)", text, re.IGNORECASE)
    match = match or re.search(pattern, text, re.IGNORECASE)
    if match is None or not target.strip():
        raise InputError(
            f"{target!r} does not occur in the answer {maps.answer!r}.", ErrorCode.INVALID_VALUE
        )
    return _tokens_at(maps, *match.span())


def _tokens_at(maps: AttentionMaps, begin: int, end: int) -> TokenRange:
    """The tokens of the characters from `begin` to `end` of the answer."""
    ends = np.cumsum([len(token) for token in maps.tokens])
    first, last = np.searchsorted(ends, [begin, end - 1], side="right")
    # The empty tokens before a token are the first bytes of its character.
    while first and ends[first - 1] == (ends[first - 2] if first > 1 else 0) == begin:
        first -= 1
    return int(first), int(last) + 1


def _image_span(maps: AttentionMaps, image: int) -> Span:
    spans = [span for span in maps.spans if span.kind == "image"]
    if not 0 <= image < len(spans):
        raise InputError(
            f"Image {image} does not exist; the number of images is {len(spans)}, counted from 0.",
            ErrorCode.INVALID_VALUE,
        )
    return spans[image]


def attention_share(maps: AttentionMaps, target: Target = None, image: int = 0) -> float:
    """The part of the attention that is on an image, 0 to 1, as a mean over heads and layers.

    Raises:
        InputError: Unknown image or target.
    """
    first, end = token_range(maps, target)
    span = _image_span(maps, image)
    return float(maps.mean[:, first:end, span.start : span.end].sum(-1).mean())


def patch_map(
    maps: AttentionMaps, target: Target = None, image: int = 0, layer: int | None = None
) -> np.ndarray:
    """The attention on each patch of an image.

    Args:
        target: Text of the answer, a range of tokens (end exclusive), or None for all tokens.
        image: The index of the image, from 0.
        layer: One of the selected layers; None: the mean over all layers.

    Returns:
        (g, g) float32; 1 is a uniform share.

    Raises:
        InputError: Unknown image, target or layer.
    """
    first, end = token_range(maps, target)
    span = _image_span(maps, image)
    # The last position of an image is a constant embedding without image content.
    queries = maps.for_layer(layer)[:, first:end, span.start : span.end - 1].mean((0, 1))  # (K,)
    patches = queries @ maps.patches[image][:, 1:]  # (g * g,), without CLS
    grid = round(len(patches) ** 0.5)
    shares: np.ndarray = (patches / patches.mean()).reshape(grid, grid).astype(np.float32)
    return shares


def heat_map(
    maps: AttentionMaps, target: Target = None, image: int = 0, layer: int | None = None
) -> np.ndarray:
    """`patch_map`, smoothed over the image: (H, W) float32, each edge at most `MAX_EDGE` pixels."""
    grid = patch_map(maps, target, image, layer)
    width, height = maps.sizes[image]
    scale = min(1.0, MAX_EDGE / max(width, height))
    width, height = max(1, round(width * scale)), max(1, round(height * scale))
    # The model's square is the stretched image, the image with margins, which are cut off, or the
    # center of the image, outside of which the model sees nothing.
    edge = (min if maps.policy == "crop" else max)(width, height)
    square = (width, height) if maps.policy == "resize" else (edge, edge)
    left, top = (square[0] - width) // 2, (square[1] - height) // 2
    columns = _interpolation(square[0], len(grid))[max(left, 0) :][:width]
    rows = _interpolation(square[1], len(grid))[max(top, 0) :][:height]
    heat = np.zeros((height, width), np.float32)
    inside = heat[max(-top, 0) :, max(-left, 0) :][: len(rows), : len(columns)]
    inside[:] = rows @ grid @ columns.T
    return heat


def _interpolation(pixels: int, patches: int) -> np.ndarray:
    """(pixels, patches) float32 Gaussian weights; bicubic interpolation would overshoot."""
    positions = (np.arange(pixels) + 0.5) * patches / pixels - 0.5
    weights = np.exp(-(((positions[:, None] - np.arange(patches)) / SMOOTHING) ** 2) / 2)
    weights /= weights.sum(1, keepdims=True)
    return weights.astype(np.float32)


def overlay(image: Image.Image, heat: np.ndarray) -> Image.Image:
    """Paint a heatmap over an image, in the size of the image.

    Pixels with at most a uniform share (1) only lose some saturation. The maximum gets the
    brightest color if it is at least `MIN_SCALE`. A nearly uniform map is therefore not painted.

    Args:
        heat: (h, w) of any size.
    """
    scale = max(float(heat.max()), MIN_SCALE)
    level = ((heat - 1) / (scale - 1)).clip(min=0).astype(np.float32)
    resized = Image.fromarray(level).resize(image.size, Image.Resampling.BILINEAR)
    level = np.asarray(resized)  # (H, W)
    stops = np.linspace(0, 1, len(COLORS))
    paint = np.stack([np.interp(level, stops, channel) for channel in COLORS.T], -1)  # (H, W, 3)
    opacity = MAX_OPACITY * level[..., None] ** 0.7
    rgb = np.asarray(image.convert("RGB"), np.float32)
    pale = 0.5 * rgb + 0.5 * np.asarray(image.convert("L"), np.float32)[..., None]
    painted = (1 - opacity) * pale + opacity * paint
    return Image.fromarray(painted.round().astype(np.uint8))
