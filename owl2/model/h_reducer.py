"""H-Reducer of DocOwl1.5: neighboring patches in a row to one embedding (Model family §8.2).

Shapes: N crops, P = h · w patches in h rows and w columns, c columns per embedding, D width, L
width of the language model.

    features (N, 1+P, D) ──► map (N, D, h, w) ──► mixed (N, D, h, w) ──► reduced (N, D, h, w/c)
    ──► visual_fc (N, h·w/c, L) ──► + vit_eos (N, h·w/c + 1, L)
"""

import torch
from torch import nn
from transformers import initialization as init

from owl2.model.docowl_configuration import DocOwlVisualConfig


class UnusedLayerNorm(nn.Module):
    """Weights of a norm that released checkpoints contain and that no computation uses."""

    def __init__(self, width: int) -> None:
        super().__init__()
        # Buffers, because a process group waits for the gradients of all parameters.
        self.register_buffer("weight", torch.ones(width))
        self.register_buffer("bias", torch.zeros(width))


class HReducer(nn.Module):
    """Features of a crop (N, 1+P, D), CLS first, to embeddings (N, h·w/c + 1, L)."""

    def __init__(self, config: DocOwlVisualConfig, language_width: int) -> None:
        super().__init__()
        self.config = config
        width, columns = config.visual_hreducer.hidden_size, config.visual_hreducer.columns
        shape = (1, columns)
        self.ln_q = UnusedLayerNorm(width)
        self.reducer_before = nn.Sequential(
            nn.Conv2d(width, columns * width, shape, stride=shape), nn.GELU()
        )
        self.reducer = nn.Conv2d(width, width, shape, stride=shape)
        self.visual_fc = nn.Linear(width, language_width)
        self.vit_eos = nn.Parameter(torch.empty(1, 1, language_width))

    def init_parameters(self, std: float) -> None:
        """Initialize the parameters that belong to no layer of torch."""
        init.normal_(self.vit_eos, std=std)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        reduced = self.reduce(features).flatten(1, 2)  # (N, h·w/c, L)
        return torch.cat([reduced, self.vit_eos.expand(len(reduced), -1, -1)], dim=1)

    def reduce(self, features: torch.Tensor) -> torch.Tensor:
        """Embeddings of a crop as a map (N, h, w/c, L), without the end token."""
        grid, columns = self.config.visual_model.grid_size, self.config.visual_hreducer.columns
        patches = features[:, 1:].transpose(1, 2).unflatten(2, (grid, grid))  # (N, D, h, w)
        mixed = self.reducer_before(patches)  # (N, c·D, h, w/c)
        # The c groups of channels are the columns of the mixed map.
        mixed = mixed.unflatten(1, (columns, -1)).permute(0, 2, 3, 4, 1).flatten(3)
        reduced = self.reducer(mixed)  # (N, D, h, w/c)
        # Linear layers of bitsandbytes accept at most three dimensions.
        rows = self.visual_fc(reduced.flatten(2).transpose(1, 2))  # (N, h·w/c, L)
        return rows.unflatten(1, reduced.shape[2:])

    def set_grid_size(self, grid_size: int) -> None:
        """Nothing to compute; checks that the new grid can be reduced."""
        vision = self.config.visual_model
        self.config.set_image_size(grid_size * vision.patch_size)
