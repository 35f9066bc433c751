"""Initializes the patch embedding of an untrained model with the cosine transform of JPEG.

    python recipes/scoring/distortions/init_dct.py MODEL IMAGES

Distortions differ in the frequencies of an image, most of which have little energy. Each of the
64 components of a patch of 8 x 8 pixels becomes one frequency of its brightness, divided by its
standard deviation in IMAGES. Random filters mostly see the mean color of a patch, and training
starts much slower.
"""

import sys
from pathlib import Path

import numpy as np
import torch

from owl2 import Owl2ForConditionalGeneration, Owl2Processor

COUNT = 400  # images


def cosine_basis(size: int) -> np.ndarray:
    """The two-dimensional DCT-II, orthonormal: (size * size, size, size)."""
    at = np.arange(size)
    rows = np.cos(np.pi * (2 * at[None] + 1) * at[:, None] / (2 * size))
    rows *= np.where(at == 0, 1, 2**0.5)[:, None] / size**0.5
    return np.einsum("ux,vy->uvxy", rows, rows).reshape(-1, size, size)


def main(folder: Path, images: Path) -> None:
    """Change the checkpoint in `folder`."""
    model = Owl2ForConditionalGeneration.from_pretrained(folder)
    processor = Owl2Processor.from_pretrained(folder)
    weight = model.model.vision_model.embeddings.patch_embed.weight  # (D, 3, P, P)
    size = weight.shape[-1]
    if weight.shape[0] != size * size:
        sys.exit(f"The vision encoder must have {size * size} components.")
    files = sorted(images.glob("*.png"))[:COUNT]
    pixels = processor.image_processor([str(file) for file in files])["pixel_values"]
    brightness = pixels.mean(1)  # (N, H, W)
    patches = brightness.unfold(1, size, size).unfold(2, size, size).reshape(-1, size, size)
    basis = torch.from_numpy(cosine_basis(size)).float()
    spread = torch.einsum("kxy,nxy->nk", basis, patches).std(0)  # (D,)
    filters = basis / spread[:, None, None] / 3  # the brightness is the mean of three channels
    with torch.no_grad():
        weight.copy_(filters[:, None].expand_as(weight))
    model.save_pretrained(folder)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*map(Path, sys.argv[1:]))
