"""The embeddings of the images of prompts.

::

    images of chunks ──without cached ones, equal ones once──► batches (N, 3, H, W)
    ──vision encoder, abstractor──► embeddings (K+1, D) of each image

Shapes: N images or crops, K+1 embeddings per image, D width.
"""

from collections.abc import Sequence
from typing import Any

import torch

from owl2.engine.backends.cpu_products import cpu_products
from owl2.engine.lora import LoraManager
from owl2.engine.prefix_cache import TensorCache
from owl2.engine.prompt_state import PromptChunk, PromptState
from owl2.model.modeling import Owl2ForConditionalGeneration

MAX_BATCH_SIZE = 16  # images or crops; with 32, each takes longer on a CPU (docs/log.md)

Crops = tuple[torch.Tensor, torch.Tensor | None]  # see `PreparedPrompt.crops_of`


class ImageEncoder:
    """Encodes the images that prompts need next, and caches their embeddings.

    Args:
        cache_bytes: The limit of the cache; 0 disables it.

    Attributes:
        cache: Embeddings by `PromptState.image_keys`.
        num_encoded: Images that passed through the vision encoder.
    """

    def __init__(
        self, model: Owl2ForConditionalGeneration, adapters: LoraManager, cache_bytes: int
    ) -> None:
        self.cache: TensorCache[bytes] = TensorCache(cache_bytes)
        self.num_encoded = 0
        self._model = model
        self._adapters = adapters

    @torch.no_grad()
    def encode(self, chunks: Sequence[PromptChunk]) -> None:
        """Set `PromptState.image_embeddings` of the images of chunks."""
        missing: dict[str | None, dict[bytes, Crops]] = {}  # by adapter
        needed: list[tuple[PromptState, int, bytes]] = []
        for prompt, _, images in chunks:
            for index in sorted(set(images) - prompt.image_embeddings.keys()):
                key = prompt.image_keys[index]
                if (cached := self.cache.get(key)) is not None:
                    prompt.image_embeddings[index] = cached[0]
                else:
                    needed.append((prompt, index, key))
                    own = missing.setdefault(prompt.prepared.adapter, {})
                    own[key] = prompt.prepared.crops_of(index)
        encoded: dict[bytes, torch.Tensor] = {}
        for adapter, crops in missing.items():
            with self._adapters.use(adapter):
                encoded |= self._encode(crops)
        for prompt, index, key in needed:
            prompt.image_embeddings[index] = encoded[key]

    def _encode(self, missing: dict[bytes, Crops]) -> dict[bytes, torch.Tensor]:
        """The embeddings (K+1, D) of images by key, which are added to the cache."""
        encoded: dict[bytes, torch.Tensor] = {}
        # Crops of one image are not split.
        most = max(len(pixels) for pixels, _ in missing.values())
        size = max(1, MAX_BATCH_SIZE // most)
        for start in range(0, len(missing), size):
            batch = list(missing)[start : start + size]
            pixels = torch.cat([missing[key][0] for key in batch])
            pixels = pixels.to(self._model.device, self._model.dtype)
            grids = [grid for key in batch if (grid := missing[key][1]) is not None]
            described = torch.cat(grids) if grids else None
            with cpu_products(pixels):
                features: Any = self._model.get_image_features(pixels, described).pooler_output
            self.num_encoded += len(batch)
            for key, own in zip(batch, features, strict=True):
                encoded[key] = own
                if self.cache.limit:
                    self.cache.add(key, [own.clone()])
        return encoded
