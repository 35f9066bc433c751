"""The baseline: a straightforward implementation of mPLUG-Owl2 over the weights of a model.

Only the benchmark uses it. Each layer gathers the tokens of each modality and scatters the results;
attention is two matrix products with a float32 softmax and a full mask; the KV cache grows by
concatenation; requests are processed one by one; training pads and computes all logits.

Shapes: B sequences, S positions, T positions with those in the cache, D width, h heads, d = D / h;
N images, P patches, K queries, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from owl2.model.modality import Multiway
from owl2.model.modeling import Owl2ForConditionalGeneration

Cache = list[tuple[torch.Tensor, torch.Tensor]]  # a layer's keys and values, (B, h, T, d)


class Baseline:
    """Plain code over the parameters of `model`, which both share."""

    def __init__(self, model: Owl2ForConditionalGeneration) -> None:
        self.model = model
        self.config = model.config

    # Images

    def encode(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Images (N, 3, H, W) to embeddings (N, K+1, D)."""
        return self._abstract(self._encode_patches(pixel_values))

    def _encode_patches(self, pixel_values: torch.Tensor) -> torch.Tensor:
        vision: Any = self.model.model.vision_model
        first = vision.embeddings
        patches = F.conv2d(pixel_values, first.patch_embed.weight, stride=vision.config.patch_size)
        patches = patches.flatten(2).transpose(1, 2)  # (N, P, width)
        states = torch.cat([first.cls_token.expand(len(patches), -1, -1), patches], dim=1)
        states = layer_norm(states + first.position_embedding, first.pre_layernorm)
        for layer in vision.encoder.layers:
            states = states + self._vision_attention(
                layer_norm(states, layer.input_layernorm), layer.self_attn
            )
            inner = linear(layer_norm(states, layer.post_attention_layernorm), layer.mlp.fc1)
            states = states + linear(ACT2FN[vision.config.hidden_act](inner), layer.mlp.fc2)
        return layer_norm(states, vision.post_layernorm)  # (N, 1+P, width)

    def _vision_attention(self, states: torch.Tensor, module: Any) -> torch.Tensor:
        fused = linear(states, module.query_key_value)
        fused = fused.unflatten(-1, (module.num_heads, 3, -1)).permute(3, 0, 2, 1, 4)
        query, key, value = fused  # (N, h, 1+P, d) each
        return linear(attend(query, key, value, module.scaling), module.dense)

    def _abstract(self, features: torch.Tensor) -> torch.Tensor:
        abstractor: Any = self.model.model.visual_abstractor
        queries = abstractor.query_embeds.expand(len(features), -1, -1)
        for outer in abstractor.encoder.layers:
            layer = outer.crossattention
            queries = layer_norm(queries, layer.norm1)
            attended = self._cross_attention(
                queries, layer_norm(features, layer.normk), layer.attention
            )
            queries = queries + linear(attended, layer.output.out_proj)
            mlp, normed = layer.output.mlp, layer_norm(queries, layer.output.norm2)
            inner = F.silu(linear(normed, mlp.w1)) * linear(normed, mlp.w3)
            queries = queries + linear(layer_norm(inner, mlp.ffn_ln), mlp.w2)
        embeddings = linear(queries, abstractor.visual_fc)
        last = abstractor.vit_eos.expand(len(features), -1, -1)
        return torch.cat([embeddings, last], dim=1)

    def _cross_attention(
        self, queries: torch.Tensor, features: torch.Tensor, module: Any
    ) -> torch.Tensor:
        tokens = torch.cat([queries, features], dim=1)  # (N, K+1+P, width)
        codes = torch.cat([module.q_pos_embed, module.k_pos_embed])
        query = linear((queries + module.q_pos_embed).to(queries), module.query)
        key = linear((tokens + codes).to(tokens), module.key)
        value = linear(tokens, module.value)
        query, key, value = (
            states.unflatten(-1, (module.num_heads, -1)).transpose(1, 2)
            for states in (query, key, value)
        )
        return attend(query, key, value, module.scaling)

    # Text

    def forward(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
    ) -> tuple[torch.Tensor, Cache]:
        """Logits (B, S, V) of all positions, and the updated cache.

        Args:
            input_ids: (B, S), with K + 1 image tokens for each of the images.
            pixel_values: (N, 3, H, W).
            attention_mask: (B, S), 0 for padding, which is on the right.
            cache: keys and values of the previous positions.
        """
        decoder = self.model.model
        is_image = input_ids == self.config.image_token_id
        states = F.embedding(input_ids.masked_fill(is_image, 0), decoder.embed_tokens.weight)
        if pixel_values is not None:
            states = states.clone()
            states[is_image] = self.encode(pixel_values).flatten(0, 1).to(states)
        before = cache[0][0].shape[2] if cache else 0
        positions = torch.arange(before, before + input_ids.shape[1], device=input_ids.device)
        rotary = decoder.rotary_emb(states, positions[None])
        mask = self._mask(input_ids, attention_mask, before, states.dtype)
        filled: Cache = []
        for number, layer in enumerate(decoder.layers):
            past = cache[number] if cache else None
            states, kept = self._layer(layer, states, is_image, rotary, mask, past)
            filled.append(kept)
        states = rms_norm(states, decoder.norm)
        return linear(states, self.model.lm_head), filled

    def _mask(
        self, ids: torch.Tensor, padding: torch.Tensor | None, before: int, dtype: torch.dtype
    ) -> torch.Tensor:
        """(B, 1, S, T): 0 for visible positions, else the minimum of `dtype`."""
        batch, length = ids.shape
        low = torch.finfo(dtype).min
        mask = torch.full((length, before + length), low, dtype=dtype, device=ids.device)
        mask = mask.triu(before + 1).expand(batch, 1, -1, -1)
        if padding is not None:
            mask = mask.masked_fill(padding[:, None, None] == 0, low)
        return mask

    def _layer(
        self,
        layer: Any,
        states: torch.Tensor,
        is_image: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        mask: torch.Tensor,
        past: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        attention = layer.self_attn
        normed = by_modality(rms_norm, states, is_image, layer.input_layernorm)
        query, key, value = (
            projected.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
            for projected in (
                linear(normed, attention.q_proj),
                by_modality(linear, normed, is_image, attention.k_proj),
                by_modality(linear, normed, is_image, attention.v_proj),
            )
        )
        query, key = rotate(query, *rotary), rotate(key, *rotary)
        if past is not None:
            key = torch.cat([past[0], key], dim=2)
            value = torch.cat([past[1], value], dim=2)
        groups = query.shape[1] // key.shape[1]
        attended = attend(
            query,
            key.repeat_interleave(groups, dim=1),
            value.repeat_interleave(groups, dim=1),
            attention.scaling,
            mask,
        )
        states = states + linear(attended, attention.o_proj)
        normed = by_modality(rms_norm, states, is_image, layer.post_attention_layernorm)
        mlp = layer.mlp
        inner = ACT2FN[self.config.hidden_act](linear(normed, mlp.gate_proj))
        states = states + linear(inner * linear(normed, mlp.up_proj), mlp.down_proj)
        return states, (key, value)

    # Generation and training

    @torch.no_grad()
    def prefill(
        self, ids: torch.Tensor, pixel_values: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, Cache]:
        """The most likely token (1, 1) after one prompt (1, S), and the cache."""
        logits, cache = self.forward(ids, pixel_values)
        return logits[:, -1:].argmax(-1), cache

    @torch.no_grad()
    def decode(self, token: torch.Tensor, cache: Cache, count: int) -> list[int]:
        """Greedy decoding of `count` tokens after `token` (1, 1)."""
        tokens = []
        for _ in range(count):
            logits, cache = self.forward(token, cache=cache)
            token = logits[:, -1:].argmax(-1)
            tokens.append(int(token))
        return tokens

    def generate(
        self, prompts: Sequence[tuple[torch.Tensor, torch.Tensor | None]], limits: Sequence[int]
    ) -> list[list[int]]:
        """Greedy answers of `limits` tokens, one request after the other."""
        answers = []
        for (ids, pixel_values), limit in zip(prompts, limits, strict=True):
            token, cache = self.prefill(ids, pixel_values)
            answers.append([int(token), *self.decode(token, cache, limit - 1)])
        return answers

    def loss(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **_: Any,
    ) -> torch.Tensor:
        """Mean cross-entropy over the labels (B, S) of a batch padded on the right."""
        logits, _cache = self.forward(input_ids, pixel_values, attention_mask)
        predictions = logits.float()[:, :-1].flatten(0, 1)
        return F.cross_entropy(predictions, labels[:, 1:].flatten(), ignore_index=-100)


def by_modality(
    operation: Callable[[torch.Tensor, Any], torch.Tensor],
    states: torch.Tensor,
    is_image: torch.Tensor,
    module: nn.Module,
) -> torch.Tensor:
    """`operation` with the weights of the modality of each token: gather, compute, scatter."""
    if not isinstance(module, Multiway):
        return operation(states, module)
    result = None
    for way, chosen in zip(module.multiway, (~is_image, is_image), strict=True):
        where = chosen.nonzero(as_tuple=True)
        if not len(where[0]):
            continue
        part = operation(states[where], way)
        if result is None:
            result = part.new_empty(*states.shape[:2], part.shape[-1])
        result[where] = part
    assert result is not None  # a sequence has at least one token
    return result


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Softmax in float32 over all pairs, (B, h, S, d) each → (B, S, h · d)."""
    scores = query @ key.transpose(-1, -2) * scaling
    if mask is not None:
        scores = scores + mask
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2).flatten(2)


def linear(states: torch.Tensor, module: Any) -> torch.Tensor:
    return F.linear(states, module.weight, module.bias)


def layer_norm(states: torch.Tensor, module: Any) -> torch.Tensor:
    return F.layer_norm(states, module.normalized_shape, module.weight, module.bias, module.eps)


def rms_norm(states: torch.Tensor, module: Any) -> torch.Tensor:
    wide = states.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + module.variance_epsilon)
    return module.weight * wide.to(states.dtype)


def rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding (Su et al., 2021) with pairs (j, j + d/2)."""
    first, second = states.chunk(2, dim=-1)
    rotated = torch.cat([-second, first], dim=-1)
    return states * cos[:, None] + rotated * sin[:, None]
