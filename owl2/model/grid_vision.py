"""Vision encoder of mPLUG-Owl2.1: a ViT without a class token (Model family §7.4).

Shapes: N images, C channels, H = W pixels, P patches per image, D width.

    pixel_values (N, C, H, W) ──► patches + interpolated positions ──► blocks (N, P, D)
"""

import torch
from torch import nn
from transformers import initialization as init

from owl2.model.owl2_1_configuration import Owl2_1VisionConfig
from owl2.model.vision import LayerStack, VisionLayer, check_pixels, interpolate_grid


class GridVisionEmbeddings(nn.Module):
    """Patch convolution without bias, position embeddings of a fixed grid, LayerNorm."""

    def __init__(self, config: Owl2_1VisionConfig) -> None:
        super().__init__()
        width, patch = config.hidden_size, config.patch_size
        self.image_size = config.image_size
        self.patch_embed = nn.Conv2d(config.num_channels, width, patch, stride=patch, bias=False)
        self.position_embedding = nn.Parameter(torch.empty(config.position_grid**2, width))
        self.pre_layernorm = nn.LayerNorm(width, eps=config.layer_norm_eps)

    def init_parameters(self, std: float) -> None:
        """Initialize the parameters that belong to no layer of torch."""
        init.normal_(self.position_embedding, std=std)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        check_pixels(pixel_values, self.patch_embed.in_channels, self.image_size)
        patches = self.patch_embed(pixel_values)  # (N, D, h, w)
        positions = interpolate_grid(self.position_embedding[None], patches.shape[-1])
        embeddings = patches.flatten(2).transpose(1, 2) + positions.to(patches)
        return self.pre_layernorm(embeddings)


class GridVisionModel(nn.Module):
    """``pixel_values`` (N, C, H, W) to features (N, P, D), without a final norm."""

    def __init__(self, config: Owl2_1VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = GridVisionEmbeddings(config)
        self.encoder = LayerStack(VisionLayer(config) for _ in range(config.num_hidden_layers))

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        pixel_values = pixel_values.to(self.embeddings.patch_embed.weight.dtype)
        return self.encoder(self.embeddings(pixel_values))

    def set_image_size(self, image_size: int) -> None:
        """Change the input resolution. The stored position embeddings do not change."""
        self.embeddings.image_size = self.config.image_size = image_size
