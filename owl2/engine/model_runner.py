"""The fast path: tokens of several sequences, over a cache that stays where it is.

::

    ids (B,), positions (B,) ──► embed_tokens (B, D) ──► layers: text weights only, each sequence
    attends to its own row of the cache ──► norm ──► lm_head (B, V)

After the prompt all tokens are text (SPEC 1.3), so a step is a plain LLaMA's. It is written here
once more, for one token a sequence, because what a general forward does around the arithmetic
(masks, caches that are put together anew, routing) takes longer than the arithmetic itself.

Where the CPU kernels run, prompts go this way, too (`fill`): tokens of all prompts in one line,
without padding, the text first and then the images. Else they go through the model's own forward.

Shapes: B sequences, D width, h key-value heads, d head width, C the cache's capacity, V vocabulary,
M tokens of prompts.
"""

from collections.abc import Sequence
from typing import Any

import torch

from owl2.engine.backends.cuda_graphs import CompiledStep, Graphs
from owl2.engine.backends.native.build import available
from owl2.engine.backends.steps import NativeStep, TorchStep, Where
from owl2.model.modeling import Owl2ForConditionalGeneration

SMALLEST = 256  # positions a row has room for at first


class KeyValues:
    """A static cache: one row a sequence, each filled up to a length of its own.

    Who uses it knows the lengths; what lies beyond them is not read.

    Attributes:
        keys, values: for each layer (rows, h, C, d).
    """

    def __init__(
        self, layers: int, heads: int, width: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.rows = self.capacity = 0
        shape = (0, heads, 0, width)
        self.keys = [torch.empty(shape, dtype=dtype, device=device) for _ in range(layers)]
        self.values = [torch.empty(shape, dtype=dtype, device=device) for _ in range(layers)]

    @property
    def position_bytes(self) -> int:
        """Bytes of one position of one row, over all layers."""
        heads, width = self.keys[0].shape[1], self.keys[0].shape[3]
        return 2 * len(self.keys) * heads * width * self.keys[0].element_size()

    def reserve(self, rows: int, capacity: int) -> None:
        """Make room for so many rows and positions at least; what is there is kept.

        It grows by doubling, so that a growing dialogue is seldom copied.
        """
        if rows <= self.rows and capacity <= self.capacity:
            return
        rows = self.rows if rows <= self.rows else max(rows, 2 * self.rows)
        if capacity > self.capacity:
            self.capacity = max(SMALLEST, 1 << (capacity - 1).bit_length())
        for tensors in (self.keys, self.values):
            for layer, old in enumerate(tensors):
                new = old.new_zeros(rows, old.shape[1], self.capacity, old.shape[3])
                new[: old.shape[0], :, : old.shape[2]] = old
                tensors[layer] = new
        self.rows = rows

    def put(
        self,
        row: int,
        keys: Sequence[torch.Tensor],
        values: Sequence[torch.Tensor],
        start: int = 0,
    ) -> None:
        """Write a layer's (h, n, d) each into `row` from position `start` on."""
        for own, new in ((self.keys, keys), (self.values, values)):
            for tensor, part in zip(own, new, strict=True):
                tensor[row, :, start : start + part.shape[1]] = part

    def take(self, row: int, length: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Copies of the first `length` positions of a row: (h, length, d) a layer."""
        return (
            [tensor[row, :, :length].clone() for tensor in self.keys],
            [tensor[row, :, :length].clone() for tensor in self.values],
        )

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of one row over another's."""
        for tensor in (*self.keys, *self.values):
            tensor[target, :, :length] = tensor[source, :, :length]


class FastDecoder:
    """A model's decoder, one token for each of several sequences at a time.

    It reads the model's weights where they are: when they are trained, it is, too.

    Attributes:
        cache: rows 0 … B-1 are the sequences of a step.
    """

    def __init__(self, model: Owl2ForConditionalGeneration) -> None:
        self.model = model
        config = model.config
        self.cache = KeyValues(
            config.num_hidden_layers,
            config.num_key_value_heads,
            config.head_dim,
            model.dtype,
            model.device,
        )
        self.by = choose_step(model)
        self.graphs = Graphs(self._run) if isinstance(self.by, CompiledStep) else None
        self._recorded_at = 0  # the cache's address when graphs were recorded

    @torch.no_grad()
    def step(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Logits of the next token of each sequence; its keys and values go into the cache.

        Rows beyond B may be written to.

        Args:
            tokens: (B,) ids of text, on the model's device.
            positions: (B,) where each stands in its sequence, on the CPU: all before it are filled.

        Returns:
            (B, V); on a GPU good until the next step.
        """
        self._require_fresh()
        length = int(positions.max()) + 1
        if self.graphs is None:
            self.cache.reserve(len(tokens), length)
            return self._run(tokens, positions.to(tokens.device), length)
        rows, _ = self.graphs.sizes(len(tokens), length, length)
        self.cache.reserve(rows, length)
        if self.cache.keys[0].data_ptr() != self._recorded_at:
            self.graphs.clear()
            self._recorded_at = self.cache.keys[0].data_ptr()
        return self.graphs(tokens, positions, length, self.cache.capacity)

    @property
    def is_stale(self) -> bool:
        """Whether the model was put on another device or into another dtype."""
        keys = self.cache.keys[0]
        return (keys.dtype, keys.device) != (self.model.dtype, self.model.device)

    def _require_fresh(self) -> None:
        """Kernels would write numbers of one size where there is room for those of another."""
        if self.is_stale:
            raise RuntimeError("the model was moved or cast in the middle of an answer; ask again")

    @property
    def takes_prompts(self) -> bool:
        """Whether `fill` is there."""
        return isinstance(self.by, NativeStep)

    @torch.no_grad()
    def fill(
        self,
        hidden: torch.Tensor,
        rows: torch.Tensor,
        positions: torch.Tensor,
        visual: int,
        wanted: torch.Tensor,
    ) -> torch.Tensor:
        """Tokens of any sequences at once; their keys and values go into the cache.

        Args:
            hidden: (M, D) embeddings, the last `visual` of them of images; written over.
            rows, positions: (M,) where each stands: all before it are filled, or among them.
            wanted: (B,) numbers of tokens.

        Returns:
            (B, V) logits after the wanted tokens.
        """
        self._require_fresh()
        length = int(positions.max()) + 1
        self.cache.reserve(int(rows.max()) + 1, length)
        hidden = self._layers(hidden, rows, positions, length, visual)[wanted]
        return self.by.linear(self.model.lm_head, self.by.norm(self.model.model.norm, hidden))

    def _run(self, tokens: torch.Tensor, positions: torch.Tensor, length: int) -> torch.Tensor:
        rows = torch.arange(len(tokens), device=tokens.device)
        hidden = self.model.model.embed_tokens(tokens)  # (B, D)
        hidden = self._layers(hidden, rows, positions, length)
        return self.by.linear(self.model.lm_head, self.by.norm(self.model.model.norm, hidden))

    def _layers(
        self,
        hidden: torch.Tensor,
        rows: torch.Tensor,
        positions: torch.Tensor,
        length: int,
        visual: int = 0,
    ) -> torch.Tensor:
        decoder, cache = self.model.model, self.cache
        cos, sin = decoder.rotary_emb(hidden[None], positions[None])  # (1, B, d)
        where = Where(rows, positions, length, (cos[0], sin[0]), visual)
        layers: Any = decoder.layers
        return self.by.layers(layers, hidden, cache.keys, cache.values, where)


def choose_step(model: Owl2ForConditionalGeneration) -> TorchStep:
    """The fastest way for a model; says on stderr why, where it is not what it could be."""
    if model.device.type == "cuda":
        # bitsandbytes' products look at numbers on the host, which cannot be recorded.
        return TorchStep() if getattr(model, "is_quantized", False) else CompiledStep()
    return NativeStep() if NativeStep.supports(model) and available() else TorchStep()
