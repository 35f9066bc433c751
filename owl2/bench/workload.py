"""What is asked of each implementation: prompts, images and training samples, at random.

Speed does not hang on what the words are, so they are random ids, and no tokenizer is needed. The
amounts are those of daily use: a question about an image, sixteen different requests, a batch of
conversations from short to long.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from owl2.constants import IGNORE_INDEX
from owl2.data.collate import collate
from owl2.data.packing import pack
from owl2.model.configuration import Owl2Config

BATCH = 8  # images, prompts and training samples in one batch
TEXT = 64  # text tokens beside an image
QUESTION = 20  # of them behind the image where a question is asked: "USER: …? ASSISTANT:"
NEW = 24  # tokens in a measurement of decoding
TOGETHER = 16  # requests that wait at the same time
FIRST_WORD = 3  # smaller ids are special
# Text tokens of the training samples, even on a logarithmic scale; every other has an image.
TRAINING_TEXT = (24, 34, 48, 68, 96, 136, 192, 256)


class Request(NamedTuple):
    """A prompt (1, S), its image (1, 3, H, W) if it has one, and tokens wanted."""

    ids: torch.Tensor
    pixel_values: torch.Tensor | None
    limit: int


@dataclass
class Workload:
    """Random inputs for a model of `config`; two with the same seed give the same, in order."""

    config: Owl2Config
    device: torch.device
    dtype: torch.dtype
    seed: int = 0
    chance: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        # On the CPU, so that every device gets the same.
        self.chance = torch.Generator().manual_seed(self.seed)

    def pixels(self, count: int = 1) -> torch.Tensor:
        """(count, 3, H, W)."""
        size = self.config.image_size
        pixels = torch.randn(count, 3, size, size, generator=self.chance)
        return pixels.to(self.device, self.dtype)

    def words(self, count: int) -> torch.Tensor:
        """(1, count)"""
        ids = torch.randint(FIRST_WORD, self.config.vocab_size, (1, count), generator=self.chance)
        return ids.to(self.device)

    def prompt(self, text: int = TEXT, behind: int = QUESTION) -> torch.Tensor:
        """A prompt (1, text + K + 1): an image with `behind` of the text tokens behind it."""
        return torch.cat([self.words(text - behind), self.places(), self.words(behind)], dim=1)

    def places(self) -> torch.Tensor:
        """(1, K + 1): the image tokens of an image."""
        return torch.full((1, self.config.num_image_tokens), self.config.image_token_id).to(
            self.device
        )

    def requests(self) -> list[Request]:
        """Requests of all lengths, some about an image, whose answers have 16 to 91 tokens."""
        mixed = []
        for number in range(TOGETHER):
            text, limit = 12 + 4 * (number * 7 % TOGETHER), 16 + 5 * (number * 5 % TOGETHER)
            if number % 4 == 0:
                mixed.append(Request(self.prompt(text, text // 2), self.pixels(), limit))
            else:
                mixed.append(Request(self.words(text), None, limit))
        return mixed

    def samples(self) -> list[dict[str, torch.Tensor]]:
        """Features of training samples, as a collator takes them; the last half is the answer."""
        samples = []
        for number, text in enumerate(TRAINING_TEXT):
            has_image = number % 2 == 0
            ids = self.prompt(text, text - 4) if has_image else self.words(text)
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


class Batches(NamedTuple):
    """The same samples padded, and packed into rows."""

    padded: dict[str, torch.Tensor]
    packed: dict[str, torch.Tensor]
    lengths: list[int]
    labels: int
    images: int

    @classmethod
    def of(cls, workload: Workload) -> "Batches":
        samples = workload.samples()
        padded = collate(samples, pad_token_id=0)
        packed = {key: value.to(workload.device) for key, value in pack(samples, 0).items()}
        return cls(
            padded,
            packed,
            [sample["input_ids"].shape[1] for sample in samples],
            int((padded["labels"] != IGNORE_INDEX).sum()),
            len(padded["pixel_values"]),
        )
