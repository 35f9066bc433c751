"""Attention weights, read beside a model that runs as it always does.

Fused attention (SDPA, flash) has no weights to give. So they are computed once more from what the
modules are given, for few queries and one layer at a time; the model itself is not changed, and
what other threads ask of it meanwhile is not recorded.

Shapes: S positions of keys, T queries (the last of them), h heads, d = head width, N images,
K learnable queries, P patches.
"""

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from owl2.model.modeling import Owl2ForConditionalGeneration


@contextmanager
def decoder_attention(
    model: Owl2ForConditionalGeneration, take: Callable[[int, torch.Tensor], None]
) -> Iterator[None]:
    """While it is open, forwards of this thread over a cache give `take` each layer's weights.

    Args:
        take: gets the layer's number and (h, T, S) float32, whose rows sum to one; T queries of
            one sequence, the last positions of the cache.
    """

    def record(module: Any, args: tuple, kwargs: dict[str, Any], _: Any) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]  # (1, T, D)
        heads = (*hidden.shape[:2], -1, module.head_dim)
        query = module.q_proj(hidden).view(heads).transpose(1, 2)  # (1, h, T, d)
        query, _ = apply_rotary_pos_emb(query, query, *kwargs["position_embeddings"])
        # The cache has this forward's keys by now, turned to their positions.
        key = kwargs["past_key_values"].layers[module.layer_idx].keys[0]  # (key-value heads, S, d)
        key = key.repeat_interleave(module.num_key_value_groups, dim=0)  # (h, S, d)
        take(module.layer_idx, _weights(query[0], key, module.scaling, is_causal=True))

    with _hooks(((layer.self_attn, record) for layer in model.model.layers), with_kwargs=True):
        yield


@contextmanager
def abstractor_attention(
    model: Owl2ForConditionalGeneration, take: Callable[[torch.Tensor], None]
) -> Iterator[None]:
    """While it is open, images that this thread encodes give `take` each abstractor layer's
    weights, in order.

    Args:
        take: gets (N, h, K, K+1+P) float32, whose rows sum to one: of each query over the queries
            and then the encoder's tokens, CLS first.
    """
    queries: list[torch.Tensor] = []

    def remember(_: nn.Module, __: tuple, output: torch.Tensor) -> None:
        queries.append(output)

    def compare_with(attention: Any) -> Callable[[nn.Module, tuple, torch.Tensor], None]:
        def compare(_: nn.Module, __: tuple, keys: torch.Tensor) -> None:
            query, key = (
                states.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
                for states in (queries.pop(), keys)
            )  # (N, h, K, d), (N, h, K+1+P, d)
            take(_weights(query, key, attention.scaling))

        return compare

    hooks = []
    for layer in model.model.visual_abstractor.encoder.layers:
        attention: Any = layer.crossattention.attention
        hooks += [(attention.query, remember), (attention.key, compare_with(attention))]
    with _hooks(hooks):
        yield


def _weights(
    query: torch.Tensor, key: torch.Tensor, scaling: float, is_causal: bool = False
) -> torch.Tensor:
    """(..., T, d) queries and (..., S, d) keys to (..., T, S) weights, in float32.

    Args:
        is_causal: the queries are the last positions, and see no later one.
    """
    scores = (query.float() * scaling) @ key.float().transpose(-1, -2)
    if is_causal:
        count, positions = scores.shape[-2:]
        later = torch.ones(count, positions, dtype=torch.bool, device=scores.device)
        scores.masked_fill_(later.triu(positions - count + 1), float("-inf"))
    return scores.softmax(-1)


@contextmanager
def _hooks(
    hooks: Iterable[tuple[nn.Module, Callable[..., None]]], with_kwargs: bool = False
) -> Iterator[None]:
    """Forward hooks that are called in this thread only, until the block ends."""
    own = threading.get_ident()

    def only_here(hook: Callable[..., None]) -> Callable[..., None]:
        def call(*given: Any) -> None:
            if threading.get_ident() == own:
                hook(*given)

        return call

    with ExitStack() as stack:
        for module, hook in hooks:
            handle = module.register_forward_hook(only_here(hook), with_kwargs=with_kwargs)
            stack.callback(handle.remove)
        yield
