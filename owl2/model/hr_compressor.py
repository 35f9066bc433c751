"""Connector of DocOwl2: the crops of a page to the embeddings of one image (Model family §9).

Shapes: G pages with 1 + r · c crops each (the whole page, then the crops row by row), N crops in
all, h rows and w columns of embeddings in a crop, M = the largest r · c, L width.

    features (N, 1+P, D) ──► H-Reducer (N, h, w, L)
    whole pages ──► queries (G, h·w, L) ─┐ each attends to the r · c embeddings
    crops ──► windows (G, h·w, M, L) ────┴─► at its place ──► + compressor_eos (G, h·w + 1, L)
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

from owl2.errors import ErrorCode, InputError
from owl2.model.abstractor import AbstractorOutput
from owl2.model.docowl_configuration import DocOwlVisualConfig, HRCompressorConfig
from owl2.model.h_reducer import HReducer
from owl2.model.vision import LayerStack


class CompressorAttention(nn.Module):
    """Each query attends to the embeddings of its own window."""

    def __init__(self, config: HRCompressorConfig) -> None:
        super().__init__()
        self.num_heads = config.high_reso_cross_num_att_heads
        self.dropout = config.high_reso_cross_dropout
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self, queries: torch.Tensor, windows: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        """Queries (Q, 1, L), windows (Q, M, L) and a mask (Q, 1, 1, M) to (Q, 1, L)."""
        states = self.query(queries), self.key(windows), self.value(windows)
        query, key, value = (
            state.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for state in states
        )  # (Q, heads, 1 or M, L / heads)
        dropout = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(query, key, value, mask, dropout)
        return attended.transpose(1, 2).flatten(2)


class CompressorLayer(GradientCheckpointingLayer):
    """Cross-attention and MLP. The norms but the MLP's have PyTorch's default eps (1e-5)."""

    def __init__(self, config: HRCompressorConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size)
        self.normk = nn.LayerNorm(config.hidden_size)
        self.attention = CompressorAttention(config)
        sizes: Any = config  # has the sizes that the class reads
        self.output = AbstractorOutput(sizes)

    def forward(
        self, queries: torch.Tensor, windows: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        # The residual starts from the normalized queries, as in the abstractor.
        queries = self.norm1(queries)
        return self.output(self.attention(queries, self.normk(windows), mask), queries)


class HRCompressor(nn.Module):
    """Embeddings of all crops (N, h, w, L) to those of the pages (G, h·w + 1, L)."""

    def __init__(self, config: HRCompressorConfig, language_width: int) -> None:
        super().__init__()
        self.compressor_crossatt = LayerStack(CompressorLayer(config) for _ in range(config.layer))
        self.compressor_fc = nn.Linear(config.hidden_size, language_width)
        self.compressor_eos = nn.Parameter(torch.empty(1, 1, language_width))

    def init_parameters(self, std: float) -> None:
        """Initialize the parameters that belong to no layer of torch."""
        init.normal_(self.compressor_eos, std=std)

    def forward(self, crops: torch.Tensor, grids: list[tuple[int, int]]) -> torch.Tensor:
        """`grids`: rows r and columns c of each page."""
        pages = crops.split([1 + rows * columns for rows, columns in grids])
        most = max(rows * columns for rows, columns in grids)
        queries, windows, masks = [], [], []
        for page, (rows, columns) in zip(pages, grids, strict=True):
            own = crops_to_windows(page[1:], rows, columns)  # (h·w, r·c, L)
            missing = most - rows * columns
            windows.append(F.pad(own, (0, 0, 0, missing)))
            masks.append(F.pad(own.new_ones(len(own), rows * columns).bool(), (0, missing)))
            queries.append(page[0].flatten(0, 1))  # (h·w, L)
        # All pages together: processes that share weights use each of them equally often.
        mask = torch.cat(masks)[:, None, None]
        states = self.compressor_crossatt(torch.cat(queries)[:, None], torch.cat(windows), mask)
        embeddings = self.compressor_fc(states[:, 0]).unflatten(0, (len(grids), -1))
        return torch.cat([embeddings, self.compressor_eos.expand(len(grids), -1, -1)], dim=1)


def crops_to_windows(crops: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """The embeddings at each place of the whole page: crops (r·c, h, w, L) to (h·w, r·c, L).

    The crops form a map of r·h x c·w embeddings. A window of r x c of them corresponds to one
    embedding of the whole page.
    """
    _, height, width, _ = crops.shape
    page = crops.unflatten(0, (rows, columns)).transpose(1, 2)  # (r, h, c, w, L)
    page = page.reshape(height, rows, width, columns, -1)
    return page.transpose(1, 2).flatten(2, 3).flatten(0, 1)


class DocOwl2Connector(HReducer):
    """Features of the crops of pages (N, 1+P, D) to embeddings (G, h·w + 1, L)."""

    def __init__(self, config: DocOwlVisualConfig, language_width: int) -> None:
        super().__init__(config, language_width)
        self.hr_compressor = HRCompressor(config.visual_hrcompressor, language_width)
        # Released checkpoints contain it, and no computation uses it; see `UnusedLayerNorm`.
        del self.vit_eos
        self.register_buffer("vit_eos", torch.zeros(1, 1, language_width))

    def init_parameters(self, std: float) -> None:
        """Initialize the parameters that belong to no layer of torch: none."""
        init.zeros_(self.vit_eos)

    def forward(
        self, features: torch.Tensor, image_grids: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`image_grids`: (G, 2), rows and columns of the crops of each page."""
        grids = [] if image_grids is None else [(r, c) for r, c in image_grids.tolist()]
        if sum(1 + rows * columns for rows, columns in grids) != len(features):
            raise InputError(
                f"pixel_values contain {len(features)} crops, but image_grids describe pages with "
                f"{[1 + rows * columns for rows, columns in grids]}: pass both from the processor",
                ErrorCode.IMAGE_COUNT_MISMATCH,
            )
        return self.hr_compressor(self.reduce(features), grids)
