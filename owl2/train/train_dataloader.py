"""The Trainer's data loader: endless batches on the device, their counts, and their position.

    OUTPUT/checkpoints/checkpoint-N/data_state_RANK.json    the position of each process
    OUTPUT/skipped.jsonl    with `on_invalid_sample: skip`, a line per skipped sample; processes
                            other than the first write skipped_RANK.jsonl

`MixtureDataLoader` gives each process its share and has an exact position, so accelerate must
neither shard it nor skip batches.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator

from owl2.data.dataloader import MixtureDataLoader
from owl2.data.sample import InvalidSample
from owl2.errors import ErrorCode, InputError
from owl2.files import atomic_write_json, atomic_write_text

# If so many samples at the start are all invalid, the recipe is wrong and not some rows.
MAX_SKIPPED_AT_START = 100
# Likewise if they have no images and only the image path is trained. Shards can start with texts.
MAX_WITHOUT_IMAGES_AT_START = 10_000


class DataCounts(NamedTuple):
    """Samples of all processes in this session, with their tokens and images."""

    samples: int = 0
    tokens: int = 0
    images: int = 0
    num_skipped: int = 0


class TrainDataLoader:
    """The batches of a `MixtureDataLoader` on the device.

    Attributes:
        epoch_size: Samples per epoch; None for sources with weights.
    """

    def __init__(
        self,
        loader: MixtureDataLoader,
        accelerator: Accelerator,
        output: Path,
        on_invalid_sample: str = "stop",
        run_size: int = MAX_SKIPPED_AT_START,
        needs_images: bool = False,
    ) -> None:
        """The loader of a run of `run_size` samples.

        Args:
            on_invalid_sample: "stop" raises an InputError, "skip" writes a line to `output`.
            needs_images: A sample without images trains nothing.
        """
        self.loader = loader
        self.accelerator = accelerator
        self.on_invalid_sample = on_invalid_sample
        self.epoch_size = loader.dataset.epoch_size
        self._max_skipped = min(MAX_SKIPPED_AT_START, run_size, self.epoch_size or run_size)
        self._max_without_images = min(MAX_WITHOUT_IMAGES_AT_START, run_size)
        self._needs_images = needs_images  # until there is one
        self.rank, self.world_size = accelerator.process_index, accelerator.num_processes
        suffix = f"_{self.rank}" if self.rank else ""
        self._skipped_file = output / f"skipped{suffix}.jsonl"
        self._skipped_lines = 0  # of that file, since the start of the run
        self._has_valid_sample = False
        self._new = self._totals = torch.zeros(len(DataCounts._fields), dtype=torch.long)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        path = self._skipped_file
        if path.exists():
            # Without the lines of an earlier run, and of this run after its last checkpoint.
            lines = path.read_bytes().splitlines(keepends=True)[: self._skipped_lines]
            path.unlink()
            if lines:
                atomic_write_text(path, b"".join(lines).decode())
        for batch in self.loader:
            self._skip(batch.skipped)
            counts = (batch.num_samples, batch.num_tokens, batch.num_images, len(batch.skipped))
            self._new = self._new + torch.tensor(counts)
            # Only pinned memory is safe to copy from while the next batch is loaded.
            yield {
                name: tensor.to(self.accelerator.device, non_blocking=self.loader.pin_memory)
                for name, tensor in batch.inputs.items()
            }

    @property
    def counts(self) -> DataCounts:
        """The counts of all processes as of the last `update_counts`."""
        return DataCounts(*self._totals.tolist())

    @property
    def wait_seconds(self) -> float:
        """Seconds that this process has waited for batches in this session."""
        return self.loader.wait_seconds

    def update_counts(self) -> None:
        """Add the counts of all processes since the last call; all of them must call it.

        Raises:
            InputError: The first `MAX_SKIPPED_AT_START` samples, an epoch or the run were skipped.
                Images are needed, and the first `MAX_WITHOUT_IMAGES_AT_START` samples or the run
                have none.
        """
        new = self._new
        # On the device only with several processes, because reading it back blocks.
        if self.world_size > 1:
            new = self.accelerator.reduce(new.to(self.accelerator.device), "sum")
        self._totals = self._totals.to(new.device) + new
        self._new = torch.zeros_like(self._new)
        if self.on_invalid_sample == "skip" and not self._has_valid_sample:
            counts = self.counts
            self._has_valid_sample = counts.samples > 0
            if not counts.samples and counts.num_skipped >= self._max_skipped:
                raise InputError(
                    f"the first {counts.num_skipped} samples were all skipped; "
                    f"{self._skipped_file.parent}/skipped.jsonl has the reasons. If samples are "
                    "cut before their first answer, increase max_length",
                    ErrorCode.EMPTY_DATASET,
                )
        if self._needs_images:
            counts = self.counts
            self._needs_images = not counts.images
            if not counts.images and counts.samples >= self._max_without_images:
                raise InputError(
                    f"the first {counts.samples} samples have no images, but only the image path "
                    "is trained; add samples with images to `data`",
                    ErrorCode.MISSING_IMAGE,
                )

    def save(self, checkpoint: Path) -> None:
        """Write the position of this process."""
        state = {
            "world_size": self.world_size,
            "sizes": self.loader.dataset.sizes,
            "num_skipped": self._skipped_lines,
            "has_valid_sample": self._has_valid_sample,
            "loader": self.loader.state,
        }
        atomic_write_json(checkpoint / f"data_state_{self.rank}.json", state, indent=None)

    def load(self, checkpoint: Path) -> None:
        """Resume after the batches of a checkpoint.

        Raises:
            InputError: The position is missing or damaged, or the data or the number of processes
                has changed.
        """
        path = checkpoint / f"data_state_{self.rank}.json"
        try:
            state = json.loads(path.read_text(encoding="utf-8"))
            before = (state["sizes"], state["world_size"])
            self._skipped_lines, self.loader.state = state["num_skipped"], state["loader"]
            self._has_valid_sample = state.get(
                "has_valid_sample", False
            )  # not in older checkpoints
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{path} cannot be read, so the run cannot be resumed; overwrite=true starts over",
                ErrorCode.RESUME_MISMATCH,
            ) from error
        now = (self.loader.dataset.sizes, self.world_size)
        if before != now:
            raise InputError(
                f"{checkpoint} belongs to a run with (samples per source, processes) = {before}; "
                f"this run has {now}. Resume with the earlier values, or set overwrite=true",
                ErrorCode.RESUME_MISMATCH,
            )

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
