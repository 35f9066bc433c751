"""What the Trainer is fed with: batches without an end, what was in them, and where they stand.

    OUTPUT/checkpoints/checkpoint-N/data_state_RANK.json    where each process' batches stand
    OUTPUT/left_out.jsonl    with `on_invalid_sample: skip`, a line a sample that was left out; of processes
                             but the first left_out_RANK.jsonl

The loader knows the process' share and an exact position, so accelerate neither shards it nor skips
batches of it.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from owl2.data.dataloader import MixtureDataLoader
from owl2.data.sample import InvalidSample
from owl2.errors import ErrorCode, InputError
from owl2.files import atomic_write_text
from owl2.train.recipe import Recipe

# So many samples left out and none used: not some rows are bad, but what the recipe says of them.
ALL_BAD = 100


class Seen(NamedTuple):
    """What all processes together have been given since this one began."""

    samples: int = 0
    tokens: int = 0
    images: int = 0
    left_out: int = 0


class Feed:
    """A loader's batches, on the device, and a count of what was in them."""

    def __init__(
        self,
        loader: MixtureDataLoader,
        accelerator: Accelerator,
        output: Path,
        on_invalid_sample: str = "stop",
    ) -> None:
        """`on_invalid_sample`: "stop" raises at a sample that cannot be used, "skip" writes it to `output`."""
        self.loader = loader
        self.accelerator = accelerator
        self.on_invalid_sample = on_invalid_sample
        self.rank, self.world = accelerator.process_index, accelerator.num_processes
        self._left_out = output / f"left_out{f'_{self.rank}' * (self.rank > 0)}.jsonl"
        self._lines = 0  # of that file, since the run began
        self._used = False  # whether any sample was
        self._fresh = Seen()
        self._seen = torch.zeros(len(Seen._fields), dtype=torch.long)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        _keep_lines(self._left_out, self._lines)
        device = self.accelerator.device
        for batch in self.loader:
            self._leave_out(batch.skipped)
            held = (batch.num_samples, batch.num_tokens, batch.num_images, len(batch.skipped))
            self._fresh = Seen(*(sum(pair) for pair in zip(self._fresh, held, strict=True)))
            # Only from pinned memory may a copy still be under way when the next batch is written.
            yield {
                name: tensor.to(device, non_blocking=self.loader.pin_memory)
                for name, tensor in batch.inputs.items()
            }

    def share_counts(self) -> None:
        """Add up what all processes took since the last call; all of them must call it.

        Raises:
            InputError: `ALL_BAD` samples were left out, and not one could be used.
        """
        # On the device only where others have to be asked, as reading it back then waits.
        if self.world > 1:
            fresh = torch.tensor(self._fresh, device=self.accelerator.device)
            shared: torch.Tensor = self.accelerator.reduce(fresh, "sum")
            self._seen = self._seen.to(shared.device) + shared
        else:
            self._seen += torch.tensor(self._fresh)
        self._fresh = Seen()
        if self.on_invalid_sample == "skip" and not self._used:
            self._used = self.seen.samples > 0
            if not self._used and self.seen.left_out >= ALL_BAD:
                raise InputError(
                    f"the first {self.seen.left_out} samples were all left out, as none can be "
                    f"used: see {self._left_out.parent}/left_out.jsonl, and check `data`"
                )

    @property
    def seen(self) -> Seen:
        """As of the last `share_counts`."""
        return Seen(*self._seen.tolist())

    def save(self, checkpoint: Path) -> None:
        """Write where this process' batches stand."""
        state = {
            "world": self.world,
            "sizes": self.loader.dataset.sizes,
            "left_out": self._lines,
            "loader": self.loader.state,
        }
        atomic_write_text(self._state_file(checkpoint), json.dumps(state) + "\n")

    def load(self, checkpoint: Path) -> None:
        """Go on with the batches after those of a checkpoint.

        Raises:
            InputError: what `save` wrote is missing or damaged.
        """
        path = self._state_file(checkpoint)
        try:
            state = json.loads(path.read_text(encoding="utf-8"))
            world, sizes = state["world"], state["sizes"]
            self._lines, self.loader.state = state["left_out"], state["loader"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{path} cannot be read, so the run cannot go on with the samples that come next; "
                "overwrite=true starts anew"
            ) from error
        if sizes != self.loader.dataset.sizes:
            raise InputError(
                f"{checkpoint} is of a run on sources with {sizes} samples, now they have "
                f"{self.loader.dataset.sizes}: their order would be another. Give the same "
                "data, or overwrite=true to start anew"
            )
        if world != self.world:
            raise InputError(
                f"{checkpoint} is of a run on {world} processes, this one has "
                f"{self.world}: go on with as many, or overwrite=true to start anew"
            )

    def _state_file(self, checkpoint: Path) -> Path:
        return checkpoint / f"data_state_{self.rank}.json"

    def _leave_out(self, samples: list[InvalidSample]) -> None:
        for bad in samples:
            # Not a row is bad then but all of a source, which nobody asked to be left out.
            if bad.code == ErrorCode.FILE_CHANGED:
                raise bad.to_error()
        if not samples:
            return
        if self.on_invalid_sample == "stop":
            raise InputError(
                f"{samples[0].source}: {samples[0].reason} (on_invalid_sample=skip leaves such samples out "
                "and counts them)"
            )
        with self._left_out.open("a", encoding="utf-8") as file:
            for bad in samples:
                line = {"source": bad.source, "reason": bad.reason, "code": bad.code}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        self._lines += len(samples)


def _keep_lines(path: Path, count: int) -> None:
    """Drop what an earlier run, or this one after its last saved state, has written."""
    if not path.exists():
        return
    lines = path.read_bytes().splitlines(keepends=True)[:count]
    if lines:
        atomic_write_text(path, b"".join(lines).decode())
    else:
        path.unlink()


def run_steps(recipe: Recipe, epoch_size: int | None) -> int:
    """Optimizer steps of a run; `epoch_size`: samples an epoch.

    The last batch of the last epoch is filled up with samples of the next.
    """
    if recipe.max_steps is not None:
        return recipe.max_steps
    assert recipe.epochs is not None and epoch_size is not None  # a recipe has one or the other
    # Not 11 for 1.1 epochs of 10 samples because 1.1 * 10 is a little more than 11.
    return max(1, math.ceil(recipe.epochs * epoch_size / recipe.batch_size - 1e-6))


class TellEpochs(TrainerCallback):
    """The Trainer takes the endless batches for one epoch: tells it and the callbacks the data's.

    With weights there are none, and `epoch` stays 0.
    """

    def __init__(self, epoch_size: int | None, batch_size: int) -> None:
        self.epoch_size = epoch_size
        self.batch_size = batch_size
        self.handler: CallbackHandler | None = None

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        if self.epoch_size is None:
            state.epoch = 0.0
            return
        taken = state.global_step * self.batch_size
        state.epoch = taken / self.epoch_size
        ended = taken // self.epoch_size > (taken - self.batch_size) // self.epoch_size
        if ended and state.global_step < state.max_steps and self.handler is not None:
            self.handler.on_epoch_end(args, state, control)
