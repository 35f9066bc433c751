"""Samples → what the model takes.

::

    TrainingSet[i]: Sample ──augment its pictures──► processor.for_training ──► features
    Collator: features of several samples ──leave out what has no label──► collate ──► batch

    features   input_ids, attention_mask, mm_token_type_ids, labels (1,S); pixel_values (N,3,H,W)
    batch      the same, (B,S) and (ΣN,3,H,W), S the longest; without pictures no pixel_values

A sample of which cutting has left only the question teaches nothing. It is left out of its batch,
counted, and named in a warning. It keeps its place in the order of samples, so an epoch has the
same steps on every device, and no device waits for another.
"""

import logging
import multiprocessing
from collections.abc import Iterator, Sequence
from random import Random
from typing import Any, Literal

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from owl2.data.augment import AUGMENTATIONS, none
from owl2.data.mixture import Mixture
from owl2.data.names import look_up
from owl2.data.sample import Message
from owl2.errors import InputError
from owl2.processing.chat import read_messages
from owl2.processing.image import load_image
from owl2.processing.processor import IGNORED, Owl2Processor

logger = logging.getLogger(__name__)

Features = dict[str, Any]
Side = Literal["left", "right"]

_TOKENWISE = ("input_ids", "attention_mask", "mm_token_type_ids", "labels")


class TrainingSet(Dataset[Features]):
    """Samples → features, one sample an index; what a DataLoader's workers do.

    `augment` is a name of `AUGMENTATIONS`. Its chance depends on `seed`, the epoch and the index
    only, not on which worker does the work. `max_length`: see `Owl2Processor.for_training`.

    Indexing raises `InputError` that begins with the sample's `source`: a picture that cannot be
    read, a count of pictures that does not fit, a picture beyond `max_length`.
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

    def set_epoch(self, epoch: int) -> None:
        """Before each epoch's iteration begins: workers take the number along when they start."""
        self.mixture.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.mixture)

    def __getitem__(self, index: int) -> Features:
        sample = self.mixture[index]
        chance = Random(f"{self.seed}/{self.mixture.epoch}/{index}")
        try:
            messages = sample.messages
            if self.augment is not none:
                messages = self._augmented(messages, chance)
            features = dict(self.processor.for_training(messages, self.max_length))
        except InputError as error:
            raise InputError(f"{sample.source}: {error}") from error
        return features | {"source": sample.source}

    def _augmented(self, messages: Sequence[Message], chance: Random) -> list[Message]:
        """The messages with their pictures opened and changed."""
        max_pixels = self.processor.image_processor.max_pixels
        changed = (
            {"type": "image", "image": self.augment(load_image(source, max_pixels), chance)}
            for source in read_messages(messages).pictures
        )
        return [message | {"content": _with(message["content"], changed)} for message in messages]


def _with(content: Any, pictures: Iterator[Message]) -> Any:
    """The content of a message with its picture parts replaced by the next of `pictures`."""
    if isinstance(content, str):
        return content
    return [part if part.get("type") == "text" else next(pictures) for part in content]


class Collator:
    """Features of a batch → the batch, without samples that have no label; counts those.

    A DataLoader's workers and its owner share the count: `left_out` is over all of them.
    """

    def __init__(self, pad_token_id: int, side: Side = "right") -> None:
        self.pad_token_id = pad_token_id
        self.side = side
        self._left_out = multiprocessing.Value("q", 0)

    @property
    def left_out(self) -> int:
        """How many samples have been left out so far."""
        return self._left_out.value

    def __call__(self, features: Sequence[Features]) -> dict[str, torch.Tensor]:
        """See `collate`. Where nothing is left, one sample stays, with no label: its loss is 0."""
        labelled: list[Features] = []
        unlabelled: list[Features] = []
        for item in features:
            has_label = bool((item["labels"] != IGNORED).any())
            (labelled if has_label else unlabelled).append(item)
        if unlabelled:
            self._report(unlabelled)
        return collate(labelled or unlabelled[:1], self.pad_token_id, self.side)

    def _report(self, unlabelled: Sequence[Features]) -> None:
        with self._left_out.get_lock():
            self._left_out.value += len(unlabelled)
        for item in unlabelled:
            logger.warning(
                "%s: left out: nothing to learn is left of it after cutting it to %d tokens",
                item.get("source", "a sample"),
                item["input_ids"].shape[-1],
            )


def collate(
    features: Sequence[Features], pad_token_id: int, side: Side = "right"
) -> dict[str, torch.Tensor]:
    """Features of B samples → a batch padded on `side` to the longest.

    Returns:
        `input_ids` (filled with `pad_token_id`), `attention_mask` (0), `mm_token_type_ids` (0) and
        `labels` (-100), all (B,S); `pixel_values` (N,3,H,W), the samples' in order, absent if
        there is no picture.
    """
    fill = {"input_ids": pad_token_id, "labels": IGNORED}
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
