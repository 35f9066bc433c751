"""Checkpoints of an unfinished run: the same command resumes it after a stop or a crash.

    OUTPUT/checkpoints/recipe.json      the recipe; another recipe cannot resume the run
    OUTPUT/checkpoints/checkpoint-N/    the state of transformers' Trainer after step N
    OUTPUT/checkpoints/latest.json      the last complete checkpoint; replaced atomically
    OUTPUT/model/                       the finished model; then `checkpoints` is removed

A checkpoint that was interrupted is never in `latest.json`, so it is never used. All files of the
latest checkpoint must have their original size: without an optimizer state the Trainer would start
the optimizer from zero without an error. A new checkpoint is flushed to the disk before it replaces
the previous one.
"""

import errno
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from transformers import TrainerCallback

from owl2.checkpoints.weight_names import module_name
from owl2.errors import ErrorCode, InputError
from owl2.files import atomic_write_json, restore_directory
from owl2.train.distributed import DistributedContext
from owl2.train.recipe import Recipe

# Settings that do not affect training; a run may be resumed with other values. A run that stopped
# at an invalid sample may skip it (`on_invalid_sample`).
KEYS_IGNORED_ON_RESUME = {
    *("output", "overwrite", "dataloader_num_workers", "on_invalid_sample"),
    *("logging_steps", "save_steps", "validation", "tensorboard", "wandb_project"),
}

DISK_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
# Parts of torch.save's message for a full disk, which does not name the reason.
TORCH_WRITERS = ("inline_container", "iostream", "PytorchStreamWriter")


@dataclass(frozen=True)
class TrainingProgress:
    """The totals of a run over all processes and all sessions.

    Attributes:
        data_wait_seconds: Part of `seconds` spent waiting for batches; the mean over processes.
    """

    step: int = 0
    samples: int = 0
    tokens: int = 0
    images: int = 0
    num_skipped: int = 0
    seconds: float = 0.0
    data_wait_seconds: float = 0.0


@dataclass(frozen=True)
class SavedState:
    """A complete checkpoint: the content of `latest.json`.

    Attributes:
        checkpoint: Name of its directory.
        progress: Of the run.
        files: Sizes of its files in bytes.
    """

    checkpoint: str
    progress: TrainingProgress
    world_size: int
    sharding: str | None
    files: dict[str, int]


def checkpoints_of(output: Path) -> Path:
    """The directory of a run's checkpoints."""
    return output / "checkpoints"


def find_state(recipe: Recipe, context: DistributedContext) -> SavedState | None:
    """The state from which a run of this recipe resumes; None for a new run.

    Changes nothing, except that a model whose replacement was interrupted is restored.

    Raises:
        InputError: `output` contains a finished model, an unfinished run of another recipe, a
            damaged state or one of other processes, and `overwrite` is not set.
    """
    output = Path(recipe.output)
    if output.exists() and not output.is_dir():
        raise InputError(f"output: {output} is a file; choose a directory", ErrorCode.FILE_EXISTS)
    if context.is_main:
        restore_directory(output / "model")
    if (output / "model").exists() and not recipe.overwrite:
        raise InputError(
            f"{output / 'model'} is a finished model; choose another `output`, or overwrite=true",
            ErrorCode.FILE_EXISTS,
        )
    if not (checkpoints_of(output) / "latest.json").is_file():
        return None
    try:
        return _read_state(checkpoints_of(output), recipe, context)
    except InputError:
        if recipe.overwrite:
            return None
        raise


def _read_state(checkpoints: Path, recipe: Recipe, context: DistributedContext) -> SavedState:
    def mismatch(problem: str) -> InputError:
        return InputError(
            f"the run in {checkpoints.parent} cannot be resumed: {problem}; set another `output` "
            "or overwrite=true to start over",
            ErrorCode.RESUME_MISMATCH,
        )

    def read(name: str, kind: Any) -> Any:
        try:
            return TypeAdapter(kind).validate_json((checkpoints / name).read_bytes())
        except (OSError, ValidationError) as error:
            raise mismatch(f"{checkpoints / name} is missing or damaged") from error

    before, now = read("recipe.json", dict[str, Any]), _identity(recipe)
    if changed := [key for key in now if before.get(key) != now[key]]:
        raise mismatch(f"its recipe differs in {', '.join(changed)}")
    saved: SavedState = read("latest.json", SavedState)
    for name, size in saved.files.items():
        path = checkpoints / saved.checkpoint / name
        if not path.is_file() or path.stat().st_size != size:
            raise mismatch(f"{path.parent} lacks {name}, or a part of it")
    for metadata in (checkpoints / saved.checkpoint).rglob(".metadata"):  # of sharded weights
        keys = FileSystemReader(metadata.parent).read_metadata().state_dict_metadata
        if any(module_name(key) != key for key in keys):
            raise mismatch(
                f"{metadata.parent} was written by an earlier version of owl2, which names weights "
                "differently; finish the run with that version"
            )
    state = f"{saved.checkpoint}/trainer_state.json"
    if read(state, dict[str, Any]).get("global_step") != saved.progress.step:
        raise mismatch(f"{checkpoints / state} is not of step {saved.progress.step}")
    if (saved.world_size, saved.sharding) != (context.world_size, context.sharding):
        raise mismatch(
            f"{saved.checkpoint} was written by {saved.world_size} processes (sharding: "
            f"{saved.sharding}), but there are {context.world_size} (sharding: {context.sharding})"
        )
    return saved


def start_run(recipe: Recipe, saved: SavedState | None) -> None:
    """Prepare the output directory for a new or a resumed run; remove incomplete files."""
    output = Path(recipe.output)
    checkpoints = checkpoints_of(output)
    for part in output.glob(".model.part-*"):
        shutil.rmtree(part)
    if saved is not None:
        _remove_others(checkpoints / saved.checkpoint)
        return
    if checkpoints.exists():
        # First, so that a crash during the removal leaves no pointer to a removed checkpoint.
        (checkpoints / "latest.json").unlink(missing_ok=True)
        shutil.rmtree(checkpoints)
    atomic_write_json(checkpoints / "recipe.json", _identity(recipe))


def _remove_others(directory: Path) -> None:
    for other in directory.parent.glob("checkpoint-*"):
        if other.name != directory.name:
            shutil.rmtree(other)


def _identity(recipe: Recipe) -> dict[str, Any]:
    return recipe.model_dump(mode="json", exclude=KEYS_IGNORED_ON_RESUME)


class CheckpointCallback(TrainerCallback):
    """Publishes each complete checkpoint in `latest.json` and removes the previous one.

    On SIGINT or SIGTERM: finish the step, save a checkpoint, stop; in all processes. A second
    signal ends a single process immediately. With several processes it does not, because launchers
    forward signals, so that each may arrive twice.

    Attributes:
        signal: The signal that stopped the run, or 0.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(
        self, output: Path, progress: Callable[[int], TrainingProgress], context: DistributedContext
    ) -> None:
        """`progress`: The progress after a step; all processes call it."""
        self.checkpoints = checkpoints_of(output)
        self.progress = progress
        self.context = context
        self.signal = 0
        self._received = 0
        self._handlers: dict[int, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        process = os.getpid()

        def receive(number: int, frame: FrameType | None) -> None:
            # Data loader workers inherit this handler and get the terminal's Ctrl-C too; they must
            # continue until the step is finished.
            first, self._received = not self._received, number
            if os.getpid() != process or not first:
                return
            if self.context.world_size == 1:
                self.restore_handlers()
            if self.context.is_main:
                # Not `print`, because the signal may have interrupted a `print`.
                os.write(2, b"\nfinishing this step, then saving a checkpoint\n")

        for number in self.SIGNALS:
            self._handlers[number] = signal.signal(number, receive)

    def restore_handlers(self) -> None:
        """Restore the previous signal handlers."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        is_last = state.global_step >= state.max_steps
        counts = self.context.all_reduce_sum(*(self._received == s for s in self.SIGNALS))
        if any(counts) and not is_last:
            self.signal = max(s for s, count in zip(self.SIGNALS, counts, strict=True) if count)
            control.should_save = control.should_training_stop = True
        # After the last step the model is written; resuming there would train one step too many.
        control.should_save &= not is_last
        # The loss of a log line is the mean since the previous line. With a line at each
        # checkpoint, a resumed run writes the same lines as an uninterrupted one.
        control.should_log |= control.should_save

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        progress = self.progress(state.global_step)
        with self.context.raise_on_all_ranks():
            if self.context.is_main:
                directory = self.checkpoints / f"checkpoint-{state.global_step}"
                with translate_disk_errors(directory):
                    self._publish(directory, progress)
                _remove_others(directory)

    def _publish(self, directory: Path, progress: TrainingProgress) -> None:
        files = {}
        for path in (*sorted(directory.rglob("*")), directory):
            # Written files survive a killed process; only flushed files survive a power failure.
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
            if path.is_file():
                files[path.relative_to(directory).as_posix()] = path.stat().st_size
        size = self.context.world_size
        ranks = [f"rng_state_{rank}.pth" for rank in range(size)] if size > 1 else ["rng_state.pth"]
        if missing := [name for name in ranks if name not in files]:
            raise InputError(
                f"{directory} lacks {missing[0]}: `output` must be on a disk that all nodes share",
                ErrorCode.FILE_NOT_FOUND,
            )
        state = SavedState(directory.name, progress, size, self.context.sharding, files)
        atomic_write_json(self.checkpoints / "latest.json", asdict(state), indent=None)


@contextmanager
def translate_disk_errors(target: Path) -> Iterator[None]:
    """Raise what torch, safetensors and the file system raise on a full disk as an InputError.

    Raises:
        InputError: Names `target` and the free space. Other errors are not changed.
    """
    try:
        yield
    except InputError:
        raise
    except (OSError, SafetensorError, CheckpointException, RuntimeError) as error:
        reason = _disk_reason(error)
        if reason is None:
            raise
        existing = next(path for path in (target, *target.absolute().parents) if path.exists())
        free = shutil.disk_usage(existing).free / 1e9
        raise InputError(
            f"{target} cannot be written: {reason}; {free:.2f} GB are free on that disk. Free some "
            "space and run the same command: it resumes from the last complete checkpoint",
            ErrorCode.WRITE_FAILED,
        ) from error


def _disk_reason(error: BaseException) -> str | None:
    """Why the disk refused; None for an error that is not about the disk."""
    if isinstance(error, CheckpointException):
        reasons = (_disk_reason(cause[0]) for cause in error.failures.values())
        return next(filter(None, reasons), None)
    if isinstance(error, OSError):
        return (error.strerror or str(error)) if error.errno in DISK_ERRNOS else None
    if "I/O error" in str(error):  # of safetensors
        return str(error)
    return "a file is incomplete" if any(name in str(error) for name in TORCH_WRITERS) else None
