"""Prompts → their keys and values in rows of a cache, and the logits after them.

::

    ids, images ──► Begun: what is kept of its start, what is left to compute
    several Begun ──► embeddings ──► keys and values in rows; logits of each one's last token

By the CPU kernels all prompts' tokens are one line (`FastDecoder.fill`). Else they are right-padded
rows of the model's own forward, which needs no mask where all start at the same position: causal
attention keeps padding from all that comes before.

Shapes: B prompts, P kept positions, S positions to compute, M tokens in all, N images, K+1
embeddings an image, D width, V vocabulary, h key-value heads, d head width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers import DynamicCache

from owl2.engine.model_runner import FastDecoder
from owl2.engine.prefix_cache import Features, Key, Prefix, Prefixes, digest, weights_mark
from owl2.errors import InputError
from owl2.model.image_inputs import TokenCounts, images_per_sequence
from owl2.model.modeling import Owl2ForConditionalGeneration

IMAGES = 32  # that the vision encoder takes at a time


class PreparedImage(NamedTuple):
    """One image of a prompt: the position of its first token, and (3, H, W) pixels."""

    start: int
    digest: bytes
    pixels: torch.Tensor


@dataclass(eq=False)
class Begun:
    """A prompt that is to be computed; one, for however many answers.

    Attributes:
        key: its ids, image tokens as their image's digest.
        prefix, shared: what is kept of its first `shared` tokens.
    """

    ids: tuple[int, ...]
    images: tuple[PreparedImage, ...]
    key: Key
    prefix: Prefix | None = None
    shared: int = 0

    @property
    def rest(self) -> int:
        """How many tokens are to be computed."""
        return len(self.ids) - self.shared

    @property
    def new_images(self) -> list[PreparedImage]:
        """Those that are to be computed."""
        return [image for image in self.images if image.start >= self.shared]


class Read(NamedTuple):
    """What came of a prompt of P tokens.

    Attributes:
        logits: (1, V) after the last of them.
        cache: (1, h, P, d) a layer; good until the next prompt is read.
    """

    logits: torch.Tensor
    cache: DynamicCache


class Reader:
    """Computes prompts with a model, and keeps what later ones can use.

    Attributes:
        epoch: goes up whenever all that was kept is forgotten.
    """

    def __init__(
        self, model: Owl2ForConditionalGeneration, prefix_bytes: int, feature_bytes: int
    ) -> None:
        self.model = model
        self.prefixes = Prefixes(prefix_bytes)
        self.features = Features(feature_bytes)
        self.epoch = 0
        self._weights: Any = None
        self._alone: FastDecoder | None = None

    def begin(self, ids: Sequence[int], pixel_values: torch.Tensor | None) -> Begun:
        """A prompt with its N images, (N, 3, H, W) or None; nothing is computed yet.

        Raises:
            InputError: no ids, or such as the model does not have; images that do not fit.
        """
        config = self.model.config
        if not len(ids):
            raise InputError("a prompt must have one token at least")
        row = torch.tensor([list(ids)])
        contents = TokenCounts.of(row, config.image_token_id)
        images_per_sequence(contents.image_tokens, pixel_values, config.num_image_tokens)
        is_image = row == config.image_token_id  # (1, S)
        key: list[int | bytes] = list(ids)
        images = []
        if pixel_values is not None and len(pixel_values):
            self._check_size(pixel_values)
            places = is_image[0].nonzero()[:, 0].view(len(pixel_values), -1).tolist()
            for own, pixels in zip(places, pixel_values.cpu(), strict=True):
                image = PreparedImage(own[0], digest(pixels), pixels)
                images.append(image)
                for place in own:
                    key[place] = image.digest
        return Begun(tuple(ids), tuple(images), tuple(key))

    def look_up(self, prompt: Begun) -> None:
        """Find what is kept of a prompt's start; whole images of it."""
        prompt.prefix, prompt.shared = self.prefixes.find(prompt.key)
        image = self.model.config.image_token_id
        if prompt.shared and prompt.ids[prompt.shared] == image:
            # Inside an image only if it began before.
            before = [image for image in prompt.images if image.start < prompt.shared]
            tokens = prompt.ids[: prompt.shared].count(image)
            if tokens % self.model.config.num_image_tokens:
                prompt.shared = before[-1].start
        if not prompt.shared:
            prompt.prefix = None

    def read_alone(self, prompt: Begun) -> Read:
        """Compute one prompt in a place of its own."""
        if self._alone is None or self._alone.is_stale:
            self._alone = FastDecoder(self.model)
        logits = self.read([prompt], self._alone, 0)
        cache = DynamicCache(config=self.model.config)
        for layer, (keys, values) in enumerate(
            zip(self._alone.cache.keys, self._alone.cache.values, strict=True)
        ):
            own = slice(0, 1), slice(None), slice(0, len(prompt.ids))
            cache.update(keys[own], values[own], layer)
        return Read(logits, cache)

    def read(self, prompts: Sequence[Begun], decoder: FastDecoder, first: int) -> torch.Tensor:
        """Compute prompts together, from where what `look_up` found ends, and keep them.

        Their keys and values are put into the decoder's rows `first` …

        Returns:
            (B, V) logits after the last token of each.
        """
        decoder.cache.reserve(first + len(prompts), max(len(prompt.ids) for prompt in prompts))
        way = self._fill if decoder.takes_prompts else self._forward
        logits = way(prompts, decoder, first)
        for row, prompt in enumerate(prompts, first):
            if self.prefixes.wants(prompt.key):
                self.prefixes.add(prompt.key, *decoder.cache.take(row, len(prompt.ids)))
            prompt.prefix = None  # it may be dropped now
        return logits

    def _fill(self, prompts: Sequence[Begun], decoder: FastDecoder, first: int) -> torch.Tensor:
        rows, positions = [], []
        for row, prompt in enumerate(prompts, first):
            if prompt.prefix is not None:
                kept = (prompt.prefix.keys, prompt.prefix.values)
                keys, values = ([own[:, : prompt.shared] for own in part] for part in kept)
                decoder.cache.put(row, keys, values)
            rows.append(torch.full((prompt.rest,), row))
            positions.append(torch.arange(prompt.shared, len(prompt.ids)))
        ids = torch.tensor([id_ for prompt in prompts for id_ in prompt.ids[prompt.shared :]])
        is_image = ids == self.model.config.image_token_id  # (M,)
        order = is_image.int().argsort(stable=True)  # text first
        hidden = self.model.model.embed_tokens(ids[~is_image])
        visual = 0
        if (embeddings := self._embeddings(prompts)) is not None:
            images = embeddings.flatten(0, 1)
            visual = len(images)
            hidden = torch.cat([hidden, images])
        last = torch.tensor([prompt.rest for prompt in prompts]).cumsum(0) - 1
        wanted = order.argsort()[last]
        return decoder.fill(
            hidden, torch.cat(rows)[order], torch.cat(positions)[order], visual, wanted
        )

    def _forward(self, prompts: Sequence[Begun], decoder: FastDecoder, first: int) -> torch.Tensor:
        model, device = self.model, self.model.device
        starts = [prompt.shared for prompt in prompts]
        lengths = [prompt.rest for prompt in prompts]
        longest, offset = max(lengths), max(starts)
        rows = [
            [*prompt.ids[prompt.shared :], *[0] * (longest - prompt.rest)] for prompt in prompts
        ]
        ids = torch.tensor(rows, device=device)  # (B, S)
        options: dict[str, Any] = {}
        if min(starts) != offset:  # some rows have a gap before what is computed
            options = _around_gaps(starts, offset, longest, device)
        embeddings = self._embeddings(prompts)
        if embeddings is not None:
            options["mm_token_type_ids"] = (ids == model.config.image_token_id).long()
        cache = DynamicCache(config=model.config)
        if offset:
            _start(cache, prompts, offset)
        hidden = model.model(
            inputs_embeds=model.model.embed(ids, embeddings),
            past_key_values=cache,
            use_cache=True,
            **options,
        ).last_hidden_state  # (B, S, D)
        for number, (start, length) in enumerate(zip(starts, lengths, strict=True)):
            layers: Any = cache.layers  # typed as of any kind
            for begin, from_, to in ((0, 0, start), (start, offset, offset + length)):
                keys = [layer.keys[number, :, from_:to] for layer in layers]
                values = [layer.values[number, :, from_:to] for layer in layers]
                decoder.cache.put(first + number, keys, values, begin)
        last = torch.tensor(lengths, device=device) - 1
        return model.lm_head(hidden[torch.arange(len(prompts), device=device), last])

    def forget(self) -> None:
        """Drop all that is kept."""
        self.prefixes.clear()
        self.features.clear()
        self._alone = None
        self.epoch += 1

    def forget_if_changed(self) -> None:
        """Drop all that is kept if the model's weights are others than at the last call."""
        if not (self.prefixes.limit or self.features.limit):
            return
        if (mark := weights_mark(self.model)) != self._weights:
            self.forget()
            self._weights = mark

    def _check_size(self, pixel_values: torch.Tensor) -> None:
        size = self.model.config.image_size
        if tuple(pixel_values.shape[1:]) != (3, size, size):
            raise InputError(
                f"pixel_values have the shape {tuple(pixel_values.shape)}, but this model takes "
                f"(N, 3, {size}, {size})"
            )

    def _embeddings(self, prompts: Sequence[Begun]) -> torch.Tensor | None:
        """(N, K+1, D) of all images to compute; each different one is encoded once."""
        images = [image for prompt in prompts for image in prompt.new_images]
        if not images:
            return None
        known: dict[bytes, torch.Tensor] = {}
        missing: dict[bytes, torch.Tensor] = {}
        for image in images:
            kept = self.features.find(image.digest)
            if kept is None:
                missing[image.digest] = image.pixels
            else:
                known[image.digest] = kept
        digests = list(missing)
        for begin in range(0, len(digests), IMAGES):
            some = digests[begin : begin + IMAGES]
            pixels = torch.stack([missing[digest] for digest in some])
            pixels = pixels.to(self.model.device, self.model.dtype)
            encoded: Any = self.model.get_image_features(pixels).pooler_output
            for digest_, embeddings in zip(some, encoded, strict=True):
                known[digest_] = embeddings
                if self.features.limit:
                    self.features.add(digest_, embeddings.clone())
        return torch.stack([known[image.digest] for image in images])


def _start(cache: DynamicCache, prompts: Sequence[Begun], offset: int) -> None:
    """Put what is kept of the prompts' starts into an empty cache: rows of `offset` positions."""
    starts = [prompt.shared for prompt in prompts]
    kept = [prompt.prefix for prompt in prompts]
    layers = next(len(prefix.keys) for prefix in kept if prefix is not None)
    for layer in range(layers):
        keys = _rows([prefix.keys[layer] if prefix else None for prefix in kept], starts, offset)
        values = _rows(
            [prefix.values[layer] if prefix else None for prefix in kept], starts, offset
        )
        cache.update(keys, values, layer)


def _rows(kept: Sequence[torch.Tensor | None], starts: Sequence[int], offset: int) -> torch.Tensor:
    """The first `starts` positions of B tensors (h, P, d) or None, as one (B, h, `offset`, d)."""
    like = next(tensor for tensor in kept if tensor is not None)
    if all(tensor is like for tensor in kept) and set(starts) == {offset}:
        return like[:, :offset].expand(len(kept), -1, -1, -1)
    rows = like.new_zeros(len(kept), like.shape[0], offset, like.shape[2])
    for row, (tensor, start) in enumerate(zip(kept, starts, strict=True)):
        if tensor is not None:
            rows[row, :, :start] = tensor[:, :start]
    return rows


def _around_gaps(
    starts: Sequence[int], offset: int, longest: int, device: torch.device
) -> dict[str, torch.Tensor]:
    """Mask (B, P + S) and positions (B, S) of rows that are kept up to `starts` of P positions."""
    begin = torch.tensor(starts)[:, None]  # (B, 1)
    place = torch.arange(offset + longest)
    mask = (place < begin) | (place >= offset)  # (B, P + S)
    positions = begin + torch.arange(longest)  # (B, S)
    return {"attention_mask": mask.long().to(device), "position_ids": positions.to(device)}
