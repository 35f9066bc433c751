"""Figures of attention maps: the paper's Figs. 4 and 5 for one answer, and heatmaps.

They need matplotlib (the extra ``plot``).
"""

import math
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from owl2.attention.attention_maps import AttentionMaps
from owl2.attention.heatmap import TokenRange, attention_share, heat_map, overlay
from owl2.fonts import save_figure

# Colors as in the paper: images orange, text blue.
KINDS = {
    "image": ("image", "#f28e2b"),
    "text": ("prompt text", "#4e79a7"),
    "answer": ("answer", "#59a14f"),
}
MAX_POSITION_LABELS = 48
LABEL_HEIGHT = 0.11  # inches of a label in the small font
MIN_IMAGE_EDGE = 360  # pixels, so that a heatmap over a small image is smooth

Layers = Sequence[int | None]  # None: the mean over all layers


def draw_maps(path: Path, maps: Sequence[AttentionMaps], layers: Layers, question: str) -> None:
    """Fig. 4: the attention of each answer token on each position, as the mean over the heads.

    One row for each of `maps` (with MAM, without MAM), one column for each layer.
    """
    from matplotlib.colors import PowerNorm

    first = maps[0]
    positions = first.spans[-1].end
    width = max(2.4, min(6.0, 0.13 * positions))
    height = max(0.75, min(7.0, 0.26 * len(first.tokens)))
    has_labels = positions <= MAX_POSITION_LABELS
    figure_height = 1.5 + (height + 0.45) * len(maps) + 0.6 * has_labels
    with _figure(path, (1.4 + width * len(layers), figure_height), question, first) as figure:
        grid = figure.subplots(len(maps), len(layers), squeeze=False, sharex=True, sharey=True)
        most = max(own.for_layer(layer).mean(0).max() for own in maps for layer in layers)
        # The square root keeps small weights visible next to the few positions with most weight.
        norm = PowerNorm(0.5, vmin=0, vmax=most)
        for row, own in zip(grid, maps, strict=True):
            for axes, layer in zip(row, layers, strict=True):
                axes.tick_params(length=0)
                axes.spines[:].set_color("0.75")
                axes.spines[:].set_visible(True)
                weights = own.for_layer(layer).mean(0)
                colored = axes.imshow(
                    weights, aspect="auto", cmap="BuPu", norm=norm, interpolation="nearest"
                )
                _mark_spans(axes, own)
            count = len(own.tokens)
            shown = range(0, count, math.ceil(count * LABEL_HEIGHT / height))
            labels = [_token_label(own.tokens[index]) for index in shown]
            row[0].set_yticks(shown, labels, fontsize=9 if count <= 20 else 7)
            if len(maps) > 1:
                row[0].set_ylabel(_mam_label(own), labelpad=8)
        for axes, layer in zip(grid[0], layers, strict=True):
            axes.set_title("mean of all layers" if layer is None else f"layer {layer}", pad=12)
        for axes in grid[-1]:
            _label_positions(axes, first, has_labels)
        colorbar = figure.colorbar(colored, ax=grid, aspect=figure_height / 0.2, pad=0.01)
        ticks = [tick for tick in (0, 0.01, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1) if tick <= most]
        colorbar.set_ticks(ticks, labels=[f"{tick:.0%}" for tick in ticks])
        colorbar.outline.set_visible(False)


def draw_shares(path: Path, maps: Sequence[AttentionMaps], question: str) -> None:
    """Fig. 5 for each of `maps`: the share of the attention on images, prompt text and answer."""
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    count = len(maps[0].shares)
    width = max(3.6, min(7.0, 0.35 * count))
    with _figure(path, (0.9 + width * len(maps), 3.6), question, maps[0]) as figure:
        grid = figure.subplots(1, len(maps), squeeze=False, sharey=True)[0]
        for axes, own in zip(grid, maps, strict=True):
            bottom = np.zeros(count)
            for kind, (_, color) in KINDS.items():
                spans = [index for index, span in enumerate(own.spans) if span.kind == kind]
                share = own.shares[..., spans].sum(-1).mean(1)  # (L,)
                style: dict[str, Any] = {"color": color, "edgecolor": "white", "linewidth": 0.6}
                axes.bar(range(count), share, 0.82, bottom, **style)
                bottom += share
                if kind == "image":
                    prefix = f"{_mam_label(own)}: " if len(maps) > 1 else ""
                    images = "images" if len(spans) > 1 else "image"
                    title = f"{prefix}{share.mean():.0%} on the {images}, mean of all layers"
                    axes.set_title(title, loc="left")
            axes.set_ylim(0, 1)
            axes.set_xlim(-0.6, count - 0.4)
            axes.set_xlabel("layer")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=9))
            axes.yaxis.set_major_formatter(PercentFormatter(1))
        grid[0].set_ylabel("share of the attention")


def draw_heat_maps(
    path: Path,
    maps: Sequence[AttentionMaps],
    images: Sequence[Image.Image],
    words: Sequence[tuple[str, TokenRange]],
    question: str,
) -> None:
    """The image and the heatmap of each word, one row for each image and each of `maps`.

    The percentage in parentheses is the share of the word's attention on this image.

    Args:
        words: With their tokens, as from `answer_words`.
    """
    # One word: all maps in one row. Several words: one row for each of the maps.
    is_one_row = len(words) == 1
    groups = [maps] if is_one_row else [[own] for own in maps]
    rows = [(index, group) for index in range(len(images)) for group in groups]
    columns = 1 + len(words) * len(groups[0])
    size = (2.6 * columns + 0.2, 0.5 + 2.75 * len(rows))
    with _figure(path, size, question, maps[0], has_legend=False) as figure:
        grid = figure.subplots(len(rows), columns, squeeze=False)
        for axes in grid.ravel():
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_visible(False)
        for row, (index, group) in zip(grid, rows, strict=True):
            image = images[index]
            factor = -(-MIN_IMAGE_EDGE // max(image.size))
            edges = (image.width * factor, image.height * factor)
            image = image.resize(edges, Image.Resampling.NEAREST)
            row[0].imshow(image)
            if len(maps) > 1 and not is_one_row:
                row[0].set_ylabel(_mam_label(group[0]), labelpad=6)
            panels = [(own, word, tokens) for own in group for word, tokens in words]
            for axes, (own, word, tokens) in zip(row[1:], panels, strict=True):
                axes.imshow(overlay(image, heat_map(own, tokens, index)))
                name = f"{word}, {_mam_label(own)}" if len(maps) > 1 and is_one_row else word
                share = attention_share(own, tokens, index)
                axes.set_title(f"{name}  ({share:.0%})", parse_math=False)


# ------------------------------------------------------------------ parts of figures


@contextmanager
def _figure(
    path: Path,
    size: tuple[float, float],
    question: str,
    maps: AttentionMaps,
    has_legend: bool = True,
) -> Iterator[Any]:
    """A figure with the question and the answer as title, which is saved when the block ends."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    style: Any = {
        "font.size": 9,
        "axes.titlesize": 9,
        "figure.titlesize": 11,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=size, layout="constrained")
        title = " → ".join(
            textwrap.shorten(text, 120, placeholder=" …") for text in (question, maps.answer)
        )
        characters_per_line = int(size[0] * 11)
        title = textwrap.fill(title, characters_per_line)
        figure.suptitle(title, x=0.01, ha="left", parse_math=False)
        yield figure
        if has_legend:
            kinds = {span.kind for span in maps.spans}
            entries = [entry for kind, entry in KINDS.items() if kind in kinds]
            handles = [Patch(color=color, label=label) for label, color in entries]
            figure.legend(handles=handles, loc="outside lower left", ncols=3, frameon=False)
        save_figure(figure, path, dpi=150)


def _mark_spans(axes: Any, maps: AttentionMaps) -> None:
    """A colored bar above the map for each span, and a thin line between spans."""
    from matplotlib.transforms import ScaledTranslation

    above = ScaledTranslation(0, 0.06, axes.figure.dpi_scale_trans)
    style: dict[str, Any] = {"linewidth": 5, "solid_capstyle": "butt", "clip_on": False}
    for span in maps.spans:
        edges = [span.start - 0.38, span.end - 0.62]
        color = KINDS[span.kind][1]
        transform = axes.get_xaxis_transform() + above
        axes.plot(edges, [1.0, 1.0], color=color, transform=transform, **style)
        if span.start:
            axes.axvline(span.start - 0.5, color="black", linewidth=0.6, alpha=0.5)
    axes.set_xlim(-0.5, maps.spans[-1].end - 0.5)


def _label_positions(axes: Any, maps: AttentionMaps, has_labels: bool) -> None:
    if not has_labels:
        axes.set_xticks([span.start for span in maps.spans])
        axes.set_xlabel("position")
        return
    texts = [*maps.prompt_tokens, *maps.tokens][: maps.spans[-1].end]
    for span in maps.spans:
        if span.kind == "image":
            queries = range(1, span.end - span.start)
            texts[span.start : span.end] = [*map(str, queries), "end"]
    labels = [_token_label(text) for text in texts]
    axes.set_xticks(range(len(texts)), labels, rotation=90, fontsize=7)


def _token_label(token: str) -> str:
    """A token without the leading space; a line break as a symbol."""
    return token.replace("\n", "⏎").strip() or "·"


def _mam_label(maps: AttentionMaps) -> str:
    return "with MAM" if maps.use_mam else "without MAM"
