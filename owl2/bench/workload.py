"""Random prompts, images and training samples.

Speed does not depend on the text, so token ids are random and no tokenizer is needed. The amounts
are typical: a question about an image, sixteen different requests, a batch of conversations from
short to long.
"""

from typing import Any, NamedTuple

import torch

from owl2.constants import IGNORE_INDEX
from owl2.data.collate import collate
from owl2.data.packing import pack
from owl2.model.configuration import Owl2Config

BATCH_SIZE = 8  # images, prompts and training samples in a batch
TEXT_TOKENS = 64  # text tokens of a prompt with an image
QUESTION_TOKENS = 20  # of these after the image
NEW_TOKENS = 24  # decoded tokens per measurement
CONCURRENT = 16  # concurrent requests
FIRST_TEXT_ID = 3  # smaller ids are special tokens
# Text tokens of the training samples, on a logarithmic scale. Every other sample has an image.
TRAINING_TEXT_TOKENS = (24, 34, 48, 68, 96, 136, 192, 256)


class BenchRequest(NamedTuple):
    """A prompt (1, S), its image (1, 3, H, W) if any, and the number of tokens to generate."""

    ids: torch.Tensor
    pixel_values: torch.Tensor | None = None
    limit: int = NEW_TOKENS


class Workload:
    """Random inputs for a model of `config`, in the same sequence each time."""

    def __init__(self, config: Owl2Config, device: torch.device, dtype: torch.dtype) -> None:
        self.config, self.device, self.dtype = config, device, dtype
        # On the CPU, so that every device gets the same inputs.
        self.generator = torch.Generator().manual_seed(0)

    def pixels(self, count: int = 1) -> torch.Tensor:
        """Images (count, 3, H, W)."""
        size = self.config.image_size
        pixels = torch.randn(count, 3, size, size, generator=self.generator)
        return pixels.to(self.device, self.dtype)

    def text_ids(self, count: int) -> torch.Tensor:
        """Text token ids (1, count)."""
        vocab_size = self.config.vocab_size
        ids = torch.randint(FIRST_TEXT_ID, vocab_size, (1, count), generator=self.generator)
        return ids.to(self.device)

    def prompt_ids(
        self, text: int = TEXT_TOKENS, after: int = QUESTION_TOKENS, images: int = 1
    ) -> torch.Tensor:
        """A prompt (1, text + images · (K+1)) with images before the last `after` text tokens."""
        count = images * self.config.num_image_tokens
        image_ids = torch.full((1, count), self.config.image_token_id)
        before = self.text_ids(text - after)
        return torch.cat([before, image_ids.to(self.device), self.text_ids(after)], dim=1)

    def request(
        self,
        text: int = TEXT_TOKENS,
        after: int = QUESTION_TOKENS,
        has_image: bool = True,
        limit: int = NEW_TOKENS,
    ) -> BenchRequest:
        """A request with an image before the last `after` text tokens, or without an image."""
        if has_image:
            return BenchRequest(self.prompt_ids(text, after), self.pixels(), limit)
        return BenchRequest(self.text_ids(text), None, limit)

    def requests(self) -> list[BenchRequest]:
        """Requests of different lengths, every fourth with an image; 16 to 91 new tokens each."""
        requests = []
        for index in range(CONCURRENT):
            text = 12 + 4 * (index * 7 % CONCURRENT)
            limit = 16 + 5 * (index * 5 % CONCURRENT)
            requests.append(self.request(text, text // 2, index % 4 == 0, limit))
        return requests

    def training_batches(self) -> dict[str, dict[str, torch.Tensor]]:
        """The same samples as a `padded` and as a `packed` batch; the second half is labeled."""
        samples: list[dict[str, Any]] = []
        for index, text in enumerate(TRAINING_TEXT_TOKENS):
            ids, pixel_values, _ = self.request(text, text - 4, index % 2 == 0)
            labels = ids.clone()
            labels[:, : ids.shape[1] - text // 2] = IGNORE_INDEX
            sample = {
                "input_ids": ids,
                "attention_mask": torch.ones_like(ids),
                "mm_token_type_ids": (ids == self.config.image_token_id).long(),
                "labels": labels,
            }
            images = {} if pixel_values is None else {"pixel_values": pixel_values}
            samples.append(sample | images)
        packed = {key: value.to(self.device) for key, value in pack(samples, 0).items()}
        return {"padded": collate(samples, pad_token_id=0), "packed": packed}
