"""Forward passes over the static cache: decode steps and chunks of prompts, together.

::

    new tokens of sequences ──► keys and values in their rows, logits (B, V) after their last tokens

Where the CPU kernels support the model, `backends.cpu` computes the decoder layers. All tokens are
then one sequence without padding, text first and images last. Everywhere else, the model's own
forward computes decode steps, and prompts in right-padded rows.

Shapes: B sequences, S positions, M tokens in all, D width, V vocabulary.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

from owl2.engine.backends import cpu
from owl2.engine.kv_cache import StaticKVCache
from owl2.engine.lora import LoraManager
from owl2.model.image_inputs import ntk_options
from owl2.model.modeling import Owl2ForConditionalGeneration


class NewTokens(NamedTuple):
    """Consecutive tokens of a sequence that are to be computed; all before them are in its row.

    Attributes:
        row: Of the cache.
        start: The position of the first one.
        embeddings: Of the image tokens among `ids`, (V, D); None without any.
        ntk_alpha: `config.ntk_alpha` of the length of the prompt.
        has_logits: Whether `forward` returns the logits after the last one.
        adapter: A name in `ModelRunner.adapters`; None: the base model.
    """

    row: int
    start: int
    ids: Sequence[int]
    embeddings: torch.Tensor | None = None
    ntk_alpha: float = 1.0
    has_logits: bool = True
    adapter: str | None = None


class ModelRunner:
    """Runs a model over the rows of a cache. It reads the weights of the model in place.

    Args:
        adapters: Of the model; default: none.

    Attributes:
        cache: The keys and values.
        uses_cpu_kernels: Whether the CPU kernels compute the decoder layers.
    """

    def __init__(
        self, model: Owl2ForConditionalGeneration, adapters: LoraManager | None = None
    ) -> None:
        self.model = model
        self.adapters = adapters or LoraManager(model)
        config = model.config
        self.cache = StaticKVCache(
            config.num_hidden_layers,
            config.num_key_value_heads,
            config.head_dim,
            model.dtype,
            model.device,
        )
        self.uses_cpu_kernels = cpu.supports(model)
        self._layers = cpu.DecoderLayers(model.model.layers)

    @property
    def is_stale(self) -> bool:
        """Whether the model was moved to another device or cast to another dtype."""
        layer, weight = self.cache.layers[0], self.model.model.embed_tokens.weight
        return (layer.dtype, layer.device) != (weight.dtype, weight.device)

    def decode(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Logits (B, V) after one text token (B,) at a position (B,) in each of rows 0 to B-1."""
        pairs = enumerate(zip(positions.tolist(), tokens.tolist(), strict=True))
        return self.forward([NewTokens(row, start, (id_,)) for row, (start, id_) in pairs])

    @torch.no_grad()
    def forward(self, sequences: Sequence[NewTokens]) -> torch.Tensor:
        """Compute new tokens; their keys and values go to the cache.

        Returns:
            (B, V) logits after the last tokens of the sequences that have logits.

        Raises:
            RuntimeError: The model was moved or cast.
        """
        if self.is_stale:  # the kernels would access memory of another element size
            raise RuntimeError("the model was moved or cast while it generated an answer")
        last = max(sequences, key=lambda new: new.start + len(new.ids))
        self.cache.reserve(max(new.row for new in sequences) + 1, last.start + len(last.ids))
        if self.uses_cpu_kernels:
            return self._forward_packed(sequences)
        hidden: dict[int, torch.Tensor] = {}  # (D,) of the last token, by row
        for group in _similar_sequences(sequences):
            rows = [new.row for new in group]
            hidden |= zip(rows, self._forward_padded(group), strict=True)
        selected = [hidden[new.row] for new in sequences if new.has_logits]
        if not selected:
            return torch.empty(0)
        return self.model.lm_head(torch.stack(selected))

    def _forward_packed(self, sequences: Sequence[NewTokens]) -> torch.Tensor:
        """All sequences together through the CPU kernels."""
        decoder: Any = self.model.model
        # Lists, because operations of torch would take a tenth of the step of a small model.
        lengths = [len(new.ids) for new in sequences]
        # The indices of the tokens that have logits.
        ends = [
            end - 1
            for new, end in zip(sequences, accumulate(lengths), strict=True)
            if new.has_logits
        ]
        ids, rows, positions = torch.tensor(
            [
                [id_ for new in sequences for id_ in new.ids],
                [new.row for new in sequences for _ in new.ids],
                [new.start + i for new in sequences for i in range(len(new.ids))],
            ]
        )  # (M,) each
        images = [new.embeddings for new in sequences if new.embeddings is not None]
        num_visual = sum(map(len, images))
        order = None
        if num_visual:
            is_image = ids == self.model.config.image_token_id
            order = is_image.int().argsort(stable=True)  # text first
            ids, rows, positions = ids[~is_image], rows[order], positions[order]
            ends = order.argsort()[ends].tolist()
        hidden = decoder.embed_tokens(ids)  # (M, D)
        if images:
            hidden = torch.cat([hidden, *images])
        cos, sin = decoder.rotary_emb(hidden[None], positions[None])  # (1, M, d)
        names = [new.adapter for new in sequences]
        adapters = self.adapters.tokens(names, lengths, order, len(ids))
        tokens = cpu.TokenPositions(rows, positions, cos[0], sin[0], num_visual, adapters)
        hidden = self._layers.run(hidden, self.cache.layers, tokens)
        if not ends:
            return torch.empty(0)
        if ends != list(range(len(hidden))):
            hidden = hidden[ends]
        return cpu.linear(self.model.lm_head, cpu.rms_norm(decoder.norm, hidden))

    def _forward_padded(self, sequences: Sequence[NewTokens]) -> torch.Tensor:
        """Similar sequences through the model's own forward: (B, D) after their last tokens."""
        device = self.model.device
        lengths = [len(new.ids) for new in sequences]
        width = max(lengths)
        # Padding is on the right, where causal attention hides it from the prompt.
        padded = [[*new.ids, *[0] * (width - len(new.ids))] for new in sequences]
        starts = torch.tensor([new.start for new in sequences], device=device)
        positions = starts[:, None] + torch.arange(width, device=device)  # (B, S)
        rows = [new.row for new in sequences]
        length = max(new.start for new in sequences) + width
        self.cache.reserve(max(rows) + 1, length)
        mask = None
        if width == 1:
            # Shorter rows have a mask; the forward itself masks what comes after a query.
            mask = (torch.arange(length, device=device) <= positions).long()  # (B, length)
        options = ntk_options(self.model.config, [new.ntk_alpha for new in sequences], device)
        if images := [new.embeddings for new in sequences if new.embeddings is not None]:
            encoded = BaseModelOutputWithPooling(pooler_output=torch.cat(images))
            options["mm_encoder_outputs"] = {"image": encoded}
        with self.adapters.use_rows([new.adapter for new in sequences]):
            hidden = self.model.model(
                input_ids=torch.tensor(padded, device=device),
                attention_mask=mask,
                position_ids=positions,
                past_key_values=self.cache.view(rows, positions, length),
                use_cache=True,
                **options,
            ).last_hidden_state  # (B, S, D)
        last = torch.tensor(lengths, device=device) - 1
        return hidden[torch.arange(len(rows), device=device), last]


def _similar_sequences(sequences: Sequence[NewTokens]) -> list[list[NewTokens]]:
    """Sequences that one forward computes: decode steps, and chunks from one start.

    Chunks of about the same length are padded without much waste. They, and a single image token,
    have one adapter: PEFT can mix adapters only where all tokens pass through the same modules.
    """
    groups: list[list[NewTokens]] = []
    for new in sorted(sequences, key=lambda new: len(new.ids)):
        for group in groups:
            first = group[0]
            difference = len(new.ids) - len(first.ids)
            is_prompt = new.start == first.start and difference <= max(8, len(new.ids) // 8)
            is_prompt = is_prompt and new.adapter == first.adapter
            is_step = len(new.ids) == 1 and new.embeddings is first.embeddings is None
            if (is_prompt and len(first.ids) > 1) or is_step:
                group.append(new)
                break
        else:
            groups.append([new])
    return groups
