"""Capture attention weights from a model that runs with fused attention.

Fused kernels (SDPA, flash attention) do not return weights. Forward hooks recompute them from the
inputs of the modules, for few queries and one layer at a time. The model is not modified, and
computations of other threads are not captured.

Shapes: L layers, h heads, d head width, P prompt tokens, T answer tokens, S = P + T - 1 keys,
N images, K learnable queries, V patches of an image.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from owl2.attention.tokenized_conversation import TokenizedConversation
from owl2.engine.running_batch import PrefillOutput
from owl2.model.modeling import Owl2ForConditionalGeneration
from owl2.model.qwen_decoder import QwenAttention


class CapturedAttention(NamedTuple):
    """The arrays of `AttentionMaps`, with the same names."""

    attention: np.ndarray
    mean: np.ndarray
    shares: np.ndarray
    patches: np.ndarray


@torch.no_grad()
def capture_attention(
    model: Owl2ForConditionalGeneration,
    conversation: TokenizedConversation,
    prefilled: PrefillOutput,
    layers: Sequence[int],
) -> CapturedAttention:
    """Recompute an answer over the cache of its prompt and capture the attention.

    Args:
        prefilled: The P positions of the prompt; not modified.
        layers: Indices of the layers whose weights are kept. The others are only averaged.
    """
    # The first answer token is predicted at the last prompt token, which is therefore repeated.
    ids = [conversation.prompt.ids[-1], *conversation.answer[:-1]]
    length = len(conversation.prompt.ids) - 1
    own_cache = DynamicCache(config=model.config)
    cached: Any = prefilled.cache.layers
    for index, layer in enumerate(cached):
        own_cache.update(layer.keys[:, :, :length], layer.values[:, :, :length], index)
    shape = (model.config.num_attention_heads, len(ids), length + len(ids))
    kept = torch.zeros(len(layers), *shape)
    total = torch.zeros(shape, device=model.device)
    shares: list[torch.Tensor] = []
    spans = conversation.spans

    def add(layer: int, weights: torch.Tensor) -> None:
        total.add_(weights)
        mean = weights.mean(0)  # (T, S)
        shares.append(torch.stack([mean[:, s.start : s.end].sum(1) for s in spans], 1).cpu())
        for row, kept_layer in enumerate(layers):
            if kept_layer == layer:
                kept[row] = weights

    with decoder_attention(model, add):
        model.model(
            input_ids=torch.tensor([ids], device=model.device),
            past_key_values=own_cache,
            **prefilled.options(model),
        )
    return CapturedAttention(
        kept.numpy(),
        (total / len(shares)).cpu().numpy(),
        torch.stack(shares).numpy(),
        _query_patches(model, conversation.prompt.pixel_values),
    )


def _query_patches(
    model: Owl2ForConditionalGeneration, pixel_values: torch.Tensor | None
) -> np.ndarray:
    """(N, K, 1+V): see `AttentionMaps.patches`."""
    if pixel_values is None:
        abstractor = model.config.visual_config.visual_abstractor
        shape = (0, abstractor.num_learnable_queries, 1 + abstractor.grid_size**2)
        return np.zeros(shape, np.float32)
    weights: list[torch.Tensor] = []
    with abstractor_attention(model, lambda layer: weights.append(layer.mean(1))):
        model.get_image_features(pixel_values.to(model.device, model.dtype))
    rollout = attention_rollout(weights)
    if not model.config.visual_config.visual_abstractor.use_cls_token:
        rollout = functional.pad(rollout, (1, 0))
    return rollout.cpu().numpy()


def attention_rollout(weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """The contribution of each encoder token to each of the K queries, through all layers.

    Attention rollout (Abnar and Zuidema 2020): a layer's output is one half its input, through the
    residual connection, and one half what it attends to. The queries start without image content.

    Args:
        weights: For each layer (N, K, K+1+V), over the queries and then the encoder tokens.

    Returns:
        (N, K, 1+V). Rows sum to less than one; the rest is the queries' own content.
    """
    queries = weights[0].shape[1]
    rollout = torch.zeros_like(weights[0][..., queries:])
    for layer in weights:
        attended = layer[..., :queries] @ rollout + layer[..., queries:]
        rollout = (rollout + attended) / 2
    return rollout


@contextmanager
def decoder_attention(
    model: Owl2ForConditionalGeneration, callback: Callable[[int, torch.Tensor], None]
) -> Iterator[None]:
    """Call `callback` for each layer of each forward with a cache that this thread runs.

    Args:
        callback: Receives the layer index and (h, T, S) float32, whose rows sum to one. The T
            queries are the last positions of one sequence.
    """

    def capture(module: Any, args: tuple, kwargs: dict[str, Any], _: Any) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]  # (1, T, D)
        if isinstance(module, QwenAttention):
            names = ("position_embeddings", "position_ids", "routing", "ntk_alphas")
            options: Any = {name: kwargs.get(name) for name in names}
            query, _, _ = module.project(hidden, **options)
        else:
            heads = (*hidden.shape[:2], -1, module.head_dim)
            query = module.q_proj(hidden).view(heads).transpose(1, 2)  # (1, h, T, d)
            query, _ = apply_rotary_pos_emb(query, query, *kwargs["position_embeddings"])
        # The cache already contains the keys of this forward, with rotary embeddings.
        key = kwargs["past_key_values"].layers[module.layer_idx].keys[0]  # (key-value heads, S, d)
        key = key.repeat_interleave(module.num_key_value_groups, dim=0)  # (h, S, d)
        callback(module.layer_idx, attention_weights(query[0], key, module.scaling, is_causal=True))

    layers: Any = model.model.layers
    attentions = (layer.attn if hasattr(layer, "attn") else layer.self_attn for layer in layers)
    with _hooks(attentions, capture):
        yield


@contextmanager
def abstractor_attention(
    model: Owl2ForConditionalGeneration, callback: Callable[[torch.Tensor], None]
) -> Iterator[None]:
    """Call `callback` for each abstractor layer when this thread encodes images.

    Args:
        callback: Receives (N, h, K, K+1+V) float32, whose rows sum to one: the weights of each
            query over the queries and then the encoder tokens, CLS first.
    """

    def capture(module: Any, args: tuple, _: dict[str, Any], __: Any) -> None:
        tokens = torch.cat(args, dim=1)  # (N, K+1+V, D): queries and features
        positions = torch.cat([module.q_pos_embed, module.k_pos_embed])
        tokens = (tokens + positions).to(tokens)
        query, key = (
            states.unflatten(-1, (module.num_heads, -1)).transpose(1, 2)
            for states in (module.query(tokens[:, : len(module.q_pos_embed)]), module.key(tokens))
        )  # (N, h, K, d), (N, h, K+1+V, d)
        callback(attention_weights(query, key, module.scaling))

    layers: Any = model.model.visual_abstractor.encoder.layers
    with _hooks((layer.crossattention.attention for layer in layers), capture):
        yield


def attention_weights(
    query: torch.Tensor, key: torch.Tensor, scaling: float, is_causal: bool = False
) -> torch.Tensor:
    """(..., T, d) queries and (..., S, d) keys to (..., T, S) weights in float32.

    Args:
        is_causal: The queries are the last T of the S positions and attend to no later one.
    """
    scores = (query.float() * scaling) @ key.float().transpose(-1, -2)
    if is_causal:
        count, positions = scores.shape[-2:]
        later = torch.ones(count, positions, dtype=torch.bool, device=scores.device)
        scores.masked_fill_(later.triu(positions - count + 1), float("-inf"))
    return scores.softmax(-1)


@contextmanager
def _hooks(modules: Iterable[nn.Module], hook: Callable[..., None]) -> Iterator[None]:
    """Register a forward hook that only runs in this thread, until the block ends."""
    owner = threading.get_ident()

    def in_this_thread(*args: Any) -> None:
        if threading.get_ident() == owner:
            hook(*args)

    with ExitStack() as stack:
        for module in modules:
            handle = module.register_forward_hook(in_this_thread, with_kwargs=True)
            stack.callback(handle.remove)
        yield
