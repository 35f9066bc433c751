"""Collect the attention of the decoder while it generates an answer.

::

    messages ──Engine.chat──► answer, unless one is given
    prompt ──model (SDPA, with or without MAM)──► its cache
    answer tokens over that cache ──one forward, layer by layer──► weights (h, T, S)
    images ──abstractor, layer by layer──► the patches that each of the K queries consists of

Shapes: L layers, h heads, T answer tokens, S positions, N images, K learnable queries, V patches
of an image.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

from owl2.attention.capture import CapturedAttention, capture_attention
from owl2.attention.tokenized_conversation import Span, TokenizedConversation
from owl2.engine.engine import Engine
from owl2.engine.running_batch import PrefillOutput
from owl2.errors import ErrorCode, InputError
from owl2.model.modeling import Owl2ForConditionalGeneration
from owl2.processing.image_io import ImagePolicy, load_image
from owl2.processing.messages import Message, ParsedMessages, Video, parse_messages
from owl2.processing.prepared_prompt import PreparedPrompt, images_of
from owl2.processing.processor import Owl2Processor

MAX_NEW_TOKENS = 64  # longer answers do not fit into a figure


@dataclass(frozen=True)
class AttentionMaps:
    """The attention of an answer's tokens.

    Row t is the attention at the position that predicts token t. The S positions are those of the
    prompt and of the answer without its last token, to which nothing attends. A row sums to one
    and is 0 at later positions.

    Attributes:
        tokens: The texts of the T answer tokens, without the end token; joined, they are the
            answer. If a character takes several tokens, all but the last are empty.
        prompt_tokens: The texts of the prompt tokens; empty for an image's.
        spans: The kind of each position: text, one of the images (K + 1 positions) or answer.
            Together they cover the S positions in order.
        layers: Indices of the selected layers, from 0.
        attention: (selected layers, h, T, S) float32.
        mean: (h, T, S), the mean over all L layers.
        shares: (L, T, spans): the part of each row on each span, as a mean over the heads.
        patches: (N, K, 1+V): the contribution of each token of the vision encoder (CLS first) to
            each query, by `attention_rollout`. Rows sum to less than one; the rest is the query's
            own content. 0 for CLS if the encoder has none (mPLUG-Owl2.1).
        sizes: Width and height of each image in pixels.
        policy: The image policy that made the images square.
        use_mam: False if the images were computed with the text weights.
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
        """The text of the answer."""
        return "".join(self.tokens).strip()

    def for_layer(self, layer: int | None) -> np.ndarray:
        """(h, T, S) of a selected layer; None: the mean over all layers.

        Raises:
            InputError: The layer was not selected.
        """
        if layer is None:
            return self.mean
        if layer not in self.layers:
            raise InputError(
                f"Layer {layer} was not collected. Collected layers: {list(self.layers)}; select "
                "others with layers=[...].",
                ErrorCode.INVALID_VALUE,
            )
        return np.asarray(self.attention[self.layers.index(layer)])


def collect_attention(
    model: Engine | Owl2ForConditionalGeneration,
    processor: Owl2Processor,
    messages: Sequence[Message],
    *,
    answer: str | None = None,
    layers: Sequence[int] | None = None,
    use_mam: bool = True,
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> AttentionMaps:
    """Collect the attention of the decoder for the answer to a question.

    The model runs with its own attention implementation. Weights are computed for the answer
    tokens only, one layer at a time, which limits the memory.

    Args:
        model: An `Engine` continues to serve other requests.
        processor: The processor of the same checkpoint.
        messages: End with a question.
        answer: The answer to analyze. Default: the model's own greedy answer with MAM, so that a
            comparison with and without MAM uses the same tokens.
        layers: Indices of the layers to keep; negative ones count from the end. Default: the
            first, the middle and the last (0, 15 and 31 of 32, as in the paper).
        use_mam: False: use the text weights for images, as in the paper's ablation.
        max_new_tokens: Limits the generated answer.

    Raises:
        InputError: As `Engine.chat`; also an unknown layer, an empty answer, or ``use_mam=False``
            for a model without MAM.
    """
    engine = model if isinstance(model, Engine) else Engine(model, processor)
    require_attention_maps(engine.model)
    selected = resolve_layers(layers, engine.model.config.num_hidden_layers)
    if not use_mam and not engine.model.config.use_mam:
        raise InputError(
            "use_mam=False: this model has no modality-adaptive module.", ErrorCode.UNSUPPORTED
        )
    parsed = _open_images(parse_messages(messages), processor)
    encoded = engine.encode(parsed)
    if answer is None:
        answer = engine.chat(encoded, do_sample=False, max_new_tokens=max_new_tokens)
        if not answer:
            raise InputError("The model's answer is empty; pass `answer`.", ErrorCode.EMPTY_MESSAGE)
    pixel_values = encoded.pixel_values
    conversation = TokenizedConversation.encode(processor, messages, answer, pixel_values)
    prompt = conversation.prompt
    if len(prompt.ids) + len(conversation.answer) - 1 > engine.context_length:
        raise InputError(
            f"The prompt has {len(prompt.ids)} tokens and the answer {len(conversation.answer)}; "
            f"the context of the model is {engine.context_length}. Shorten the text, or use "
            "fewer turns or images.",
            ErrorCode.TOO_LONG,
        )

    def capture(prefilled: PrefillOutput) -> CapturedAttention:
        if not use_mam:
            cache = _prefill_without_mam(engine.model, prompt)
            prefilled = prefilled._replace(cache=cache)
        return capture_attention(engine.model, conversation, prefilled, selected)

    captured = engine.run_prefilled(prompt, capture)
    return AttentionMaps(
        tokens=conversation.answer_texts,
        prompt_tokens=conversation.prompt_texts,
        spans=conversation.spans,
        layers=selected,
        **captured._asdict(),
        sizes=tuple(image.size for image in images_of(parsed, processor.num_frames)),
        policy=processor.image_processor.image_policy,
        use_mam=use_mam and engine.model.config.use_mam,
    )


def _open_images(conversation: ParsedMessages, processor: Owl2Processor) -> ParsedMessages:
    """The conversation with decoded images and frames."""
    load = partial(load_image, max_pixels=processor.image_processor.max_pixels)
    frames = (video.frames(processor.num_frames) for video in conversation.videos)
    videos = tuple(Video([*map(load, own)]) for own in frames)
    return replace(conversation, images=tuple(map(load, conversation.images)), videos=videos)


def require_attention_maps(model: Owl2ForConditionalGeneration) -> None:
    """Raise an InputError for a model without the abstractor of mPLUG-Owl2."""
    abstractor: Any = model.model.visual_abstractor
    if not hasattr(abstractor, "encoder"):
        raise InputError(
            "Attention maps need the abstractor of mPLUG-Owl2; "
            f"{model.config.registry_key} has another connector.",
            ErrorCode.UNSUPPORTED,
        )


def resolve_layers(layers: Sequence[int] | None, count: int) -> tuple[int, ...]:
    """Indices from 0 of `count` layers. Default: the first, the middle and the last.

    Raises:
        InputError: An index out of range.
    """
    if layers is None:
        return tuple(sorted({0, (count - 1) // 2, count - 1}))
    for layer in layers:
        if not -count <= layer < count:
            raise InputError(
                f"Unknown layer {layer}: this model has layers 0 to {count - 1}.",
                ErrorCode.INVALID_VALUE,
            )
    return tuple(layer % count for layer in layers)


@torch.no_grad()
def _prefill_without_mam(
    model: Owl2ForConditionalGeneration, prompt: PreparedPrompt
) -> DynamicCache:
    """The cache of a prompt, computed with the text weights for all tokens."""
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
