"""What is kept of an answer's attention: chosen layers whole, of all others sums.

Shapes: L layers, h heads, P tokens of the prompt, T of the answer, S = P + T - 1, N images, K
learnable queries.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

from owl2.attention.capture import abstractor_attention, decoder_attention
from owl2.attention.tokenized_dialogue import Script
from owl2.model.modeling import Owl2ForConditionalGeneration


@dataclass(frozen=True)
class Record:
    """The arrays of `Looks`, by the same names."""

    attention: np.ndarray
    mean: np.ndarray
    shares: np.ndarray
    patches: np.ndarray


@torch.no_grad()
def record(
    model: Owl2ForConditionalGeneration,
    script: Script,
    cache: DynamicCache,
    pixel_values: torch.Tensor | None,
    layers: Sequence[int],
) -> Record:
    """Read an answer once more, over the cache of its prompt, and keep where it looks.

    Args:
        cache: of P positions; left as it is.
        pixel_values: (N, 3, H, W) or None.
        layers: whose weights to keep.
    """
    count = len(script.answer)
    shape = (model.config.num_attention_heads, count, len(script.prompt) + count - 1)  # (h, T, S)
    kept = torch.zeros(len(layers), *shape)
    total = torch.zeros(shape, device=model.device)
    shares: list[torch.Tensor] = []

    def take(layer: int, weights: torch.Tensor) -> None:
        total.add_(weights)
        mean = weights.mean(0)  # (T, S)
        parts = [mean[:, span.start : span.end].sum(1) for span in script.spans]
        shares.append(torch.stack(parts, 1).cpu())
        for number, chosen in enumerate(layers):
            if chosen == layer:
                kept[number] = weights

    # The last token of the prompt is read again, as it is what the answer's first comes from.
    ids = [script.prompt[-1], *script.answer[:-1]]
    with decoder_attention(model, take):
        model.model(
            input_ids=torch.tensor([ids], device=model.device),
            past_key_values=_start(cache, len(script.prompt) - 1, model),
            use_cache=True,
        )
    return Record(
        kept.numpy(),
        (total / len(shares)).cpu().numpy(),
        torch.stack(shares).numpy(),
        _patches(model, pixel_values),
    )


def _start(cache: DynamicCache, length: int, model: Owl2ForConditionalGeneration) -> DynamicCache:
    """The first positions of a cache, as one that can be written into."""
    own = DynamicCache(config=model.config)
    layers: Any = cache.layers  # typed as of any kind
    for number, layer in enumerate(layers):
        own.update(layer.keys[:, :, :length], layer.values[:, :, :length], number)
    return own


def _patches(model: Owl2ForConditionalGeneration, pixel_values: torch.Tensor | None) -> np.ndarray:
    """(N, K, 1+P) of the images' patches, see `Looks`."""
    weights: list[torch.Tensor] = []
    if pixel_values is not None:
        with abstractor_attention(model, lambda own: weights.append(own.mean(1))):
            model.get_image_features(pixel_values.to(model.device, model.dtype))
        return roll_out(weights).cpu().numpy()
    visual = model.config.visual_config
    return np.zeros(
        (
            0,
            visual.visual_abstractor.num_learnable_queries,
            1 + visual.visual_abstractor.grid_size**2,
        ),
        np.float32,
    )


def roll_out(weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """How much of each of K queries comes from each token of the encoder, through all layers.

    As in attention rollout (Abnar and Zuidema 2020): a layer's output is half its input, by way of
    the residual, and half what it attends to. The queries begin with nothing of the image.

    Args:
        weights: of each layer (N, K, K+1+P), over the queries and then the encoder's tokens.

    Returns:
        (N, K, 1+P); rows sum to less than one, the rest is the queries' own.
    """
    queries = weights[0].shape[1]
    parts = torch.zeros_like(weights[0][..., queries:])
    for layer in weights:
        attended = layer[..., :queries] @ parts + layer[..., queries:]
        parts = (parts + attended) / 2
    return parts
