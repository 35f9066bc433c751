"""Metrics of a run, their log files, and the base class of further loggers.

::

    Trainer, every `logging_steps` ──► MetricsCallback ──► OUTPUT/log.jsonl
    Trainer, every `eval_steps` ─────►       │             OUTPUT/validation.jsonl
                                             └──► console, TensorBoard, Weights & Biases
"""

import time
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import TrainerCallback

from owl2.errors import InputError
from owl2.files import atomic_write_text
from owl2.json_records import json_lines
from owl2.sharded_jsonl import remove_torn_line, to_json
from owl2.train.checkpointer import TrainingProgress
from owl2.train.distributed import DistributedContext
from owl2.train.train_dataloader import TrainDataLoader
from owl2.train.validation import ValidationResult

# Number of logged losses in the moving mean.
SMOOTHING = 3


class JsonlLog:
    """A file of JSON objects with a `step`, in the order of the steps.

    Attributes:
        lines: The lines of the file.
    """

    def __init__(self, path: Path | None, resumed_step: int) -> None:
        """Keeps the lines up to `resumed_step`; later steps will be repeated.

        Args:
            path: None keeps the lines in memory only: one process writes for all.

        Raises:
            InputError: A line is damaged.
        """
        self.path = path
        self.lines: list[dict[str, Any]] = []
        if path is None or not path.is_file():
            return
        try:
            remove_torn_line(path)
            if resumed_step:
                records = (r for r in json_lines(path) if r.integer("step") <= resumed_step)
                self.lines = [record.value for record in records]
        except InputError as error:
            raise InputError(f"{error}; overwrite=true starts over", error.code) from error
        if self.lines:
            atomic_write_text(path, "".join(to_json(line) + "\n" for line in self.lines))
        else:
            path.unlink()

    def add(self, line: dict[str, Any]) -> None:
        """Append a line."""
        self.lines.append(line)
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(to_json(line) + "\n")


class Logger:
    """A destination of metrics; used in the main process only. Methods must be fast."""

    def begin(self, step: int, steps: int) -> None:
        """Called before the first step; the run has `steps` steps and resumes after `step`."""

    def log_step(self, step: int) -> None:
        """Called after each step."""

    def log_metrics(self, metrics: dict[str, Any]) -> None:
        """Log a line of ``log.jsonl``."""

    def log_validation(self, result: ValidationResult) -> None:
        """Log a validation."""

    def close(self) -> None:
        """Called at the end of the run, also after an error."""


class MetricsCallback(TrainerCallback):
    """Computes the metrics of the run, writes both log files, and calls the loggers.

    Keys of ``log.jsonl``, totals of the run over all processes:
        step, epoch (None with weighted sources), seconds, and of the samples used: samples, tokens
        (image tokens included, padding excluded), images; num_skipped: invalid samples.
    Since the previous line:
        loss (mean), samples_per_second, tokens_per_second, images_per_second (validation time
        excluded), data_wait_fraction (of the time, spent waiting for batches).
    At this step:
        smoothed_loss (moving mean of the lines), learning_rate (of the decoder and the abstractor),
        grad_norm (before clipping), process_memory_bytes (resident, of the main process),
        gpu_memory_bytes (peak of the main process, on a GPU).
    """

    def __init__(
        self,
        output: Path,
        start: TrainingProgress,
        data: TrainDataLoader,
        context: DistributedContext,
    ) -> None:
        """Metrics of a run that starts or resumes at `start`."""
        folder = output if context.is_main else None
        self.log = JsonlLog(folder and folder / "log.jsonl", start.step)
        self.validation_log = JsonlLog(folder and folder / "validation.jsonl", start.step)
        self.loggers: list[Logger] = []
        self._start = self._last = start
        self._data = data
        self._context = context
        self._began = time.perf_counter()
        self._validation_seconds = 0.0  # since the last line

    def progress(self, step: int) -> TrainingProgress:
        """The progress of the run after `step`; all processes must call it."""
        start, counts = self._start, self._data.counts._asdict()
        [wait] = self._context.all_reduce_sum(self._data.wait_seconds)
        return TrainingProgress(
            step=step,
            **{name: getattr(start, name) + count for name, count in counts.items()},
            seconds=start.seconds + time.perf_counter() - self._began,
            data_wait_seconds=start.data_wait_seconds + wait / self._context.world_size,
        )

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._began = time.perf_counter()
        for logger in self.loggers:
            logger.begin(state.global_step, state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_log |= state.global_step == state.max_steps
        for logger in self.loggers:
            logger.log_step(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs is None or "loss" not in logs:  # the Trainer's own summary at the end
            return
        now, last, lines = self.progress(state.global_step), self._last, self.log.lines
        seconds = max(now.seconds - last.seconds - self._validation_seconds, 1e-9)
        devices = args.world_size * args.gradient_accumulation_steps
        step_size, epoch_size = args.per_device_train_batch_size * devices, self._data.epoch_size
        loss = logs["loss"]
        before = lines[-1]["smoothed_loss"] if lines else loss
        metrics: dict[str, Any] = {
            "step": now.step,
            "epoch": now.step * step_size / epoch_size if epoch_size else None,
            "loss": loss,
            "learning_rate": logs["learning_rate"],
            "grad_norm": logs["grad_norm"],
            "seconds": now.seconds,
            "num_skipped": now.num_skipped,
            "data_wait_fraction": min(
                (now.data_wait_seconds - last.data_wait_seconds) / seconds, 1
            ),
            "process_memory_bytes": psutil.Process().memory_info().rss,
            # First the mean of all lines, then a moving mean: no bias toward the first value.
            "smoothed_loss": before + (loss - before) / min(len(lines) + 1, SMOOTHING),
        }
        for name in ("samples", "tokens", "images"):
            metrics[name] = getattr(now, name)
            metrics[f"{name}_per_second"] = (getattr(now, name) - getattr(last, name)) / seconds
        if args.device.type == "cuda":
            metrics["gpu_memory_bytes"] = torch.cuda.max_memory_allocated(args.device)
        self._last, self._validation_seconds = now, 0.0
        self.log.add(metrics)
        for logger in self.loggers:
            logger.log_metrics(metrics)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Log a `ValidationResult`; its time does not count as training time."""
        result: ValidationResult = kwargs["metrics"]
        self.validation_log.add(result.line())
        self._validation_seconds += result.seconds
        for logger in self.loggers:
            logger.log_validation(result)
