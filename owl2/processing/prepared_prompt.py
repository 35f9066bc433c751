"""A prompt that is ready for the model: token ids, pixels, and where the images are."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from PIL import Image

from owl2.errors import ErrorCode, InputError
from owl2.model.configuration import Owl2Config
from owl2.processing.chat_template import Spans, expand_placeholders
from owl2.processing.message_parts import MEDIA, TOKENS, content_to_text
from owl2.processing.messages import ParsedMessages, Video


@dataclass(frozen=True, eq=False)
class PreparedPrompt:
    """A prompt with its N images, each of which takes K + 1 tokens.

    `Owl2Processor.encode` makes one from messages, `from_ids` from token ids.

    Attributes:
        ids: S token ids, K + 1 times `image_token_id` for each image.
        pixel_values: (N, 3, H, W) on the CPU, or None without images.
        image_grids: (N, 2), if images are several crops in `pixel_values`: see
            `Owl2ForConditionalGeneration.forward`.
        image_spans: Start and end position of each image's tokens.
        image_digests: A hash of each image's pixels; equal images have equal digests.
        is_continued: The answer continues the text of the prompt and keeps its white space.
        adapter: The adapter of the engine that computes the prompt and its answer; None: the base
            model.
    """

    ids: tuple[int, ...]
    pixel_values: torch.Tensor | None
    image_spans: tuple[tuple[int, int], ...]
    image_digests: tuple[bytes, ...]
    is_continued: bool = False
    image_grids: torch.Tensor | None = None
    adapter: str | None = None

    @classmethod
    def from_ids(
        cls,
        ids: Sequence[int],
        pixel_values: torch.Tensor | None,
        image_token_id: int,
        num_image_tokens: int,
        image_grids: torch.Tensor | None = None,
        *,
        is_continued: bool = False,
    ) -> "PreparedPrompt":
        """Locate the images in token ids.

        Args:
            num_image_tokens: Tokens of an image, K + 1.

        Raises:
            InputError: There are no ids, or the number of image tokens does not fit the images.
        """
        if not ids:
            raise InputError("A prompt needs at least one token.", ErrorCode.EMPTY_MESSAGE)
        images = split_images(pixel_values, image_grids)
        positions = [position for position, id_ in enumerate(ids) if id_ == image_token_id]
        if len(positions) != len(images) * num_image_tokens:
            raise InputError(
                f"The prompt contains {len(positions)} image tokens, but {len(images)} image(s) of "
                f"{num_image_tokens} tokens each were given.",
                ErrorCode.IMAGE_COUNT_MISMATCH,
            )
        ends = [start + num_image_tokens for start in positions[::num_image_tokens]]
        spans = zip(positions[::num_image_tokens], ends, strict=True)
        digests = tuple(map(pixel_digest, images))
        pixels, grids = (pixel_values, image_grids) if images else (None, None)
        return cls(tuple(ids), pixels, tuple(spans), digests, is_continued, image_grids=grids)

    def with_ids(self, ids: Sequence[int], image_token_id: int) -> "PreparedPrompt":
        """Other ids with the same images and adapter."""
        spans = self.image_spans
        num_image_tokens = spans[0][1] - spans[0][0] if spans else 1
        sizes = image_token_id, num_image_tokens
        prompt = self.from_ids(ids, self.pixel_values, *sizes, self.image_grids)
        return replace(prompt, adapter=self.adapter)

    def crops_of(self, index: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The pixels (C, 3, H, W) of an image, and its row of `image_grids` (1, 2)."""
        if self.pixel_values is None:
            raise IndexError(index)
        if self.image_grids is None:
            return self.pixel_values[index : index + 1], None
        crops = (1 + self.image_grids.prod(1)).tolist()
        start = sum(crops[:index])
        grid = self.image_grids[index : index + 1]
        return self.pixel_values[start : start + crops[index]], grid

    @property
    def continued_id(self) -> int | None:
        """The last id, if the answer continues its text."""
        return self.ids[-1] if self.is_continued else None

    def check_ids(self, config: Owl2Config) -> None:
        """Raise an InputError if an id is neither the image token nor in the model's vocabulary."""
        ids = {id_ for id_ in self.ids if not 0 <= id_ < config.vocab_size}
        if invalid := sorted(ids - {config.image_token_id}):
            raise InputError(
                f"The prompt contains the id {invalid[0]}; the model has embeddings of the ids 0 "
                f"to {config.vocab_size - 1}. For added tokens, call resize_token_embeddings.",
                ErrorCode.INVALID_VALUE,
            )


def split_images(
    pixel_values: torch.Tensor | None, image_grids: torch.Tensor | None
) -> list[torch.Tensor]:
    """The pixels of each image on the CPU: (3, H, W), or (C, 3, H, W) of crops.

    Raises:
        InputError: The number of crops does not fit the grids.
    """
    if pixel_values is None:
        return []
    if image_grids is None:
        return list(pixel_values.cpu())
    crops = (1 + image_grids.prod(1)).tolist()
    if sum(crops) != len(pixel_values):
        raise InputError(
            f"pixel_values contain {len(pixel_values)} crops, but image_grids describe images with "
            f"{crops}.",
            ErrorCode.IMAGE_COUNT_MISMATCH,
        )
    return list(pixel_values.cpu().split(crops))


def pixel_digest(pixels: torch.Tensor) -> bytes:
    """A hash of an image's pixels, a tensor on the CPU; about 1 ms per megabyte."""
    data = pixels.detach().contiguous().view(torch.uint8).flatten().numpy()
    return hashlib.blake2b(data.data, digest_size=16).digest()


def check_length(
    ids: Sequence[int],
    limit: int,
    image_token_id: int = -1,
    num_image_tokens: int = 1,
    name: str = "This model's maximum context length is ",
) -> None:
    """Raise an InputError if a prompt leaves none of `limit` tokens for an answer.

    Args:
        image_token_id, num_image_tokens: For a hint about images; default: none.
        name: Of the limit.
    """
    excess = len(ids) + 1 - limit
    if excess <= 0:
        return
    hint = "."
    if count := ids.count(image_token_id) // num_image_tokens:
        fitting = max(0, count - -(-excess // num_image_tokens))
        hint = (
            f": each of its {count} images or frames of videos takes {num_image_tokens} tokens, "
            f"so that {fitting} fit."
        )
    raise InputError(
        f"{name}{limit} tokens. However, the prompt has {len(ids)} tokens, and the answer needs "
        f"one: {excess} too many. Shorten the text, or remove turns or images{hint}",
        ErrorCode.TOO_LONG,
    )


def flatten_images(counts: Sequence[int], images: Any, kind: str = "image") -> list[Any]:
    """The images of all prompts as one list, in order of appearance.

    Args:
        counts: The number of placeholders in each prompt.
        images: One image, a list for all prompts, or a list for each prompt.
        kind: "image" or "video".

    Raises:
        InputError: The numbers of placeholders and images differ.
    """
    token = TOKENS[kind]
    if images is None:
        images = []
    elif not isinstance(images, (list, tuple)):
        is_batch = isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 4
        images = list(images) if is_batch else [images]
    if not any(isinstance(row, (list, tuple)) or row is None for row in images):
        counts, images = [sum(counts)], [images]
    if len(images) != len(counts):
        raise InputError(
            f"{len(counts)} prompts, but {kind}s for {len(images)} prompts were passed: the number "
            f"of {token} tokens in the prompts should be the same as the number of {kind}s.",
            ErrorCode.IMAGE_COUNT_MISMATCH,
        )
    flat: list[Any] = []
    for index, (count, row) in enumerate(zip(counts, images, strict=True), 1):
        row = list(row) if isinstance(row, (list, tuple)) else [] if row is None else [row]
        if count != len(row):
            where = f"Prompt {index} of {len(counts)} has" if len(counts) > 1 else "There are"
            raise InputError(
                f"{where} {count} {token} placeholder(s), but {len(row)} {kind}(s) were passed: "
                f"each placeholder takes one {kind}.",
                ErrorCode.IMAGE_COUNT_MISMATCH,
            )
        flat += row
    return flat


def expand_media(
    image_processor: Any,
    prompts: Sequence[tuple[str, Spans]],
    images: Any,
    videos: Any,
    num_frames: int,
) -> tuple[list[tuple[str, Spans]], list[Any]]:
    """Prompts with the text of the crops of each image, and of the frames of each video.

    Args:
        image_processor: See `Owl2ImageProcessor.expand_images`.
        prompts: Texts with `<|image|>` and `<|video|>`, and the spans of their answers.
        images: As for `flatten_images`.
        videos: One video, a list for all prompts, or a list for each prompt; a video is a source
            of `sample_frames`, or a `Video`.
        num_frames: Of a video without its own number.

    Returns:
        The prompts, and the images and frames of all of them, in order.

    Raises:
        InputError: The numbers of placeholders and images or videos differ, or an image cannot be
            read; as `sample_frames`.
    """
    expanded, opened = [], []
    sources = _find_sources([text for text, _ in prompts], images, videos, num_frames)
    for (text, spans), groups in zip(prompts, sources, strict=True):
        texts, own = image_processor.expand_images([*chain.from_iterable(groups)])
        unused = iter(texts)
        replacements = ["".join(islice(unused, len(group))) for group in groups]
        expanded.append(expand_placeholders(text, spans, replacements))
        opened += own
    return expanded, opened


def images_of(conversation: ParsedMessages, num_frames: int) -> list[Any]:
    """The images and the frames of the videos, in order of appearance, not yet opened.

    Raises:
        InputError: See `expand_media`.
    """
    text = "".join(content_to_text(turn["content"]) for turn in conversation.turns)
    given = [conversation.images], [conversation.videos]
    [groups] = _find_sources([text], *given, num_frames)
    return [*chain.from_iterable(groups)]


def _find_sources(
    prompts: Sequence[str], images: Any, videos: Any, num_frames: int
) -> list[list[list[Any]]]:
    """For each placeholder of each prompt, its image or the frames of its video."""
    kinds = [MEDIA.findall(prompt) for prompt in prompts]
    counts = {kind: [row.count(kind) for row in kinds] for kind in TOKENS}
    unused_images = iter(flatten_images(counts["image"], images))
    unused_videos = iter(flatten_images(counts["video"], _wrap_videos(videos), "video"))
    return [
        [
            [next(unused_images)] if kind == "image" else next(unused_videos).frames(num_frames)
            for kind in row
        ]
        for row in kinds
    ]


def video_frames(videos: Any, num_frames: int) -> list[Any]:
    """The frames of one or several videos as one list; see `expand_media`."""
    wrapped = _wrap_videos(videos)
    if isinstance(wrapped, list):
        return [frame for video in wrapped for frame in video_frames(video, num_frames)]
    found: list[Any] = wrapped.frames(num_frames)
    return found


def _wrap_videos(videos: Any) -> Any:
    """Videos in any form as `Video`s, so that a list of frames is one video."""
    if videos is None or isinstance(videos, Video):
        return videos
    ndim = getattr(videos, "ndim", 0)
    is_list = isinstance(videos, (list, tuple))
    if ndim == 5 or (is_list and not (len(videos) and all(map(_is_frame, videos)))):
        return [_wrap_videos(video) for video in videos]
    return Video(videos)


def _is_frame(value: Any) -> bool:
    return isinstance(value, Image.Image) or getattr(value, "ndim", 0) in (2, 3)
