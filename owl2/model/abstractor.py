"""Visual abstractor: patch features to K + 1 embeddings of the language model.

Specification §1.2. Shapes: N images, P patches, K learnable queries, D width, h heads, d = D / h,
L width of the language model.

    features I (N, 1+P, D) ─┐
    queries  V (N,  K,  D) ─┴► layers: V attends to [V; I] ──► visual_fc (N, K, L) ──► + vit_eos
                                                                                 (N, K+1, L)
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

from owl2.model.configuration import Owl2AbstractorConfig
from owl2.model.vision import LayerStack, maskless_attention


def sincos_1d(positions: torch.Tensor, width: int) -> torch.Tensor:
    """The embedding [sin(p·ω), cos(p·ω)] with ω_j = 1 / 10000^(j / (width/2)).

    Specification §1.2.

    Args:
        positions: (n,).
        width: Width of the embedding, even.

    Returns:
        (n, width) in float32, computed in float64.
    """
    half = width // 2
    exponents = torch.arange(half, dtype=torch.float64) / half
    omega = 1.0 / 10000**exponents
    angles = positions.to(torch.float64)[:, None] * omega  # (n, width / 2)
    return torch.cat([angles.sin(), angles.cos()], dim=1).float()


def sincos_2d(grid_size: int, width: int) -> torch.Tensor:
    """Position embeddings of CLS (zeros) and a square patch grid.

    The first half of an embedding encodes the column, the second half the row.

    Returns:
        (1 + grid_size², width), float32; patches in reading order.
    """
    axis = torch.arange(grid_size)
    rows, columns = torch.meshgrid(axis, axis, indexing="ij")
    halves = [sincos_1d(index.flatten(), width // 2) for index in (columns, rows)]
    return torch.cat([torch.zeros(1, width), torch.cat(halves, dim=1)])


class AbstractorAttention(nn.Module):
    """Attention of the queries to themselves and to the image.

    Position embeddings are added to queries and keys before the projections, and not to values.
    They are computed, but released checkpoints contain them, so they are persistent buffers.
    """

    is_causal = False
    num_key_value_groups = 1  # read by transformers' attention functions

    def __init__(self, config: Owl2AbstractorConfig) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.scaling = (width // self.num_heads) ** -0.5
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(config.encoder_hidden_size, width)
        self.value = nn.Linear(config.encoder_hidden_size, width)
        self.q_pos_embed: torch.Tensor
        self.k_pos_embed: torch.Tensor
        device, dtype = torch.get_default_device(), torch.get_default_dtype()
        embeddings = self.position_embeddings()
        for name, values in zip(("q_pos_embed", "k_pos_embed"), embeddings, strict=True):
            self.register_buffer(name, values.to(device, dtype))

    def position_embeddings(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute (q_pos_embed, k_pos_embed)."""
        width, queries = self.config.hidden_size, self.config.num_learnable_queries
        with torch.device("cpu"):  # on the meta device, torch runs these operations in Python
            query_embeds = sincos_1d(torch.arange(queries), width)
            key_embeds = sincos_2d(self.config.grid_size, width)
        return query_embeds, key_embeds if self.config.use_cls_token else key_embeds[1:]

    def init_parameters(self, std: float = 0.0) -> None:
        """Set the position embeddings, which are computed."""
        query_embeds, key_embeds = self.position_embeddings()
        init.copy_(self.q_pos_embed, query_embeds)
        init.copy_(self.k_pos_embed, key_embeds)

    def forward(self, queries: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """Queries (N, K, D) and features (N, 1+P, D), both normalized, to (N, K, D)."""
        tokens = torch.cat([queries, features], dim=1)  # (N, K+1+P, D)
        positions = torch.cat([self.q_pos_embed, self.k_pos_embed])  # (K+1+P, D)
        # FSDP2 casts weights to bfloat16, but not buffers.
        query = self._heads(self.query((queries + self.q_pos_embed).to(queries)))
        key = self._heads(self.key((tokens + positions).to(tokens)))
        value = self._heads(self.value(tokens))
        dropout = self.config.attention_probs_dropout_prob
        return maskless_attention(self, query, key, value, dropout)[0]

    def _heads(self, states: torch.Tensor) -> torch.Tensor:
        return states.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (N, h, n, d)


class AbstractorMLP(nn.Module):
    """SwiGLU with an inner norm: ``w2(ffn_ln(silu(w1 x) * w3 x))``."""

    def __init__(self, config: Owl2AbstractorConfig) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.w1 = nn.Linear(width, inner)
        self.w2 = nn.Linear(inner, width)
        self.w3 = nn.Linear(width, inner)
        self.ffn_ln = nn.LayerNorm(inner, eps=config.layer_norm_eps)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.w2(self.ffn_ln(F.silu(self.w1(states)) * self.w3(states)))


class AbstractorOutput(nn.Module):
    """Output projection and MLP after the attention, each with a residual connection."""

    def __init__(self, config: Owl2AbstractorConfig) -> None:
        super().__init__()
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm2 = nn.LayerNorm(config.hidden_size)
        self.mlp = AbstractorMLP(config)

    def forward(self, attended: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        states = residual + self.out_proj(attended)
        return states + self.mlp(self.norm2(states))


class AbstractorCrossAttention(nn.Module):
    """One layer. norm1, normk and norm2 have PyTorch's default eps (1e-5)."""

    def __init__(self, config: Owl2AbstractorConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size)
        self.normk = nn.LayerNorm(config.encoder_hidden_size)
        self.attention = AbstractorAttention(config)
        self.output = AbstractorOutput(config)

    def forward(self, queries: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        # The residual starts from the normalized queries, as in the released model.
        queries = self.norm1(queries)
        return self.output(self.attention(queries, self.normk(features)), queries)


class AbstractorLayer(GradientCheckpointingLayer):
    def __init__(self, config: Owl2AbstractorConfig) -> None:
        super().__init__()
        self.crossattention = AbstractorCrossAttention(config)

    def forward(self, queries: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        return self.crossattention(queries, features)


class VisualAbstractor(nn.Module):
    """Image features (N, 1+P, D) to K + 1 embeddings per image (N, K+1, L)."""

    def __init__(self, config: Owl2AbstractorConfig, language_width: int) -> None:
        super().__init__()
        self.config = config
        self.query_embeds = nn.Parameter(
            torch.empty(1, config.num_learnable_queries, config.hidden_size)
        )
        self.encoder = LayerStack(AbstractorLayer(config) for _ in range(config.num_hidden_layers))
        self.visual_fc = nn.Linear(config.hidden_size, language_width)
        self.vit_eos = nn.Parameter(torch.empty(1, 1, language_width))

    def init_parameters(self, std: float) -> None:
        """Initialize the parameters that belong to no layer of torch."""
        init.normal_(self.query_embeds, std=std)
        init.normal_(self.vit_eos, std=std)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        queries = self.query_embeds.expand(features.shape[0], -1, -1)  # (N, K, D)
        embeddings = self.visual_fc(self.encoder(queries, features))  # (N, K, L)
        vit_eos = self.vit_eos.expand(features.shape[0], -1, -1)
        return torch.cat([embeddings, vit_eos], dim=1)  # (N, K+1, L)

    @torch.no_grad()
    def set_grid_size(self, grid_size: int) -> None:
        """Change the patch grid and recompute the position embeddings."""
        self.config.grid_size = grid_size
        for module in self.modules():
            if isinstance(module, AbstractorAttention):
                _, key_embeds = module.position_embeddings()
                module.k_pos_embed = key_embeds.to(module.k_pos_embed)
