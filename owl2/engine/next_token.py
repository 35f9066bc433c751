"""Logits of the next token of prompts, without generating it.

::

    prompts ──their common prefix, once──► keys and values of each layer (1, h, P, d)
            ──all other tokens, in one batch──► logits after each prompt's last token (B, V)

Keys and values of the batch exist for one layer at a time.

Shapes: B prompts, S tokens after the prefix of P tokens, N images, K+1 embeddings per image, D
width, V vocabulary, h key-value heads, d head width.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from owl2.engine.backends.cpu_products import cpu_products
from owl2.engine.prefix_cache import common_prefix_length
from owl2.engine.prompt_state import PromptState
from owl2.model.image_inputs import ntk_options
from owl2.model.modeling import Owl2ForConditionalGeneration


@torch.no_grad()
def next_token_logits(
    model: Owl2ForConditionalGeneration,
    prompts: Sequence[PromptState],
    images: torch.Tensor | None,
) -> torch.Tensor:
    """The logits after the last token of each prompt: (B, V) in float32.

    Args:
        prompts: Without cached prefixes.
        images: (N, K+1, D) embeddings of the images of all prompts, in order.
    """
    device, start = model.device, _shared_tokens(prompts)
    embeddings: list[torch.Tensor] = []
    for prompt in prompts:
        count = len(prompt.prepared.image_spans)
        ids = torch.tensor([prompt.prepared.ids], device=device)
        own = None if images is None or not count else images[:count]
        images = None if images is None else images[count:]
        embeddings.append(model.model.embed(ids, own)[0])
    options: dict[str, Any] = {"use_cache": False}
    if start:
        cache = DynamicCache(config=model.config)
        _forward(model, prompts[:1], embeddings, 0, start, past_key_values=cache, use_cache=True)
        computed: list[Any] = cache.layers
        prefix: list[Any] = [_PrefixLayer(layer.keys, layer.values) for layer in computed]
        options = {"past_key_values": Cache(layers=prefix), "use_cache": True}
    width = max(prompt.num_tokens for prompt in prompts) - start
    hidden = _forward(model, prompts, embeddings, start, width, **options)  # (B, S, D)
    last = torch.tensor([prompt.num_tokens - start - 1 for prompt in prompts], device=device)
    rows = torch.arange(len(prompts), device=device)
    logits: torch.Tensor = model.lm_head(hidden[rows, last]).float()
    return logits


def _forward(
    model: Owl2ForConditionalGeneration,
    prompts: Sequence[PromptState],
    embeddings: Sequence[torch.Tensor],
    start: int,
    width: int,
    **options: Any,
) -> torch.Tensor:
    """Hidden states (B, width, D) of the positions from `start` on.

    Padding is on the right, where causal attention hides it from the prompt.
    """
    device, image = model.device, model.config.image_token_id
    options |= ntk_options(model.config, [prompt.ntk_alpha for prompt in prompts], device)
    states = model.lm_head.weight.new_zeros(
        len(prompts), width, model.config.hidden_size, dtype=model.dtype
    )
    types = torch.zeros(len(prompts), width, dtype=torch.long, device=device)
    for row, prompt in enumerate(prompts):
        ids = torch.tensor(prompt.prepared.ids[start : start + width], device=device)
        states[row, : len(ids)] = embeddings[row][start : start + width]
        types[row, : len(ids)] = ids == image
    positions = torch.arange(start, start + width, device=device).expand(len(prompts), -1)
    with cpu_products(states):
        hidden: torch.Tensor = model.model(
            inputs_embeds=states, mm_token_type_ids=types, position_ids=positions, **options
        ).last_hidden_state
    return hidden


def _shared_tokens(prompts: Sequence[PromptState]) -> int:
    """The number of tokens at the start that all prompts share, without a part of an image."""
    first, *others = prompts
    shared = min((common_prefix_length(first.key, other.key) for other in others), default=0)
    return first.end_of_shared(min(shared, *(prompt.num_tokens - 1 for prompt in prompts)))


class _PrefixLayer(DynamicLayer):
    """Keys and values (1, h, P, d) that precede those of all rows; new ones are not kept."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().__init__()
        self.keys, self.values = self._prefix = keys, values
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append (B, h, S, d) each; returns (B, h, P + S, d)."""
        size = (len(key_states), -1, -1, -1)
        keys, values = self._prefix
        keys = torch.cat([keys.expand(size), key_states], dim=2)
        return keys, torch.cat([values.expand(size), value_states], dim=2)
