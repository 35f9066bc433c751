"""Samples to batches.

::

    Sample ──encode_sample──► Features, or InvalidSample
    Features of several samples ──Collator──► Batch

    Features        input_ids, attention_mask, mm_token_type_ids, labels (1,S);
                    pixel_values (N,3,H,W)
    Batch.inputs    the same, (B,S) and (sum of N,3,H,W), S of the longest sample

An invalid sample is removed from its batch, is not replaced, and is reported with the batch. It
keeps its position in the order of samples, so all processes run the same number of steps.

Scored samples (see `score_labels`) precede the others of their batch. In a batch of pairs the first
samples of all pairs precede the second ones.
"""

from collections.abc import Sequence
from dataclasses import replace
from random import Random
from typing import Any, Literal, NamedTuple

import torch
from PIL import Image

from owl2.constants import IGNORE_INDEX
from owl2.data.augment import Augmentation, none
from owl2.data.packing import pack, pad_rows
from owl2.data.sample import InvalidSample, Sample
from owl2.data.score_labels import ScoreLabels
from owl2.errors import ErrorCode, InputError
from owl2.processing.image_io import load_image
from owl2.processing.messages import ParsedMessages, Video, parse_messages
from owl2.processing.processor import Owl2Processor

Features = dict[str, Any]
Layout = Literal["padded", "packed", "one row"]


def encode_sample(
    sample: Sample | InvalidSample,
    processor: Owl2Processor,
    max_length: int | None = None,
    augmentation: Augmentation = none,
    rng: Random | None = None,
    score_labels: ScoreLabels | None = None,
) -> Features | InvalidSample:
    """The features of a sample, see `Owl2Processor.for_training`.

    Args:
        max_length: Longer samples are truncated on the right; None for no limit.
        augmentation: Applied to each image, with random numbers from `rng`, and to all frames of
            a video with the same random numbers.
        score_labels: Adds opinion scores to the features.

    Returns:
        An `InvalidSample` where `sample` is one, an image cannot be read, the number of images does
        not fit, an image ends after `max_length`, no token before `max_length` has a label, or
        `score_labels` refuses it.
    """
    if isinstance(sample, InvalidSample):
        return sample
    try:
        conversation = parse_messages(sample.messages)
        if augmentation is not none:
            conversation = _augment(conversation, processor, augmentation, rng or Random())
        features = dict(processor.for_training(conversation, max_length))
        require_labels(features, max_length)
        if score_labels is not None:
            score_labels.add(sample, features)
        return features
    except InputError as error:
        return InvalidSample.from_error(sample.source, error)


def _augment(
    conversation: ParsedMessages, processor: Owl2Processor, augmentation: Augmentation, rng: Random
) -> ParsedMessages:
    """The conversation with opened images, and with the frames of each video as a list."""

    def opened(image: Any) -> Image.Image:
        return augmentation(load_image(image, processor.image_processor.max_pixels), rng)

    images = tuple(opened(image) for image in conversation.images)
    videos = []
    for video in conversation.videos:
        state, frames = rng.getstate(), []
        for frame in video.frames(processor.num_frames):
            rng.setstate(state)
            frames.append(opened(frame))
        videos.append(Video(frames))
    return replace(conversation, images=images, videos=tuple(videos))


def require_labels(features: Features, max_length: int | None) -> None:
    """Raises `InputError` if no token of the truncated sample contributes to the loss."""
    if not (features["labels"] != IGNORE_INDEX).any():
        raise InputError(
            f"no label is left after truncation to {max_length} tokens: shorten the text before "
            "the answer, or increase max_length",
            ErrorCode.NO_LABELS,
        )


class Batch(NamedTuple):
    """Model inputs, and what they were made of.

    Attributes:
        inputs: See `collate` and `pack`.
        num_samples: Valid samples in `inputs`; a pair counts as one.
        num_tokens: Tokens of these samples, without padding.
        num_images: Images of these samples.
        skipped: The invalid samples of this batch.
    """

    inputs: dict[str, torch.Tensor]
    num_samples: int
    num_tokens: int
    num_images: int
    skipped: list[InvalidSample]


def _count_images(item: Features) -> int:
    """Several crops in `pixel_values` are one image if there are `image_grids`."""
    images: Any = item.get("image_grids", item.get("pixel_values", ()))
    return len(images)


class Collator:
    """Features of several samples to a `Batch`, without the invalid ones.

    Args:
        layout: "padded" (a row per sample), "packed" (several samples per row), or "one row".
        pairs: The second half of the features are the partners of the first half, see
            `MixtureBatchSampler`. A pair with an invalid sample is removed.
    """

    def __init__(
        self, processor: Owl2Processor, layout: Layout = "padded", pairs: bool = False
    ) -> None:
        self.pad_token_id = processor.tokenizer.pad_token_id or 0
        self.layout = layout
        self.pairs = pairs
        # A blank image without a label: every branch of the model runs, and the gradient is 0.
        blank = {"type": "image", "image": Image.new("RGB", (1, 1))}
        self._dummy = dict(
            processor.for_training(
                [{"role": "user", "content": [blank]}, {"role": "assistant", "content": "-"}]
            )
        )
        self._dummy["labels"] = torch.full_like(self._dummy["labels"], IGNORE_INDEX)

    def __call__(self, features: Sequence[Features | InvalidSample]) -> Batch:
        """See `collate` and `pack`. A batch without a valid sample has no labels: its loss is 0."""
        skipped = [item for item in features if isinstance(item, InvalidSample)]
        valid = [item for item in features if not isinstance(item, InvalidSample)]
        partners: list[Features] = []
        if self.pairs:
            valid, partners, mixed = _split_pairs(features)
            skipped += mixed
        valid.sort(key=lambda item: "level_probs" not in item)  # stable
        items = valid[: len(partners)] + partners + valid[len(partners) :] or [self._dummy]
        if self.layout == "padded":
            inputs = collate(items, self.pad_token_id)
        else:
            inputs = pack(items, self.pad_token_id, one_row=self.layout == "one row")
        return Batch(
            inputs,
            num_samples=len(valid),
            num_tokens=sum(item["input_ids"].shape[1] for item in valid + partners),
            num_images=sum(map(_count_images, valid + partners)),
            skipped=skipped,
        )


def _split_pairs(
    features: Sequence[Features | InvalidSample],
) -> tuple[list[Features], list[Features], list[InvalidSample]]:
    """The first samples of the pairs, the partners of the scored ones, and errors.

    A sample without an opinion score needs no partner.
    """
    half = len(features) // 2
    firsts, partners, errors = [], [], []
    for first, second in zip(features[:half], features[half:], strict=True):
        if isinstance(first, InvalidSample):
            continue
        if "level_probs" not in first:
            firsts.append(first)
        elif isinstance(second, InvalidSample):
            continue
        elif "level_probs" in second:
            firsts.append(first)
            partners.append(second)
        else:
            reason = "pairs need sources of `data` with scored rows only, or with descriptions only"
            errors.append(InvalidSample("a pair of rows", reason, ErrorCode.CONFLICT))
    return firsts, partners, errors


def collate(features: Sequence[Features], pad_token_id: int) -> dict[str, torch.Tensor]:
    """The features of B samples, a row each; see `pad_rows`."""
    return pad_rows([[item] for item in features], pad_token_id)
