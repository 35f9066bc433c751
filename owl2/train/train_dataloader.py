"""The Trainer's data loader: endless batches on the device, their counts, and their position.

    OUTPUT/checkpoints/checkpoint-N/data_state_RANK.json    the position of each process
    OUTPUT/skipped.jsonl    with `on_invalid_sample: skip`, a line per skipped sample; processes
                            other than the first write skipped_RANK.jsonl

`MixtureDataLoader` gives each process its share and has an exact position, so accelerate must
neither shard it nor skip batches.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator

from owl2.data.dataloader import MixtureDataLoader
from owl2.data.sample import InvalidSample
from owl2.errors import ErrorCode, InputError
from owl2.files import atomic_write_text
from owl2.train.recipe import Recipe

# If the first samples are all invalid, the recipe is wrong and not some rows.
MAX_SKIPPED_AT_START = 100


class DataCounts(NamedTuple):
    """Samples of all processes in this session, with their tokens and images."""

    samples: int = 0
    tokens: int = 0
    images: int = 0
    num_skipped: int = 0


class TrainDataLoader:
    """The batches of a `MixtureDataLoader` on the device.

    Attributes:
        counts: As of the last `update_counts`.
    """

    def __init__(
        self,
        loader: MixtureDataLoader,
        accelerator: Accelerator,
        output: Path,
        on_invalid_sample: str = "stop",
    ) -> None:
        """`on_invalid_sample`: "stop" raises an InputError, "skip" writes a line to `output`."""
        self.loader = loader
        self.accelerator = accelerator
        self.on_invalid_sample = on_invalid_sample
        self.rank, self.world_size = accelerator.process_index, accelerator.num_processes
        suffix = f"_{self.rank}" if self.rank else ""
        self._skipped_file = output / f"skipped{suffix}.jsonl"
        self._skipped_lines = 0  # of that file, since the start of the run
        self._has_valid_sample = False
        self._new = DataCounts()
        self._totals = torch.zeros(len(DataCounts._fields), dtype=torch.long)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        self._truncate_skipped_file()
        device = self.accelerator.device
        for batch in self.loader:
            self._skip(batch.skipped)
            counts = (batch.num_samples, batch.num_tokens, batch.num_images, len(batch.skipped))
            self._new = DataCounts(*(sum(pair) for pair in zip(self._new, counts, strict=True)))
            # Only pinned memory is safe to copy from while the next batch is loaded.
            yield {
                name: tensor.to(device, non_blocking=self.loader.pin_memory)
                for name, tensor in batch.inputs.items()
            }

    @property
    def epoch_size(self) -> int | None:
        """Samples per epoch; None for sources with weights."""
        return self.loader.dataset.epoch_size

    @property
    def wait_seconds(self) -> float:
        """Seconds that this process has waited for batches in this session."""
        return self.loader.wait_seconds

    @property
    def counts(self) -> DataCounts:
        """The counts of all processes."""
        return DataCounts(*self._totals.tolist())

    def update_counts(self) -> None:
        """Add the counts of all processes since the last call; all of them must call it.

        Raises:
            InputError: The first `MAX_SKIPPED_AT_START` samples were all skipped.
        """
        new = torch.tensor(self._new)
        # On the device only with several processes, because reading it back blocks.
        if self.world_size > 1:
            new = self.accelerator.reduce(new.to(self.accelerator.device), "sum")
        self._totals = self._totals.to(new.device) + new
        self._new = DataCounts()
        if self.on_invalid_sample == "skip" and not self._has_valid_sample:
            counts = self.counts
            self._has_valid_sample = counts.samples > 0
            if not counts.samples and counts.num_skipped >= MAX_SKIPPED_AT_START:
                raise InputError(
                    f"the first {counts.num_skipped} samples were all skipped: see "
                    f"{self._skipped_file.parent}/skipped.jsonl, and check `data`",
                    ErrorCode.EMPTY_DATASET,
                )

    def save(self, checkpoint: Path) -> None:
        """Write the position of this process."""
        state = {
            "world_size": self.world_size,
            "sizes": self.loader.dataset.sizes,
            "num_skipped": self._skipped_lines,
            "loader": self.loader.state,
        }
        atomic_write_text(self._state_file(checkpoint), json.dumps(state) + "\n")

    def load(self, checkpoint: Path) -> None:
        """Resume after the batches of a checkpoint.

        Raises:
            InputError: The position is missing or damaged, or the data or the number of processes
                has changed.
        """
        path = self._state_file(checkpoint)
        try:
            state = json.loads(path.read_text(encoding="utf-8"))
            world_size, sizes = state["world_size"], state["sizes"]
            self._skipped_lines, self.loader.state = state["num_skipped"], state["loader"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{path} cannot be read, so the run cannot be resumed; overwrite=true starts over",
                ErrorCode.RESUME_MISMATCH,
            ) from error
        for name, before, now in (
            ("samples per source", sizes, self.loader.dataset.sizes),
            ("processes", world_size, self.world_size),
        ):
            if before != now:
                raise InputError(
                    f"{checkpoint} is of a run with other {name}: {before}, now {now}. Resume with "
                    "the same, or overwrite=true to start over",
                    ErrorCode.RESUME_MISMATCH,
                )

    def _state_file(self, checkpoint: Path) -> Path:
        return checkpoint / f"data_state_{self.rank}.json"

    def _skip(self, samples: list[InvalidSample]) -> None:
        for sample in samples:
            # The source as such is invalid, not a sample of it.
            if sample.code is ErrorCode.FILE_CHANGED:
                raise sample.to_error()
        if not samples:
            return
        if self.on_invalid_sample == "stop":
            raise InputError(
                f"{samples[0].source}: {samples[0].reason} (on_invalid_sample=skip skips and "
                "counts such samples)",
                samples[0].code,
            )
        with self._skipped_file.open("a", encoding="utf-8") as file:
            for sample in samples:
                line = {"source": sample.source, "reason": sample.reason, "code": sample.code}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        self._skipped_lines += len(samples)

    def _truncate_skipped_file(self) -> None:
        """Remove the lines of an earlier run, and of this run after its last checkpoint."""
        path = self._skipped_file
        if path.exists():
            lines = path.read_bytes().splitlines(keepends=True)[: self._skipped_lines]
            if lines:
                atomic_write_text(path, b"".join(lines).decode())
            else:
                path.unlink()


def run_steps(recipe: Recipe, epoch_size: int | None) -> int:
    """Optimizer steps of a run with `epoch_size` samples per epoch.

    The last batch of the last epoch is completed with samples of the next epoch.
    """
    if recipe.max_steps is not None:
        return recipe.max_steps
    assert recipe.epochs is not None and epoch_size is not None  # validated by the recipe
    # The margin is for 1.1 epochs of 10 samples, where 1.1 * 10 is slightly more than 11.
    return max(1, math.ceil(recipe.epochs * epoch_size / recipe.batch_size - 1e-6))
