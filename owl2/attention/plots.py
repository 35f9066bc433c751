"""The paper's Figs. 4 and 5 from one's own model, and the image painted by word.

They need matplotlib (the extra ``plot``).
"""

import math
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from owl2.attention.attention_maps import Looks
from owl2.attention.heatmap import heat_map, overlay, share_of
from owl2.errors import InputError

# A colour a kind, as in the paper: images orange, words blue.
SPANS = {"image": "#f28e2b", "text": "#4e79a7", "answer": "#59a14f"}
NAMES = {"image": "image", "text": "prompt's words", "answer": "answer's words"}
CHINESE = ("Noto Sans CJK SC", "WenQuanYi Micro Hei", "Microsoft YaHei", "PingFang SC")
MOST_LABELS = 48  # positions that can be labelled with their words
LABEL = 0.11  # inches that a small one takes
SMALLEST = 360  # pixels along an edge at which an image is painted

Layers = Sequence[int | None]  # None: the mean over all


def require_matplotlib() -> None:
    """Raise an InputError if there can be no figures."""
    try:
        import matplotlib  # noqa: F401  # whether it is there is the question
    except ImportError as error:
        raise InputError(
            "The figures need matplotlib: pip install 'owl2-vlm[plot]'. "
            "owl2.attention.look gives the numbers without it."
        ) from error


def draw_maps(path: Path, looks: Sequence[Looks], layers: Layers, question: str) -> None:
    """Fig. 4: a row for each of `looks` (with MAM, without), a column for each layer; in a panel
    the answer's tokens downwards, all positions to the right, the mean over the heads as colour."""
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    first = looks[0]
    tokens, positions = len(first.tokens), first.spans[-1].end
    width = max(2.4, min(6.0, 0.13 * positions))
    height = max(0.75, min(7.0, 0.26 * tokens))
    labelled = positions <= MOST_LABELS
    with _style():
        figure = Figure(
            figsize=(
                1.4 + width * len(layers),
                1.5 + (height + 0.45) * len(looks) + 0.6 * labelled,
            ),
            layout="constrained",
        )
        _set_title(figure, question, first.answer)
        grid = figure.subplots(len(looks), len(layers), squeeze=False, sharex=True, sharey=True)
        for axes in grid.ravel():
            axes.tick_params(length=0)
            axes.spines[:].set_color("0.75")
            axes.spines[:].set_visible(True)
        # The root, or the few positions on which most attention rests would be all that one sees.
        most = max(own.of_layer(layer).mean(0).max() for own in looks for layer in layers)
        norm = PowerNorm(0.5, vmin=0, vmax=most)
        for row, own in enumerate(looks):
            for column, layer in enumerate(layers):
                axes = grid[row, column]
                shown = axes.imshow(
                    own.of_layer(layer).mean(0),
                    aspect="auto",
                    cmap="BuPu",
                    norm=norm,
                    interpolation="nearest",
                )
                _mark_spans(axes, own)
                if row == 0:
                    axes.set_title(_layer_name(layer), pad=12)
                if column == 0:
                    _label_tokens(axes, own, height)
                    if len(looks) > 1:
                        axes.set_ylabel(_mam_name(own), labelpad=8)
        for axes in grid[-1]:
            _label_positions(axes, first, labelled)
        colours = figure.colorbar(shown, ax=grid, aspect=figure.get_figheight() / 0.2, pad=0.01)
        ticks = [tick for tick in (0, 0.01, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1) if tick <= most]
        colours.set_ticks(ticks, labels=[f"{tick:.0%}" for tick in ticks])
        colours.outline.set_visible(False)
        _legend(figure, first)
        _save(figure, path)


def draw_shares(path: Path, looks: Sequence[Looks], question: str) -> None:
    """Fig. 5 in one plot a model: in each layer, how much of the answer's attention lies on
    images, on the prompt's words, on the answer's own."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    count = len(looks[0].shares)
    width = max(3.6, min(7.0, 0.35 * count))
    with _style():
        figure = Figure(figsize=(0.9 + width * len(looks), 3.6), layout="constrained")
        _set_title(figure, question, looks[0].answer)
        grid = figure.subplots(1, len(looks), squeeze=False, sharey=True)[0]
        for axes, own in zip(grid, looks, strict=True):
            bottom = np.zeros(count)
            for kind in SPANS:
                share = _share(own, kind)
                axes.bar(
                    range(count),
                    share,
                    0.82,
                    bottom,
                    color=SPANS[kind],
                    edgecolor="white",
                    linewidth=0.6,
                )
                bottom += share
            axes.set_ylim(0, 1)
            axes.set_xlim(-0.6, count - 0.4)
            axes.set_xlabel("layer")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=9))
            axes.yaxis.set_major_formatter(PercentFormatter(1))
            mean = _share(own, "image").mean()
            name = f"{_mam_name(own)}: " if len(looks) > 1 else ""
            title = f"{name}{mean:.0%} on the image{_plural(own)}, mean of all layers"
            axes.set_title(title, loc="left")
        grid[0].set_ylabel("share of the attention")
        _legend(figure, looks[0])
        _save(figure, path)


def draw_heat(
    path: Path,
    looks: Sequence[Looks],
    images: Sequence[Image.Image],
    words: Sequence[tuple[str, tuple[int, int]]],
    question: str,
) -> None:
    """A row for each image and each of `looks`: the image, then where each word comes from;
    in brackets how much of all the word's attention is on this image.

    Args:
        words: with their tokens, see `words_of`.
    """
    from matplotlib.figure import Figure

    # One word's panels stand beside each other, several words' below each other.
    together = len(words) == 1
    groups = [looks] if together else [[own] for own in looks]
    rows = [(number, group) for number in range(len(images)) for group in groups]
    columns = 1 + len(words) * len(groups[0])
    with _style():
        figure = Figure(figsize=(2.6 * columns + 0.2, 0.5 + 2.75 * len(rows)), layout="constrained")
        _set_title(figure, question, looks[0].answer)
        grid = figure.subplots(len(rows), columns, squeeze=False)
        for axes in grid.ravel():
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_visible(False)
        for line, (number, group) in zip(grid, rows, strict=True):
            image = _enlarged(images[number])
            line[0].imshow(image)
            if len(looks) > 1 and not together:
                line[0].set_ylabel(_mam_name(group[0]), labelpad=6)
            panels = [(own, word, tokens) for own in group for word, tokens in words]
            for axes, (own, word, tokens) in zip(line[1:], panels, strict=True):
                axes.imshow(overlay(image, heat_map(own, tokens, number)))
                name = f"{word}, {_mam_name(own)}" if len(looks) > 1 and together else word
                share = share_of(own, tokens, number)
                axes.set_title(f"{name}  ({share:.0%})", parse_math=False)
        _save(figure, path)


# ------------------------------------------------------------------ parts of figures


def _mark_spans(axes: Any, looks: Looks) -> None:
    """A coloured bar above a map, over each span; a thin line where one ends."""
    for span in looks.spans:
        axes.plot(
            [span.start - 0.38, span.end - 0.62],
            [1.0, 1.0],
            color=SPANS[span.kind],
            linewidth=5,
            solid_capstyle="butt",
            clip_on=False,
            transform=_above(axes),
        )
        if span.start:
            axes.axvline(span.start - 0.5, color="black", linewidth=0.6, alpha=0.5)
    axes.set_xlim(-0.5, looks.spans[-1].end - 0.5)


def _above(axes: Any) -> Any:
    """Positions to the right; upwards a little above the map."""
    from matplotlib.transforms import ScaledTranslation

    return axes.get_xaxis_transform() + ScaledTranslation(0, 0.06, axes.figure.dpi_scale_trans)


def _label_tokens(axes: Any, looks: Looks, inches: float) -> None:
    count = len(looks.tokens)
    step = math.ceil(count * LABEL / inches)
    places = range(0, count, step)
    labels = [_shown(looks.tokens[place]) for place in places]
    axes.set_yticks(places, labels, fontsize=9 if count <= 20 else 7)


def _label_positions(axes: Any, looks: Looks, labelled: bool) -> None:
    if not labelled:
        starts = [span.start for span in looks.spans]
        axes.set_xticks(starts, [str(start) for start in starts])
        axes.set_xlabel("position")
        return
    texts = [*looks.prompt_tokens, *looks.tokens][: looks.spans[-1].end]
    for span in looks.spans:
        if span.kind == "image":
            numbers = [str(number) for number in range(1, span.end - span.start)]
            texts[span.start : span.end] = [*numbers, "end"]
    axes.set_xticks(range(len(texts)), [_shown(text) for text in texts], rotation=90, fontsize=7)


def _legend(figure: Any, looks: Looks) -> None:
    from matplotlib.patches import Patch

    kinds = {span.kind for span in looks.spans}
    handles = [Patch(color=SPANS[kind], label=NAMES[kind]) for kind in SPANS if kind in kinds]
    figure.legend(handles=handles, loc="outside lower left", ncols=3, frameon=False)


def _share(looks: Looks, kind: str) -> np.ndarray:
    """(L,) of the attention of all tokens, on all spans of a kind."""
    own = [number for number, span in enumerate(looks.spans) if span.kind == kind]
    share: np.ndarray = looks.shares[..., own].sum(-1).mean(1)
    return share


def _enlarged(image: Image.Image) -> Image.Image:
    """Small ones with sharp pixels, and large enough that the map over them is smooth."""
    factor = -(-SMALLEST // max(image.size))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def _layer_name(layer: int | None) -> str:
    return "mean of all layers" if layer is None else f"layer {layer}"


def _mam_name(looks: Looks) -> str:
    return "with MAM" if looks.use_mam else "without MAM"


def _plural(looks: Looks) -> str:
    return "s" if sum(span.kind == "image" for span in looks.spans) > 1 else ""


def _set_title(figure: Any, question: str, answer: str) -> None:
    asked, said = (textwrap.shorten(text, 120, placeholder=" …") for text in (question, answer))
    letters = int(figure.get_figwidth() * 11)  # that fit beside each other
    title = textwrap.fill(f"{asked} → {said}", letters)
    figure.suptitle(title, x=0.01, ha="left", parse_math=False)


def _shown(token: str) -> str:
    """A token as a label: without the space in front, a line's end as a sign."""
    return token.replace("\n", "⏎").strip() or "·"


@contextmanager
def _style() -> Iterator[None]:
    import matplotlib
    from matplotlib import font_manager

    here = {font.name for font in font_manager.fontManager.ttflist}
    fonts = ["DejaVu Sans", *(name for name in CHINESE if name in here)]
    style: Any = {
        "font.family": fonts,
        "font.size": 9,
        "axes.titlesize": 9,
        "figure.titlesize": 11,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with matplotlib.rc_context(style):
        yield


def _save(figure: Any, path: Path) -> None:
    with warnings.catch_warnings():
        # Not every font has every sign that a model may say: it becomes a box.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(path, dpi=150)
