"""`owl2 attend`: answer a question, draw the attention and save the arrays."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from owl2.attention.attention_maps import (
    MAX_NEW_TOKENS,
    AttentionMaps,
    collect_attention,
    resolve_layers,
)
from owl2.attention.heatmap import TokenRange, answer_words, patch_map, token_range
from owl2.attention.plots import draw_heat_maps, draw_maps, draw_shares
from owl2.engine.engine import Engine
from owl2.engine.load_model import ModelArgs
from owl2.errors import ErrorCode, InputError, require_package
from owl2.files import atomic_directory
from owl2.processing.image_io import load_image
from owl2.processing.messages import user_message, validate_prompt

MAX_WORDS = 7  # words that get a heatmap by default
OUTPUT_FILES = {"attention.png", "shares.png", "heatmap.png", "attention.npz"}


def attend(
    model: ModelArgs,
    question: str,
    output: Path,
    console: Console,
    *,
    images: Sequence[str] = (),
    layers: str | None = None,
    words: Sequence[str] = (),
    compare_no_mam: bool = False,
    answer: str | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> None:
    """Write `OUTPUT_FILES` into the output directory; ``heatmap.png`` only if there is an image.

    Args:
        layers: Indices (negative ones count from the end) and "mean", separated by commas.
            Default: the first, the middle, the last and the mean, as in the paper.
        words: Words of the answer to draw heatmaps for. Default: all, up to `MAX_WORDS`.
        compare_no_mam: Also draw the attention with the text weights for images.
        answer: The answer to analyze instead of the model's own.

    Raises:
        InputError: As `collect_attention` and `token_range`; also without matplotlib, or if the
            output directory contains other files.
    """
    require_package("matplotlib", "A figure of the attention", "plot")
    _require_own_directory(output)
    validate_prompt([user_message(question, images)])
    processor = model.load_processor()
    loaded = [load_image(image, processor.image_processor.max_pixels) for image in images]
    messages = [user_message(question, loaded)]
    engine = Engine(model.load_model(), processor, enable_prefix_caching=True)
    selected = _parse_layers(layers, engine.model.config.num_hidden_layers)
    options: dict[str, Any] = {
        "layers": [layer for layer in selected if layer is not None],
        "max_new_tokens": max_new_tokens,
    }
    maps = [collect_attention(engine, processor, messages, answer=answer, **options)]
    if compare_no_mam:
        options |= {"answer": maps[0].answer, "use_mam": False}
        maps.append(collect_attention(engine, processor, messages, **options))
    ranges = [(word, token_range(maps[0], word)) for word in words] or _words(maps[0])
    with atomic_directory(output) as directory:
        draw_maps(directory / "attention.png", maps, selected, question)
        draw_shares(directory / "shares.png", maps, question)
        if loaded:
            draw_heat_maps(directory / "heatmap.png", maps, loaded, ranges, question)
        saved: Any = arrays(maps, ranges)
        np.savez_compressed(directory / "attention.npz", **saved)
    console.print(maps[0].answer, markup=False, highlight=False)
    console.print(f"Figures and arrays: {output}", markup=False, highlight=False)


def arrays(
    maps: Sequence[AttentionMaps], words: Sequence[tuple[str, TokenRange]]
) -> dict[str, np.ndarray]:
    """The arrays of ``attention.npz``, none of which needs pickle.

    `attention`, `mean` and `shares` (see `AttentionMaps`) and `heat` (words, N, g, g) (see
    `patch_map`); with the prefix ``no_mam_``, the same without MAM. Shared by both: `tokens`,
    `prompt_tokens`, `layers`, `words`, `patches`, and for each span `spans` (start, end), `kinds`
    and `images` (-1: not an image).
    """
    first = maps[0]
    count = sum(span.kind == "image" for span in first.spans)
    saved: dict[str, np.ndarray] = {
        "tokens": np.array(first.tokens, np.str_),
        "prompt_tokens": np.array(first.prompt_tokens, np.str_),
        "layers": np.array(first.layers, np.int64),
        "words": np.array([word for word, _ in words], np.str_),
        "spans": np.array([(span.start, span.end) for span in first.spans]),
        "kinds": np.array([span.kind for span in first.spans]),
        "images": np.array([-1 if s.image is None else s.image for s in first.spans]),
        "patches": first.patches,
    }
    for prefix, own in zip(("", "no_mam_"), maps, strict=False):
        grid = round((own.patches.shape[-1] - 1) ** 0.5)
        heat = [patch_map(own, tokens, image) for _, tokens in words for image in range(count)]
        saved |= {f"{prefix}{name}": getattr(own, name) for name in ("attention", "mean", "shares")}
        saved[f"{prefix}heat"] = np.array(heat, np.float32).reshape(len(words), count, grid, grid)
    return saved


def _parse_layers(text: str | None, count: int) -> list[int | None]:
    """The layers to draw; None: the mean."""
    if text is None:
        return [*resolve_layers(None, count), None]
    names = [name.strip() for name in text.split(",")]
    if invalid := [name for name in names if not re.fullmatch(r"mean|-?\d+", name)]:
        raise InputError(
            f"--layers: {invalid[0]!r} is neither an index nor 'mean'. Example: 0,15,mean",
            ErrorCode.INVALID_VALUE,
        )
    return [None if name == "mean" else resolve_layers([int(name)], count)[0] for name in names]


def _words(maps: AttentionMaps) -> list[tuple[str, TokenRange]]:
    """The first occurrence of each word, or the complete answer."""
    different: dict[str, tuple[str, TokenRange]] = {}
    for word, tokens in answer_words(maps):
        different.setdefault(word.lower(), (word, tokens))
    # An answer may consist of punctuation only.
    return [*different.values()][:MAX_WORDS] or [(maps.answer, (0, len(maps.tokens)))]


def _require_own_directory(output: Path) -> None:
    """Refuse a directory with files of other programs, because it is replaced."""
    names = {file.name for file in output.iterdir()} if output.is_dir() else set()
    if others := sorted(names - OUTPUT_FILES):
        raise InputError(
            f"{output} contains other files, such as {others[0]}; choose another directory.",
            ErrorCode.FILE_EXISTS,
        )
