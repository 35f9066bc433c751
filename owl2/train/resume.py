"""What a run leaves in its output directory, so that the same command goes on after a stop.

    OUTPUT/checkpoints/recipe.json      what is being trained: another recipe may not go on with it
    OUTPUT/checkpoints/checkpoint-N/    transformers' Trainer's state after step N
    OUTPUT/checkpoints/latest.json      which of them is whole; written last, in one step
    OUTPUT/model/                       the finished model; then `checkpoints` is gone

A checkpoint that a kill cut short is never in `latest.json`, so it is never picked up. Of the
others all files must be there: without an optimizer's state the Trainer would silently begin anew.
"""

import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from owl2.errors import InputError
from owl2.files import write_whole
from owl2.train.recipe import Recipe

# Settings that change neither what is learned nor in which order.
INDIFFERENT = {"output", "overwrite", "log_every", "save_every", "workers"}

# What a state consists of, beside the weights.
STATE_FILES = ("optimizer.pt", "scheduler.pt", "trainer_state.json", "rng_state*.pth")
WEIGHTS, SHARDS = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class Position:
    """Where a run stands."""

    step: int = 0
    samples: int = 0
    left_out: int = 0
    seconds: float = 0.0
    labelled: bool = False  # whether there was anything to learn yet


@dataclass(frozen=True)
class Saved:
    """A saved state: the Trainer's directory, and the run's position in it."""

    directory: Path
    position: Position


def checkpoints_of(output: Path) -> Path:
    """The directory of a run's saved states."""
    return output / "checkpoints"


def find_state(recipe: Recipe) -> Saved | None:
    """The state that a run of this recipe goes on from, None for a start; changes nothing.

    Raises:
        InputError: `output` holds a finished model, another recipe's unfinished run or a damaged
            state, and `overwrite` is not set.
    """
    output = Path(recipe.output)
    checkpoints = checkpoints_of(output)
    if output.exists() and not output.is_dir():
        raise InputError(f"output: {output} is a file; give a directory")
    if (output / "model").exists() and not recipe.overwrite:
        raise InputError(
            f"{output / 'model'} is a finished model; give another `output`, or overwrite=true"
        )
    try:
        if not (checkpoints / "latest.json").is_file():
            return None
        _require_same(recipe, _read(checkpoints / "recipe.json"))
        return _latest(checkpoints)
    except InputError:
        if recipe.overwrite:
            return None
        raise


def _require_same(recipe: Recipe, before: dict[str, Any]) -> None:
    identity = _identity(recipe)
    changed = [key for key in identity if before.get(key) != identity[key]]
    if changed:
        raise InputError(
            f"{recipe.output} holds an unfinished run of another recipe (differs in "
            f"{', '.join(changed)}); give another `output`, or overwrite=true to start anew"
        )


def begin(recipe: Recipe) -> None:
    """Make the output directory ready for a run from the start."""
    checkpoints = checkpoints_of(Path(recipe.output))
    if checkpoints.exists():
        shutil.rmtree(checkpoints)
    write_whole(checkpoints / "recipe.json", json.dumps(_identity(recipe), indent=2) + "\n")


def _identity(recipe: Recipe) -> dict[str, Any]:
    return recipe.model_dump(mode="json", exclude=INDIFFERENT)


def _latest(checkpoints: Path) -> Saved:
    pointer = checkpoints / "latest.json"
    content = _read(pointer)
    try:
        saved = Saved(checkpoints / content["checkpoint"], Position(**content["position"]))
    except (KeyError, TypeError) as error:
        raise _damaged(pointer, "does not say which state is whole") from error
    _require_whole(saved)
    return saved


def _require_whole(saved: Saved) -> None:
    directory = saved.directory
    for pattern in STATE_FILES:
        _require_file(directory, pattern)
    if (directory / SHARDS).is_file():
        shards = _read(directory / SHARDS).get("weight_map", {})
        for shard in sorted(set(shards.values())):
            _require_file(directory, shard)
    else:
        _require_file(directory, WEIGHTS)
    state = directory / "trainer_state.json"
    if _read(state).get("global_step") != saved.position.step:
        raise _damaged(state, f"is not of step {saved.position.step}")


def _require_file(directory: Path, pattern: str) -> None:
    files = list(directory.glob(pattern))
    if not files or not all(file.stat().st_size for file in files):
        raise _damaged(directory, f"lacks {pattern}, or it is empty")


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise _damaged(path, f"cannot be read: {error.strerror}") from error
    except ValueError as error:  # neither JSON nor text
        raise _damaged(path, "is damaged") from error
    if not isinstance(content, dict):
        raise _damaged(path, "is damaged")
    return content


def _damaged(path: Path, what: str) -> InputError:
    return InputError(
        f"{path} {what}, so the run cannot go on as it was; overwrite=true starts anew"
    )


class KeepState(TrainerCallback):
    """Points to each new checkpoint once it is whole, and drops the one before."""

    def __init__(self, output: Path, position: Callable[[int], Position]) -> None:
        """`position` is called with the step when a checkpoint has been written."""
        self.checkpoints = checkpoints_of(output)
        self.position = position

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        # The finished model is written next; going on from a last step would train one too many.
        if state.global_step >= state.max_steps:
            control.should_save = False

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        name = f"checkpoint-{state.global_step}"
        pointer = {"checkpoint": name, "position": asdict(self.position(state.global_step))}
        write_whole(self.checkpoints / "latest.json", json.dumps(pointer) + "\n")
        for other in self.checkpoints.glob("checkpoint-*"):
            if other.name != name:
                shutil.rmtree(other)


class StopOnInterrupt(TrainerCallback):
    """On Ctrl-C: finish the step, save the state, stop. A second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.asked = False
        self.stopped = False
        self._before: Any = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        process = os.getpid()

        def ask(number: int, frame: FrameType | None) -> None:
            # Processes that prepare batches inherit this and get the terminal's Ctrl-C, too; they
            # must go on until the step is done.
            self.asked = True
            if os.getpid() == process:
                signal.signal(signal.SIGINT, self._before)
                # Not `print`: the signal may have come in the middle of one.
                os.write(2, b"\nfinishing this step, then saving; Ctrl-C again stops at once\n")

        self._before = signal.signal(signal.SIGINT, ask)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        if self.asked and state.global_step < state.max_steps:
            self.stopped = True
            control.should_log = control.should_save = control.should_training_stop = True

    def release(self) -> None:
        """Give Ctrl-C its usual meaning back."""
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
