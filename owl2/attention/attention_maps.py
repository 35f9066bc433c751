"""Where the decoder attends while it answers: `look` and what it gives.

::

    messages ──Engine.chat──► answer, or a given one
    prompt ──model (SDPA, with MAM or without)──► its cache
    answer's tokens over that cache ──one forward, layer by layer──► weights (h, T, S)
    images ──abstractor, layer by layer──► which patches each of the K queries is made of

Shapes: L layers, h heads, T tokens of the answer, S positions, N images, K learnable queries,
P patches an image.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import DynamicCache

from owl2.attention.record import Record, record
from owl2.attention.tokenized_dialogue import Script, Span
from owl2.engine.engine import Engine
from owl2.engine.prefill import PrefillOutput
from owl2.errors import InputError
from owl2.model.modeling import Owl2ForConditionalGeneration
from owl2.processing.chat_template import Message, parse_messages
from owl2.processing.image_io import load_image
from owl2.processing.image_processing import ImagePolicy
from owl2.processing.prepared_prompt import PreparedPrompt
from owl2.processing.processor import Owl2Processor

MAX_NEW_TOKENS = 64  # a figure with more rows than that shows nothing


@dataclass(frozen=True)
class Looks:
    """Where an answer's tokens came from. A row t is the attention of the position whose output is
    token t: what the model looked at when it chose that token. All rows sum to one.

    The S positions are the prompt's and the answer's but for its last token, which nothing has
    looked at yet; a row is 0 on what comes after it.

    Attributes:
        tokens: T texts of the answer's tokens, without its end; joined, they are the answer. Of a
            character that is several tokens, all but the last are empty.
        prompt_tokens: texts of the prompt's; an image's are empty.
        spans: which positions are text, an image's K + 1, or the answer's; in order, they cover S.
        layers: numbers of the chosen layers, from 0.
        attention: (chosen layers, h, T, S), float32.
        mean: (h, T, S), the mean over all L layers.
        shares: (L, T, spans): how much of each row lies on each span, mean over the heads.
        patches: (N, K, 1+P): of what is in an image's query, how much comes from each token of
            the vision encoder, CLS first (see `roll_out`); rows sum to less than one, the rest is
            the query's own.
        sizes: width and height in pixels of each image.
        policy: how they became squares.
        use_mam: False: with text weights for the images, too.
    """

    tokens: tuple[str, ...]
    prompt_tokens: tuple[str, ...]
    spans: tuple[Span, ...]
    layers: tuple[int, ...]
    attention: np.ndarray
    mean: np.ndarray
    shares: np.ndarray
    patches: np.ndarray
    sizes: tuple[tuple[int, int], ...]
    policy: ImagePolicy
    use_mam: bool

    @property
    def answer(self) -> str:
        """What was said."""
        return "".join(self.tokens).strip()

    def of_layer(self, layer: int | None) -> np.ndarray:
        """(h, T, S) of one of the chosen layers; None: the mean over all.

        Raises:
            InputError: the layer was not chosen.
        """
        if layer is None:
            return self.mean
        if layer not in self.layers:
            chosen = ", ".join(map(str, self.layers)) or "none"
            raise InputError(f"Layer {layer} was not kept; there are {chosen}: look with layers=.")
        weights: np.ndarray = self.attention[self.layers.index(layer)]
        return weights


def look(
    model: Engine | Owl2ForConditionalGeneration,
    processor: Owl2Processor,
    messages: Sequence[Message],
    *,
    answer: str | None = None,
    layers: Sequence[int] | None = None,
    use_mam: bool = True,
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> Looks:
    """Where the decoder looks while it answers a question.

    The model runs as always; weights are computed for the answer's tokens only, one layer at a
    time, so that there is room for them at any size.

    Args:
        model: an `Engine` goes on answering others meanwhile.
        processor: the same checkpoint's.
        messages: end with a question; images as everywhere.
        answer: to look at; default: the model's own, greedy, with MAM. So the same words are
            compared with MAM and without.
        layers: whose weights to keep, from 0, negative ones from the end; default: the first, the
            middle and the last, as in the paper (0, 15 and 31 of 32).
        use_mam: False: text weights for the images, too, as in the paper's ablation.
        max_new_tokens: of the model's own answer at most.

    Raises:
        InputError: as `Engine.chat`; also no such layer, an empty answer, no MAM to leave out.
    """
    engine = model if isinstance(model, Engine) else Engine(model, processor)
    chosen = _chosen(layers, engine.model.config.num_hidden_layers)
    if not use_mam and not engine.model.config.use_mam:
        raise InputError("This model has no MAM that could be left out.")
    messages, images = _opened(messages, processor)
    if answer is None:
        answer = engine.chat(messages, do_sample=False, max_new_tokens=max_new_tokens)
        if not answer:
            raise InputError("The model answers nothing, so there is nothing to look at: give one.")
    script = Script.of(processor, messages, answer)
    if len(script.prompt) + len(script.answer) - 1 > engine.context_length:
        raise InputError(
            f"Prompt and answer have {len(script.prompt)} and {len(script.answer)} tokens; the "
            f"model's context is {engine.context_length}. Use fewer words, turns or images."
        )
    pixels = processor.image_processor(images)["pixel_values"] if images else None
    prompt = PreparedPrompt.from_ids(
        script.prompt, pixels, processor.image_token_id, processor.num_image_tokens
    )

    def use(read: PrefillOutput) -> Record:
        cache = read.cache if use_mam else _read_without_mam(engine.model, prompt)
        return record(engine.model, script, cache, pixels, chosen)

    recorded = engine.run_prefilled(prompt, use)
    return Looks(
        tokens=script.answer_texts,
        prompt_tokens=script.prompt_texts,
        spans=script.spans,
        layers=chosen,
        attention=recorded.attention,
        mean=recorded.mean,
        shares=recorded.shares,
        patches=recorded.patches,
        sizes=tuple(image.size for image in images),
        policy=processor.image_processor.policy,
        use_mam=use_mam and engine.model.config.use_mam,
    )


def _chosen(layers: Sequence[int] | None, count: int) -> tuple[int, ...]:
    if layers is None:
        return tuple(sorted({0, (count - 1) // 2, count - 1}))
    for layer in layers:
        if not -count <= layer < count:
            raise InputError(f"There is no layer {layer}: this model's go from 0 to {count - 1}.")
    return tuple(layer % count for layer in layers)


def _opened(
    messages: Sequence[Message], processor: Owl2Processor
) -> tuple[list[Message], list[Image.Image]]:
    """The messages with their images opened, and these: what is behind a URL is fetched once."""
    conversation = parse_messages(messages)
    limit = processor.image_processor.max_pixels
    images = [load_image(source, limit) for source in conversation.images]
    rest = iter(images)

    def opened(part: dict[str, Any]) -> dict[str, Any]:
        return {**part, "image": next(rest, None)} if part["type"] == "image" else part

    return [
        {"role": turn["role"], "content": [opened(part) for part in turn["content"]]}
        for turn in conversation.turns
    ], images


@torch.no_grad()
def _read_without_mam(model: Owl2ForConditionalGeneration, prompt: PreparedPrompt) -> DynamicCache:
    """A prompt's cache, computed with the text weights for all its tokens."""
    ids = torch.tensor([prompt.ids], device=model.device)
    images: dict[str, Any] = {}
    if prompt.pixel_values is not None:
        images["pixel_values"] = prompt.pixel_values.to(model.device, model.dtype)
    cache = DynamicCache(config=model.config)
    model.model(
        input_ids=ids,
        mm_token_type_ids=torch.zeros_like(ids),
        past_key_values=cache,
        use_cache=True,
        **images,
    )
    return cache
