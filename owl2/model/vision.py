"""Vision encoder: pixels to patch features, a CLIP ViT in the released layout.

Specification §1.1. Shapes: N images, C channels, H = W pixels, P patches per image, D width,
h heads, d = D / h.

    pixel_values (N, C, H, W) ──► embeddings (N, 1+P, D) ──► blocks ──► post_layernorm (N, 1+P, D)
"""

from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from transformers import initialization as init
from transformers.activations import ACT2FN, QuickGELUActivation
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from owl2.errors import ErrorCode, InputError
from owl2.model.configuration import Owl2VisionConfig
from owl2.runtime import multiplies_in_float32

# Scores that `matmul_attention` computes at a time, or those of one head: 32 MB in bfloat16.
MATMUL_SCORES = 2**24


class VisionEmbeddings(nn.Module):
    """Patch convolution without bias, class token, learned position embeddings, LayerNorm."""

    def __init__(self, config: Owl2VisionConfig) -> None:
        super().__init__()
        width, patch = config.hidden_size, config.patch_size
        self.image_size = config.image_size
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.patch_embed = nn.Conv2d(config.num_channels, width, patch, stride=patch, bias=False)
        self.position_embedding = nn.Parameter(torch.empty(1, 1 + config.grid_size**2, width))
        self.pre_layernorm = nn.LayerNorm(width, eps=config.layer_norm_eps)

    def init_parameters(self, std: float) -> None:
        """Initialize the parameters that belong to no layer of torch."""
        init.normal_(self.cls_token, std=std)
        init.normal_(self.position_embedding, std=std)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        check_pixels(pixel_values, self.patch_embed.in_channels, self.image_size)
        patches = self.patch_embed(pixel_values).flatten(2).transpose(1, 2)  # (N, P, D)
        cls_token = self.cls_token.expand(patches.shape[0], -1, -1)
        embeddings = torch.cat([cls_token, patches], dim=1)  # (N, 1+P, D)
        return self.pre_layernorm(embeddings + self.position_embedding)


def check_pixels(pixel_values: torch.Tensor, channels: int, image_size: int) -> None:
    """Raise an InputError unless the pixels have the shape (N, channels, size, size)."""
    expected = (channels, image_size, image_size)
    if pixel_values.dim() != 4 or tuple(pixel_values.shape[1:]) != expected:
        raise InputError(
            f"pixel_values have the shape {tuple(pixel_values.shape)}, but this model requires "
            f"(N, {', '.join(map(str, expected))}): use the processor of this checkpoint, or "
            "load the model with image_size=...",
            ErrorCode.SHAPE_MISMATCH,
        )


class VisionAttention(nn.Module):
    """Self-attention over all tokens. The fused projection has the layout (h, 3, d)."""

    is_causal = False
    num_key_value_groups = 1  # read by transformers' attention functions

    def __init__(self, config: Owl2VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.num_heads = config.num_attention_heads
        self.scaling = (config.hidden_size // self.num_heads) ** -0.5
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        fused = self.query_key_value(hidden_states)  # (N, 1+P, 3D)
        fused = fused.unflatten(-1, (self.num_heads, 3, -1)).transpose(1, 2)  # (N, h, 1+P, 3, d)
        query, key, value = fused.unbind(3)
        dropout = self.config.attention_dropout
        attended, weights = maskless_attention(self, query, key, value, dropout)
        return self.dense(attended), weights


def maskless_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dropout: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention without a mask by the attention interface of transformers (eager, sdpa, flash ...).

    Args:
        module: Has ``config``, ``scaling``, ``is_causal`` and ``num_key_value_groups``.
        query: (N, h, Q, d); key, value: (N, h, M, d).
        dropout: Probability during training.

    Returns:
        (N, Q, h * d), and the weights (N, h, Q, M) if the implementation is eager.
    """
    config: Any = module.config
    scaling: Any = module.scaling
    if config._attn_implementation == "sdpa" and _matmul_is_faster(query):
        return matmul_attention(query, key, value, scaling), None
    interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
        config._attn_implementation, eager_attention_forward
    )
    options = {"dropout": dropout if module.training else 0.0, "scaling": scaling}
    attended, weights = interface(module, query, key, value, None, **options)
    return attended.flatten(2), weights


def _matmul_is_faster(query: torch.Tensor) -> bool:
    """Whether matrix products are faster than PyTorch's fused attention.

    On CPUs in bfloat16, fused attention takes 1.4 to 1.7 times as long with 577 to 4,097 keys
    (docs/log.md, 2026-11-30). An earlier measurement had up to 1.5 times with 257 keys, and equal
    times with 1,025 (2026-11-22).
    """
    on_cpu = query.device.type == "cpu" and query.dtype == torch.bfloat16
    return on_cpu and not torch.is_grad_enabled()


def matmul_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
) -> torch.Tensor:
    """Unmasked attention as batched matrix products; shapes as in `maskless_attention`."""
    images, heads = query.shape[:2]
    rows = max(1, MATMUL_SCORES // (query.shape[2] * key.shape[2]))
    queries, keys, values = (states.flatten(0, 1).split(rows) for states in (query, key, value))
    parts = zip(queries, keys, values, strict=True)  # (rows, ., d) each
    attended = torch.cat([_attend(*part, scaling) for part in parts])
    return attended.unflatten(0, (images, heads)).transpose(1, 2).flatten(2)


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
) -> torch.Tensor:
    # With beta=0 the first argument is ignored and never read.
    ignored = query.new_empty(1).expand(len(query), query.shape[1], key.shape[1])
    scores = torch.baddbmm(ignored, query, key.transpose(1, 2), beta=0, alpha=scaling)
    return torch.bmm(scores.softmax(-1), value)  # (rows, Q, d)


class VisionMLP(nn.Module):
    def __init__(self, config: Owl2VisionConfig) -> None:
        super().__init__()
        self.activation = ACT2FN[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = self.fc1(hidden_states)
        if torch.is_grad_enabled() or not isinstance(self.activation, QuickGELUActivation):
            return self.fc2(self.activation(hidden_states))
        # The same values with one temporary tensor instead of three: allocating them takes longer
        # on CPUs than computing them.
        gate = (1.702 * hidden_states).sigmoid_()
        return self.fc2(gate.mul_(hidden_states))


class VisionLayer(GradientCheckpointingLayer):
    """A pre-norm transformer block."""

    def __init__(self, config: Owl2VisionConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = VisionAttention(config)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = VisionMLP(config)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        attended, _ = self.self_attn(self.input_layernorm(hidden_states))
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class LayerStack(nn.Module):
    """`layers` one after another; further arguments are passed to each."""

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, hidden_states: torch.Tensor, *args: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            if multiplies_in_float32(hidden_states):
                hidden_states = _run_in_float32(layer, hidden_states, *args)
            else:
                hidden_states = layer(hidden_states, *args)
        return hidden_states


def _run_in_float32(layer: nn.Module, *args: torch.Tensor) -> torch.Tensor:
    """A layer with copies of its weights in float32; the result has the dtype of its input."""
    named = chain(layer.named_parameters(), layer.named_buffers())
    weights = {name: tensor.float() for name, tensor in named}
    result: torch.Tensor = functional_call(layer, weights, tuple(arg.float() for arg in args))
    return result.to(args[0].dtype)


class VisionModel(nn.Module):
    """Vision encoder: ``pixel_values`` (N, C, H, W) to features (N, 1+P, D), CLS first.

    The final norm is applied to all tokens, and the abstractor receives all of them.
    """

    def __init__(self, config: Owl2VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = VisionEmbeddings(config)
        self.encoder = LayerStack(VisionLayer(config) for _ in range(config.num_hidden_layers))
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        pixel_values = pixel_values.to(self.embeddings.patch_embed.weight.dtype)
        return self.post_layernorm(self.encoder(self.embeddings(pixel_values)))

    @torch.no_grad()
    def set_image_size(self, image_size: int) -> None:
        """Change the input resolution; position embeddings are resized bicubically."""
        grid = image_size // self.config.patch_size
        embeddings = self.embeddings
        embeddings.position_embedding = nn.Parameter(
            resize_positions(embeddings.position_embedding, grid),
            requires_grad=embeddings.position_embedding.requires_grad,
        )
        embeddings.image_size = self.config.image_size = image_size


def resize_positions(positions: torch.Tensor, grid_size: int) -> torch.Tensor:
    """Resize the position embeddings of a square grid bicubically (Specification §2).

    Args:
        positions: (1, 1 + n², D); the first is the class token's, which does not change.
        grid_size: Patches along the edge of the new grid, m.

    Returns:
        (1, 1 + m², D) in the dtype of `positions`; the interpolation uses float32.
    """
    cls_position, patches = positions[:, :1], positions[:, 1:]
    old = round(patches.shape[1] ** 0.5)
    if old == grid_size:
        return positions.clone()
    return torch.cat([cls_position, interpolate_grid(patches, grid_size)], dim=1)


def interpolate_grid(patches: torch.Tensor, grid_size: int) -> torch.Tensor:
    """Position embeddings of a square grid, (1, n², D) to (1, m², D); m is `grid_size`."""
    old = round(patches.shape[1] ** 0.5)
    if old == grid_size:
        return patches
    plane = patches.float().unflatten(1, (old, old)).permute(0, 3, 1, 2)  # (1, D, n, n)
    plane = F.interpolate(plane, size=(grid_size, grid_size), mode="bicubic", align_corners=False)
    return plane.flatten(2).transpose(1, 2).to(patches.dtype)  # (1, m², D)
