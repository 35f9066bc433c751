"""The tab "where it looked": the images of the last question, painted, for the answer's words.

The model is run once a question; another word is only another sum of what was recorded then.
"""

import asyncio
import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import quote

import gradio as gr
from PIL import Image

from owl2.attention import AttentionMaps, answer_words, collect_attention, heat_map, overlay
from owl2.attention.heatmap import COLORS, MIN_SCALE
from owl2.engine.engine import Engine
from owl2.serve.web.conversation import Conversation, Turn
from owl2.serve.web.i18n import text
from owl2.serve.web.notify import note, warn

EDGE = 512  # pixels of a painted square: smaller, and a map over it has steps
ALL = -1  # the choice of no word


@dataclass(frozen=True)
class Looked:
    """What the tab shows of one answer.

    Attributes:
        looks: with the mean over layers and heads only; the rest would fill the server's memory.
        squares: the images of all questions so far, as the model saw them.
        files: the same, as they were uploaded.
        of: which questions and answers these are.
    """

    looks: AttentionMaps
    squares: tuple[Image.Image, ...]
    files: tuple[str, ...]
    of: tuple[tuple[str, str], ...]

    @property
    def words(self) -> list[tuple[str, tuple[int, int]]]:
        """The answer's, each with its tokens."""
        return answer_words(self.looks)


class Looking:
    """The tab's functions. One at a time looks: it is a curiosity, and the answers come first."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._lock = asyncio.Lock()

    async def show(
        self, talk: Conversation, looked: Looked | None, language: str
    ) -> tuple[Looked | None, Any, str]:
        """Look at the last answer, unless it is the one looked at before.

        Returns:
            What to keep, and what `describe` gives.
        """
        turns = [turn for turn in talk.turns if turn.answer.strip()]
        if talk.busy or not any(turn.images for turn in turns):
            if turns:
                note("error_busy" if talk.busy else "error_no_image", language)
            return await self.forget(language)
        if looked is None or looked.of != _of(turns):
            try:
                async with self._lock:
                    looked = await asyncio.to_thread(self._look, Conversation(turns))
            except Exception as error:  # what is our own code is logged, and here it is said
                warn(error, language)
                return await self.forget(language)
        return looked, *describe(looked, ALL, language)

    async def forget(self, language: str) -> tuple[None, Any, str]:
        """The tab as it was in the beginning."""
        return None, *describe(None, ALL, language)

    def _look(self, talk: Conversation) -> Looked:
        answer = talk.turns[-1].answer.strip()
        looks = collect_attention(
            self._engine, self._engine.processor, talk.messages(), answer=answer, layers=(0,)
        )
        mean = looks.mean.mean(0, keepdims=True)  # (1, T, S)
        small = replace(looks, mean=mean, attention=mean[:0], layers=())
        squares = [image.resize((EDGE, EDGE)) for turn in talk.turns for image in turn.images]
        files = [file for turn in talk.turns for file in turn.files]
        return Looked(small, tuple(squares), tuple(files), _of(talk.turns))


def _of(turns: Sequence[Turn]) -> tuple[tuple[str, str], ...]:
    return tuple((turn.question, turn.answer) for turn in turns)


def describe(looked: Looked | None, word: int | None, language: str) -> tuple[Any, str]:
    """The words to choose from, `word` chosen, and what `paint` gives."""
    if looked is None:
        return gr.update(visible=False), paint(None, ALL, language)
    choices = [(text("all_words", language), ALL)]
    choices += [(name, number) for number, (name, _) in enumerate(looked.words)]
    update = gr.update(choices=choices, value=word, visible=True)
    return update, paint(looked, word, language)


def paint(looked: Looked | None, word: int | None, language: str) -> str:
    """HTML: each image beside itself painted, and how much came from where.

    Args:
        word: its number among the answer's words, or `ALL`.
    """
    if looked is None:
        return html.escape(text("looked_help", language))
    known = word is not None and 0 <= word < len(looked.words)
    tokens = looked.words[word][1] if known and word is not None else (0, len(looked.looks.tokens))
    rows = []
    # A square that was a longer image is stretched to it again, or loses its margins.
    fit = "cover" if looked.looks.policy == "pad" else "fill"
    for number, (file, square) in enumerate(zip(looked.files, looked.squares, strict=True)):
        heat = heat_map(looked.looks, tokens, number)
        painted = _data_uri(overlay(square, heat))
        name = text("figure_image", language)
        if len(looked.files) > 1:
            name = text("figure_images", language, number=number + 1)
        rows.append(
            f"<div class='row'>{_figure(file, name)}"
            f"{_figure(file, text('figure_looked', language), painted, fit)}</div>"
            + _scale(max(float(heat.max()), MIN_SCALE), language)
        )
    pairs = "".join(f"<div>{row}</div>" for row in rows)
    pairs = f"<div class='pairs'>{pairs}</div>" if rows else ""
    return f"<div class='looked'>{pairs}{_shares(looked.looks, tokens, language)}</div>"


def shares(looks: AttentionMaps, tokens: tuple[int, int]) -> dict[str, list[float]]:
    """How much of the attention of some of the answer's tokens lies on what; it sums to one.

    Returns:
        "text", "image" (one for each) and "answer", each a list of spans' shares.
    """
    of_position = looks.mean[:, tokens[0] : tokens[1]].mean((0, 1))  # (S,)
    sums: dict[str, list[float]] = {"text": [], "image": [], "answer": []}
    for span in looks.spans:
        sums[span.kind].append(float(of_position[span.start : span.end].sum()))
    return sums


def _figure(file: str, name: str, painted: str = "", fit: str = "") -> str:
    """The uploaded image, or what is painted, in its place and shape."""
    alt = html.escape(name)
    above = f"<img class='painted {fit}' alt='{alt}' src='{painted}'>" if painted else ""
    below = f"<img alt='{'' if painted else alt}' src='gradio_api/file={quote(file)}'>"
    return f"<figure><div>{below}{above}</div><figcaption>{alt}</figcaption></figure>"


def _data_uri(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=88)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def _scale(most: float, language: str) -> str:
    """What the colours of `overlay` mean; `most`: even shares at the bright end."""
    colours = ", ".join(f"rgb({red:.0f} {green:.0f} {blue:.0f})" for red, green, blue in COLORS)
    bar = f"<i style='background: linear-gradient(to right, {colours})'></i>"
    more = text("more", language, times=f"{most:.0f}")
    return f"<div class='scale'>{text('less', language)}{bar}{more}</div>"


def _shares(looks: AttentionMaps, tokens: tuple[int, int], language: str) -> str:
    parts = []
    sums = shares(looks, tokens)
    several = len(sums["image"]) > 1
    for number, share in enumerate(sums["image"], 1):
        key = "figure_images" if several else "figure_image"
        parts.append(("image", text(key, language, number=number), share))
    parts.append(("text", text("share_text", language), sum(sums["text"])))
    parts.append(("answer", text("share_answer", language), sum(sums["answer"])))
    bar = "".join(
        f"<div class='of-{kind}' style='width: {share:.2%}' title='{html.escape(name)}'>"
        f"{f'{share:.0%}' if share > 0.06 else ''}</div>"
        for kind, name, share in parts
    )
    legend = "".join(
        f"<span><i class='of-{kind}'></i>{html.escape(name)} {share:.0%}</span>"
        for kind, name, share in parts
    )
    title = html.escape(text("shares", language))
    body = f"<div class='shares'>{bar}</div><div class='legend'>{legend}</div>"
    return f"<div><h4>{title}</h4>{body}</div>"
