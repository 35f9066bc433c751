"""What a run leaves in its output directory, so that the same command goes on after a stop.

    OUTPUT/checkpoints/recipe.json      what is being trained: another recipe may not go on with it
    OUTPUT/checkpoints/checkpoint-N/    transformers' Trainer's state after step N
    OUTPUT/checkpoints/latest.json      which of them is whole; written last, in one step
    OUTPUT/model/                       the finished model; then `checkpoints` is gone

A checkpoint that a kill cut short is never in `latest.json`, so it is never picked up. Of the one
that is, all files must be there in the size that they had: without an optimizer's state the Trainer
would silently begin anew. Each checkpoint replaces the one before, once it is whole and on disk.
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
from owl2.files import atomic_write_text
from owl2.train.disk_errors import sizes_on_disk, writing
from owl2.train.distributed import Team
from owl2.train.recipe import Recipe

# Settings that change neither what is learned nor in which order. `on_invalid_sample`, because a run that
# stopped at a bad row goes on with it left out.
INDIFFERENT = {
    "output",
    "overwrite",
    "dataloader_num_workers",
    "on_invalid_sample",
    "logging_steps",
    "save_steps",
}
INDIFFERENT |= {"validation", "tensorboard", "wandb_project"}  # which only watch


@dataclass(frozen=True)
class Position:
    """Where a run stands, all its processes and all its sessions taken together."""

    step: int = 0
    samples: int = 0
    tokens: int = 0
    images: int = 0
    left_out: int = 0
    seconds: float = 0.0
    waited: float = 0.0  # of them for batches, a process on average


@dataclass(frozen=True)
class Saved:
    """A saved state: the Trainer's directory, and the run's position in it."""

    directory: Path
    position: Position


def checkpoints_of(output: Path) -> Path:
    """The directory of a run's saved states."""
    return output / "checkpoints"


def find_state(recipe: Recipe, team: Team) -> Saved | None:
    """The state that a run of this recipe goes on from, None for a start; changes nothing.

    Raises:
        InputError: `output` holds a finished model, another recipe's unfinished run or a damaged
            state, and `overwrite` is not set; or one of other processes than this `team`.
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
        return _latest(checkpoints, team)
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


def begin(recipe: Recipe, saved: Saved | None) -> None:
    """Make the output directory ready for a run, from the start or from a state.

    What a kill left half written goes; nobody looks at it any more, and it takes room.
    """
    output = Path(recipe.output)
    checkpoints = checkpoints_of(output)
    for part in output.glob(".model.part-*"):
        shutil.rmtree(part)
    if saved is not None:
        _drop_others(saved.directory)
        return
    if checkpoints.exists():
        # First: while the rest goes, a kill must not leave a pointer to what is half gone.
        (checkpoints / "latest.json").unlink(missing_ok=True)
        shutil.rmtree(checkpoints)
    atomic_write_text(checkpoints / "recipe.json", json.dumps(_identity(recipe), indent=2) + "\n")


def _drop_others(directory: Path) -> None:
    for other in directory.parent.glob("checkpoint-*"):
        if other.name != directory.name:
            shutil.rmtree(other)


def _identity(recipe: Recipe) -> dict[str, Any]:
    return recipe.model_dump(mode="json", exclude=INDIFFERENT)


def _latest(checkpoints: Path, team: Team) -> Saved:
    pointer = checkpoints / "latest.json"
    content = _read(pointer)
    try:
        saved = Saved(checkpoints / content["checkpoint"], Position(**content["position"]))
        processes, sharing, files = content["processes"], content["sharing"], content["files"]
        _require_whole(saved, files)
    except (KeyError, TypeError, AttributeError) as error:
        raise _damaged(pointer, "does not say which state is whole") from error
    if (processes, sharing) != (team.size, team.sharing):
        raise InputError(
            f"{saved.directory} is the state of {processes} processes ({sharing}), and these are "
            f"{team.size} ({team.sharing}): go on with as many and the same configuration, or "
            "overwrite=true starts anew"
        )
    return saved


def _require_whole(saved: Saved, files: dict[str, int]) -> None:
    for name, size in files.items():
        path = saved.directory / name
        if not path.is_file() or path.stat().st_size != size:
            raise _damaged(saved.directory, f"lacks {name}, or a part of it")
    state = saved.directory / "trainer_state.json"
    if _read(state).get("global_step") != saved.position.step:
        raise _damaged(state, f"is not of step {saved.position.step}")


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

    def __init__(self, output: Path, position: Callable[[int], Position], team: Team) -> None:
        """`position` is called with the step when a checkpoint has been written."""
        self.checkpoints = checkpoints_of(output)
        self.position = position
        self.team = team

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
        # A line's loss is the mean since the line before. With a line at each state, those that
        # follow are the same whether or not the run was stopped in between.
        control.should_log |= control.should_save

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        position = self.position(state.global_step)
        with self.team.together():
            if self.team.first:
                directory = self.checkpoints / f"checkpoint-{state.global_step}"
                with writing(directory):
                    self._point_to(directory, position)
                _drop_others(directory)

    def _point_to(self, directory: Path, position: Position) -> None:
        files = sizes_on_disk(directory)
        missing = [name for name in self._of_each_process() if name not in files]
        if missing:
            raise InputError(
                f"{directory} lacks {missing[0]}: `output` must be on a disk that all nodes share"
            )
        pointer = {
            "checkpoint": directory.name,
            "position": asdict(position),
            "processes": self.team.size,
            "sharing": self.team.sharing,
            "files": files,
        }
        atomic_write_text(self.checkpoints / "latest.json", json.dumps(pointer) + "\n")

    def _of_each_process(self) -> list[str]:
        if self.team.size == 1:
            return ["rng_state.pth"]
        return [f"rng_state_{rank}.pth" for rank in range(self.team.size)]


class Stop(TrainerCallback):
    """On Ctrl-C or SIGTERM: finish the step, save the state, stop; all processes at the same step.

    A second one stops this process at once, unless there are others: launchers pass signals on, so
    each may come twice.

    Attributes:
        signal: what the run was stopped by, 0 if it was not.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, team: Team) -> None:
        self.team = team
        self.signal = 0
        self._asked = 0
        self._before: dict[int, Any] = {}

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
            first, self._asked = not self._asked, number
            if os.getpid() != process or not first:
                return
            if self.team.size == 1:
                self.release()
            if self.team.first:
                # Not `print`: the signal may have come in the middle of one.
                os.write(2, b"\nfinishing this step, then saving\n")

        for number in self.SIGNALS:
            self._before[number] = signal.signal(number, ask)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        asked = self.team.total(*(self._asked == number for number in self.SIGNALS))
        if any(asked) and state.global_step < state.max_steps:
            self.signal = max(n for n, count in zip(self.SIGNALS, asked, strict=True) if count)
            control.should_log = control.should_save = control.should_training_stop = True

    def release(self) -> None:
        """Give the signals their usual meaning back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
