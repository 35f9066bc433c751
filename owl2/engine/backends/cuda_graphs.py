"""A decode step on a GPU: its layers compiled once, its launches recorded and played again.

One token a sequence is hundreds of small kernels, and starting each from Python takes longer than
it runs. torch.compile makes fewer of them; a CUDA graph starts all with one call. A graph has fixed
sizes, so the batch is rounded up to a power of two and the length to a multiple of 256: a growing
dialogue is recorded anew every 256 tokens, and compiled once (its sizes are symbols).

Shapes: B sequences, R ≥ B rows, V vocabulary.
"""

import os
import sys
from collections.abc import Callable
from typing import Any

import torch

from owl2.engine.backends.native.build import cache_directory
from owl2.engine.backends.steps import TorchStep

LENGTHS = 256  # recorded lengths are multiples of it


class CompiledStep(TorchStep):
    """`TorchStep` with each layer's step compiled: one program for all layers and sizes.

    Falls back to torch's operations, with a line on stderr, where no compiler is.
    """

    def __init__(self, **options: Any) -> None:
        """`options`: torch.compile's."""
        # Compiled code is kept on disk: the second start reads what the first has made.
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_directory() / "inductor"))
        plain = super().layer
        self._layer: Callable = torch.compile(plain, dynamic=True, **options)
        self._plain: Callable | None = plain

    def layer(self, *args: Any) -> torch.Tensor:
        if self._plain is None:  # it worked before
            return self._layer(*args)
        try:
            hidden = self._layer(*args)
        # What a missing compiler raises has no common class, and eager is right in any case: a
        # mistake of ours is raised there once more.
        except Exception as error:
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            print(f"owl2: not compiled, so slower: {first}", file=sys.stderr)
            self._layer = self._plain
            hidden = self._layer(*args)
        self._plain = None
        return hidden


class Graphs:
    """Recordings of a step, by their sizes.

    Args:
        run: ids (R,), positions (R,) on the GPU and a length → logits (R, V); reads and writes
            memory that stays where it is until `clear`.
    """

    def __init__(self, run: Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]) -> None:
        self._run = run
        self._recorded: dict[tuple[int, int], _Recording] = {}

    def clear(self) -> None:
        """Forget all: the memory that they read and write has moved."""
        self._recorded.clear()

    def sizes(self, batch: int, length: int, capacity: int) -> tuple[int, int]:
        """Rows and length that a step of (B, length) is recorded with."""
        return 1 << (batch - 1).bit_length(), min(-(-length // LENGTHS) * LENGTHS, capacity)

    def __call__(
        self, tokens: torch.Tensor, positions: torch.Tensor, length: int, capacity: int
    ) -> torch.Tensor:
        """(B,) ids on the GPU and positions on the CPU → logits (B, V), good until the next call.

        Rows beyond B are computed, too, and written to: nothing may be kept in them.
        """
        sizes = self.sizes(len(tokens), length, capacity)
        recording = self._recorded.get(sizes)
        if recording is None:
            recording = self._recorded[sizes] = _Recording(*sizes, tokens.device)
        recording.set(tokens, positions)
        return recording.play(self._run)[: len(tokens)]


class _Recording:
    def __init__(self, rows: int, length: int, device: torch.device) -> None:
        self._tokens = torch.zeros(rows, dtype=torch.long, device=device)
        self._positions = torch.zeros(rows, dtype=torch.long, device=device)
        self._length = length
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits: torch.Tensor

    def set(self, tokens: torch.Tensor, positions: torch.Tensor) -> None:
        """What to compute: (B,) each."""
        self._tokens[: len(tokens)].copy_(tokens)
        self._positions[: len(tokens)].copy_(positions, non_blocking=True)

    def play(self, run: Callable) -> torch.Tensor:
        """The logits (R, V) of what was set."""
        if self._graph is None:
            self._record(run)
        assert self._graph is not None
        self._graph.replay()
        return self._logits

    def _record(self, run: Callable) -> None:
        # What is compiled or chosen on first use must not be recorded, and must run on another
        # stream. Doing the step twice writes the same keys and values twice.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                run(self._tokens, self._positions, self._length)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._logits = run(self._tokens, self._positions, self._length)
        self._graph = graph
