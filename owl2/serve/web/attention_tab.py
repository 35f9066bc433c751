"""The attention tab: heatmaps of the images for the words of the last answer.

The attention is collected once per answer. Another word only selects other rows of it.
"""

import asyncio
import base64
import html
import io
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import quote

import gradio as gr
from PIL import Image

from owl2.attention import AttentionMaps, answer_words, collect_attention, heat_map, overlay
from owl2.attention.heatmap import COLORS, MIN_SCALE, TokenRange
from owl2.engine.engine import Engine
from owl2.serve.admission import current_client
from owl2.serve.fair_slots import FairSlots
from owl2.serve.web.conversation import Conversation, Turn
from owl2.serve.web.i18n import show_error, show_info, text

EDGE = 512  # pixels of a square image; large enough for a smooth heatmap
ALL = -1  # the choice of the complete answer

LoadFiles = Callable[[Conversation, str], Awaitable[list[Any]]]


@dataclass(frozen=True)
class AnswerAttention:
    """The content of the tab for one answer.

    Attributes:
        maps: Reduced to the mean over layers and heads, to save memory in the server.
        squares: The images of all questions so far, as the model sees them.
        sources: URLs of the same images: of their files, or of the frames themselves.
        texts: The questions and answers that it belongs to.
    """

    maps: AttentionMaps
    squares: tuple[Image.Image, ...]
    sources: tuple[str, ...]
    texts: tuple[tuple[str, str], ...]

    @property
    def words(self) -> list[tuple[str, TokenRange]]:
        """The words of the answer, each with its tokens."""
        return answer_words(self.maps)


class AttentionTab:
    """The event handlers of the tab. One request at a time, because answers have priority.

    Clients take turns.

    Args:
        load_files: `ChatHandler.load_files`.
    """

    def __init__(self, engine: Engine, load_files: LoadFiles) -> None:
        self._engine = engine
        self._load_files = load_files
        self._slots = FairSlots(1)

    async def show(
        self, conversation: Conversation, shown: AnswerAttention | None, language: str
    ) -> tuple[AnswerAttention | None, Any, str]:
        """Collect the attention of the last answer, unless it is already shown.

        Waits for an answer that is being generated.

        Returns:
            The content of the tab, and the outputs of `describe`.
        """
        async with conversation.answering:
            turns = [turn for turn in conversation.turns if turn.answer.strip()]
        if not any(turn.files for turn in turns):
            if turns:
                show_info("error_no_image", language)
            return await self.clear(language)
        if shown is None or shown.texts != _texts(turns):
            try:
                async with self._slots.slot((current_client.get(),)):
                    media = await self._load_files(Conversation(turns), language)
                    shown = await asyncio.to_thread(self._collect, turns, media)
            except Exception as error:  # shown to the visitor; unexpected ones are logged
                show_error(error, language)
                return await self.clear(language)
        return shown, *describe(shown, ALL, language)

    async def clear(self, language: str) -> tuple[None, Any, str]:
        """The initial state of the tab."""
        return None, *describe(None, ALL, language)

    def _collect(self, turns: list[Turn], media: Sequence[Any]) -> AnswerAttention:
        maps = collect_attention(
            self._engine,
            self._engine.processor,
            Conversation(turns).messages(media),
            answer=turns[-1].answer.strip(),
            layers=[],
        )
        mean = maps.mean.mean(0, keepdims=True)  # (1, T, S)
        squares: list[Image.Image] = []
        sources: list[str] = []
        files = [file for turn in turns for file in (*turn.images, *turn.videos)]
        for file, found in zip(files, media, strict=True):
            frames = found if isinstance(found, list) else [found]
            resized = [frame.resize((EDGE, EDGE)) for frame in frames]
            squares += resized
            is_image = not isinstance(found, list)
            own = [f"gradio_api/file={quote(file)}"] if is_image else map(_data_uri, resized)
            sources += own
        maps = replace(maps, mean=mean, attention=mean[:0])
        return AnswerAttention(maps, tuple(squares), tuple(sources), _texts(turns))


def _texts(turns: Sequence[Turn]) -> tuple[tuple[str, str], ...]:
    return tuple((turn.question, turn.answer) for turn in turns)


def describe(shown: AnswerAttention | None, word: int | None, language: str) -> tuple[Any, str]:
    """The choices of words with `word` selected, and the output of `render`."""
    if shown is None:
        return gr.update(visible=False), render(None, ALL, language)
    choices = [(text("all_words", language), ALL)]
    choices += [(name, index) for index, (name, _) in enumerate(shown.words)]
    update = gr.update(choices=choices, value=word, visible=True)
    return update, render(shown, word, language)


def render(shown: AnswerAttention | None, word: int | None, language: str) -> str:
    """HTML: each image with its heatmap, and the distribution of the attention.

    Args:
        word: The index of a word of the answer, or `ALL`.
    """
    if shown is None:
        return html.escape(text("attention_help", language))
    tokens = (0, len(shown.maps.tokens))
    if word is not None and 0 <= word < len(shown.words):
        tokens = shown.words[word][1]
    # The heatmap is a square: stretch it to the image, or cut off the margins of the square.
    fit = "cover" if shown.maps.policy == "pad" else "fill"
    colors = ", ".join(f"rgb({red:.0f} {green:.0f} {blue:.0f})" for red, green, blue in COLORS)
    names = [text("image", language)]
    if len(shown.sources) > 1:
        names = [
            text("image_number", language, number=number + 1)
            for number in range(len(shown.sources))
        ]
    rows = []
    for index, (source, square) in enumerate(zip(shown.sources, shown.squares, strict=True)):
        heat = heat_map(shown.maps, tokens, index)
        uri = _data_uri(overlay(square, heat))
        high = text("scale_high", language, times=f"{max(float(heat.max()), MIN_SCALE):.0f}")
        rows.append(
            f"<div><div class='row'>{_figure(source, names[index])}"
            f"{_figure(source, text('heat_map', language), uri, fit)}</div>"
            f"<div class='scale'>{text('scale_low', language)}"
            f"<i style='background: linear-gradient(to right, {colors})'></i>{high}</div></div>"
        )
    images = f"<div class='pairs'>{''.join(rows)}</div>" if rows else ""
    bars = _render_shares(shown.maps, tokens, names, language)
    return f"<div class='attention'>{images}{bars}</div>"


def _data_uri(image: Image.Image) -> str:
    encoded = io.BytesIO()
    image.save(encoded, "JPEG", quality=88)
    return f"data:image/jpeg;base64,{base64.b64encode(encoded.getvalue()).decode()}"


def _figure(source: str, name: str, heat_map_uri: str = "", fit: str = "") -> str:
    """An image, optionally covered by its heatmap."""
    alt = html.escape(name)
    image = f"<img alt='{'' if heat_map_uri else alt}' src='{source}'>"
    if heat_map_uri:
        image += f"<img class='painted {fit}' alt='{alt}' src='{heat_map_uri}'>"
    return f"<figure><div>{image}</div><figcaption>{alt}</figcaption></figure>"


def attention_shares(maps: AttentionMaps, tokens: TokenRange) -> dict[str, list[float]]:
    """The distribution of the attention of some answer tokens; all values sum to one.

    Returns:
        For "text", "image" and "answer", the share of each span.
    """
    attention = maps.mean[:, slice(*tokens)].mean((0, 1))  # (S,)
    shares: dict[str, list[float]] = {"text": [], "image": [], "answer": []}
    for span in maps.spans:
        shares[span.kind].append(float(attention[span.start : span.end].sum()))
    return shares


def _render_shares(
    maps: AttentionMaps, tokens: TokenRange, names: Sequence[str], language: str
) -> str:
    shares = attention_shares(maps, tokens)
    entries = [("image", name, share) for name, share in zip(names, shares["image"], strict=True)]
    entries.append(("text", text("share_text", language), sum(shares["text"])))
    entries.append(("answer", text("share_answer", language), sum(shares["answer"])))
    bars = legend = ""
    for kind, name, share in entries:
        label, percent = html.escape(name), f"{share:.0%}"
        bars += (
            f"<div class='of-{kind}' style='width: {share:.2%}' title='{label}'>"
            f"{percent if share > 0.06 else ''}</div>"
        )
        legend += f"<span><i class='of-{kind}'></i>{label} {percent}</span>"
    return (
        f"<div><h2>{html.escape(text('shares', language))}</h2><div class='shares'>{bars}</div>"
        f"<div class='legend'>{legend}</div></div>"
    )
