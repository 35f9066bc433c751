"""Samples → what the model takes.

::

    TrainingSet[draw]: Sample ──augment its images──► processor.for_training ──► features, or Bad
    Collator: features of several samples ──leave out what is bad──► collate or pack ──► Collated

    features   input_ids, attention_mask, mm_token_type_ids, labels (1,S); pixel_values (N,3,H,W)
    batch      the same, (B,S) and (ΣN,3,H,W), S the longest; without images no pixel_values

A sample that cannot be used is left out of its batch, never replaced, and reported with it;
whether that stops the run is for whoever takes the batch. It keeps its place in the order of
samples, so every process has the same steps and none waits for another.
"""

from collections.abc import Iterator, Sequence
from random import Random
from typing import Any, Literal, NamedTuple

import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from owl2.constants import IGNORE_INDEX
from owl2.data.augment import AUGMENTATIONS, none
from owl2.data.mixture import Draw, Mixture
from owl2.data.packing import pack
from owl2.data.sample import Bad, Message, Sample
from owl2.errors import ErrorCode, InputError
from owl2.processing.chat_template import parse_messages
from owl2.processing.image_io import load_image
from owl2.processing.processor import Owl2Processor
from owl2.registry import look_up

Features = dict[str, Any]
Side = Literal["left", "right"]
Layout = Literal["padded", "packed", "one row"]

_TOKENWISE = ("input_ids", "attention_mask", "mm_token_type_ids", "labels")


class TrainingSet(Dataset[Features | Bad]):
    """Draws of a mixture → features; what a DataLoader's workers do.

    `augment` is a name of `AUGMENTATIONS`. Its chance depends on `seed`, the epoch and the draw
    only, not on which worker does the work. `max_length`: see `Owl2Processor.for_training`.

    What cannot be used comes out as a `Bad`: a row that is no sample, an image that cannot be
    read, a count of images that does not fit, an image beyond `max_length`, no answer before it.
    """

    def __init__(
        self,
        mixture: Mixture,
        processor: Owl2Processor,
        *,
        augment: str = "none",
        max_length: int | None = None,
        seed: int = 0,
    ) -> None:
        self.mixture = mixture
        self.processor = processor
        self.augment = look_up("augmentation", augment, AUGMENTATIONS)
        self.max_length = max_length
        self.seed = seed

    def __getitem__(self, draw: Draw) -> Features | Bad:
        try:
            sample = self.mixture[draw]
        except InputError as error:
            return Bad.row(error)
        if isinstance(sample, Bad):
            return sample
        chance = Random(f"{self.seed}/{draw.epoch}/{draw.source}/{draw.turn}")
        try:
            return self._features(sample, chance)
        except InputError as error:
            return Bad.of(sample.source, error)

    def _features(self, sample: Sample, chance: Random) -> Features:
        messages = sample.messages
        if self.augment is not none:
            messages = self._augmented(messages, chance)
        return features_of(messages, self.processor, self.max_length)

    def _augmented(self, messages: Sequence[Message], chance: Random) -> list[Message]:
        """The messages with their images opened and changed."""
        max_pixels = self.processor.image_processor.max_pixels
        changed = (
            {"type": "image", "image": self.augment(load_image(source, max_pixels), chance)}
            for source in parse_messages(messages).images
        )
        return [message | {"content": _with(message["content"], changed)} for message in messages]


def features_of(
    messages: Sequence[Message], processor: Owl2Processor, max_length: int | None
) -> Features:
    """A conversation → its features.

    Raises:
        InputError: see `Owl2Processor.for_training`; also where cutting leaves nothing to learn.
    """
    features = dict(processor.for_training(messages, max_length))
    if not (features["labels"] != IGNORE_INDEX).any():
        raise InputError(
            f"nothing to learn is left of it after cutting it to {max_length} tokens: shorten what "
            "comes before the answer, or set a larger max_length",
            code=ErrorCode.NO_LABELS,
        )
    return features


def _with(content: Any, images: Iterator[Message]) -> Any:
    """The content of a message with its image parts replaced by the next of `images`."""
    if isinstance(content, str):
        return content
    return [part if part.get("type") == "text" else next(images) for part in content]


class Collated(NamedTuple):
    """A batch for the model, and of what it was made: so many samples, tokens, images."""

    batch: dict[str, torch.Tensor]
    samples: int
    tokens: int
    images: int
    left_out: list[Bad]


class Collator:
    """Features of a batch → the batch, without those that are bad.

    `layout`: a row a sample, padded; or the samples packed into few rows, or into one.
    """

    def __init__(self, processor: Owl2Processor, layout: Layout = "padded") -> None:
        self.pad_token_id = processor.tokenizer.pad_token_id or 0
        self.layout = layout
        self._nothing = _nothing(processor)

    def __call__(self, features: Sequence[Features | Bad]) -> Collated:
        """See `collate` and `pack`. Where nothing is left, no label is: the loss is 0."""
        good = [item for item in features if not isinstance(item, Bad)]
        laid_out = good or [self._nothing]
        if self.layout == "padded":
            batch = collate(laid_out, self.pad_token_id)
        else:
            batch = pack(laid_out, self.pad_token_id, one_row=self.layout == "one row")
        return Collated(
            batch,
            samples=len(good),
            tokens=sum(item["input_ids"].shape[1] for item in good),
            images=sum(len(item.get("pixel_values", ())) for item in good),
            left_out=[item for item in features if isinstance(item, Bad)],
        )


def _nothing(processor: Owl2Processor) -> Features:
    """A blank image and no label: all parts of the model compute, and none learns."""
    blank = Image.new("RGB", (1, 1))
    features = processor.for_training(
        [
            {"role": "user", "content": [{"type": "image", "image": blank}]},
            {"role": "assistant", "content": "-"},
        ]
    )
    return {**features, "labels": torch.full_like(features["labels"], IGNORE_INDEX)}


def collate(
    features: Sequence[Features], pad_token_id: int, side: Side = "right"
) -> dict[str, torch.Tensor]:
    """Features of B samples → a batch padded on `side` to the longest.

    Returns:
        `input_ids` (filled with `pad_token_id`), `attention_mask` (0), `mm_token_type_ids` (0) and
        `labels` (-100), all (B,S); `pixel_values` (N,3,H,W), the samples' in order, absent if
        there is no image.
    """
    fill = {"input_ids": pad_token_id, "labels": IGNORE_INDEX}
    batch = {
        key: pad_sequence(
            [item[key][0] for item in features],
            batch_first=True,
            padding_value=fill.get(key, 0),
            padding_side=side,
        )
        for key in _TOKENWISE
    }
    pixels = [item["pixel_values"] for item in features if "pixel_values" in item]
    return batch | ({"pixel_values": torch.cat(pixels)} if pixels else {})
