"""Random prompts, images and training samples.

Speed does not depend on the text, so token ids are random and no tokenizer is needed. The amounts
are typical: a question about an image, sixteen different requests, a batch of conversations from
short to long.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

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
    pixel_values: torch.Tensor | None
    limit: int


@dataclass
class Workload:
    """Random inputs for a model of `config`; the same seed gives the same sequence of inputs."""

    config: Owl2Config
    device: torch.device
    dtype: torch.dtype
    seed: int = 0
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        # On the CPU, so that every device gets the same inputs.
        self.generator = torch.Generator().manual_seed(self.seed)

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

    def image_ids(self) -> torch.Tensor:
        """The K + 1 image token ids of one image, (1, K + 1)."""
        ids = torch.full((1, self.config.num_image_tokens), self.config.image_token_id)
        return ids.to(self.device)

    def prompt(self, text: int = TEXT_TOKENS, after: int = QUESTION_TOKENS) -> torch.Tensor:
        """A prompt (1, text + K + 1) with an image before the last `after` text tokens."""
        return torch.cat(
            [self.text_ids(text - after), self.image_ids(), self.text_ids(after)], dim=1
        )

    def requests(self) -> list[BenchRequest]:
        """Requests of different lengths, every fourth with an image; 16 to 91 new tokens each."""
        requests = []
        for index in range(CONCURRENT):
            text = 12 + 4 * (index * 7 % CONCURRENT)
            limit = 16 + 5 * (index * 5 % CONCURRENT)
            if index % 4 == 0:
                requests.append(BenchRequest(self.prompt(text, text // 2), self.pixels(), limit))
            else:
                requests.append(BenchRequest(self.text_ids(text), None, limit))
        return requests

    def samples(self) -> list[dict[str, torch.Tensor]]:
        """Features of training samples for a collator; the second half of each is labeled."""
        samples = []
        for index, text in enumerate(TRAINING_TEXT_TOKENS):
            has_image = index % 2 == 0
            ids = self.prompt(text, text - 4) if has_image else self.text_ids(text)
            labels = ids.clone()
            labels[:, : ids.shape[1] - text // 2] = IGNORE_INDEX
            sample = {
                "input_ids": ids,
                "attention_mask": torch.ones_like(ids),
                "mm_token_type_ids": (ids == self.config.image_token_id).long(),
                "labels": labels,
            }
            samples.append(sample | ({"pixel_values": self.pixels()} if has_image else {}))
        return samples


class TrainingBatches(NamedTuple):
    """The same samples as a padded and as a packed batch."""

    padded: dict[str, torch.Tensor]
    packed: dict[str, torch.Tensor]
    lengths: list[int]
    labels: int
    images: int

    @classmethod
    def create(cls, workload: Workload) -> "TrainingBatches":
        """The batches of `workload.samples()`."""
        samples = workload.samples()
        padded = collate(samples, pad_token_id=0)
        packed = {key: value.to(workload.device) for key, value in pack(samples, 0).items()}
        lengths = [sample["input_ids"].shape[1] for sample in samples]
        labels = int((padded["labels"] != IGNORE_INDEX).sum())
        return cls(padded, packed, lengths, labels, len(padded["pixel_values"]))
