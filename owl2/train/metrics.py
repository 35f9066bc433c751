"""Metrics of a run, their log files, and the base class of further loggers.

::

    Trainer, every `logging_steps` ───► MetricsCallback ──► OUTPUT/log.jsonl
    ValidationCallback, `eval_steps` ──►      │             OUTPUT/validation.jsonl
                                              └──► console, TensorBoard, Weights & Biases
"""

import json
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from owl2.errors import ErrorCode, InputError
from owl2.train.checkpointer import TrainingProgress
from owl2.train.distributed import DistributedContext
from owl2.train.train_dataloader import TrainDataLoader
from owl2.train.validation import ValidationResult

# Number of logged losses in the moving mean.
SMOOTHING = 3


class JsonlLog:
    """A file of JSON objects with a `step`, in the order of the steps.

    Without a `path` the lines are only kept in memory: one process writes for all.
    """

    def __init__(self, path: Path | None, resumed_step: int) -> None:
        """Keeps the lines up to `resumed_step`; later steps will be repeated.

        Raises:
            InputError: A line is damaged.
        """
        self.lines: list[dict[str, Any]] = []
        self._file = None
        if path is None:
            return
        if resumed_step and path.is_file():
            self.lines = [line for line in _read_lines(path) if line["step"] <= resumed_step]
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("w", encoding="utf-8")
        for line in self.lines:
            self._write(line)

    def add(self, line: dict[str, Any]) -> None:
        """Append a line and flush it."""
        self.lines.append(line)
        self._write(line)

    def _write(self, line: dict[str, Any]) -> None:
        if self._file is not None:
            self._file.write(json.dumps(line, ensure_ascii=False) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a log, without a last line that a crash cut off."""
    texts = path.read_bytes().splitlines()
    lines: list[dict[str, Any]] = []
    for number, text in enumerate(texts, start=1):
        try:
            lines.append(json.loads(text))
        except ValueError as error:
            if number < len(texts):
                raise InputError(
                    f"{path}:{number} is not a JSON object; overwrite=true starts over",
                    ErrorCode.INVALID_FORMAT,
                ) from error
    return lines


class Logger(TrainerCallback):
    """A destination of metrics; used in the main process only. Methods must be fast."""

    def log_metrics(self, metrics: dict[str, Any]) -> None:
        """Log a line of ``log.jsonl``."""

    def log_validation(self, result: ValidationResult) -> None:
        """Log a validation."""

    def close(self) -> None:
        """Called at the end of the run, also after an error."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        # Not for the Trainer's own summary at the end, which has no loss.
        if logs is not None and "loss" in logs:
            self.log_metrics(logs)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Any = None,
        **kwargs: Any,
    ) -> None:
        self.log_validation(metrics)


class MetricsCallback(Logger):
    """Replaces the Trainer's logs by the metrics of the run and writes both log files.

    Keys of ``log.jsonl``, totals of the run over all processes:
        step, epoch (0 for sources with weights), seconds, and of the samples used: samples, tokens
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
        validates: bool = False,
    ) -> None:
        """Metrics of a run that starts or resumes at `start`, with validation or without."""
        main = context.is_main
        self.log = JsonlLog(output / "log.jsonl" if main else None, start.step)
        validation_file = output / "validation.jsonl" if main and validates else None
        self.validation_log = JsonlLog(validation_file, start.step)
        self._start = self._last = start
        self._data = data
        self._context = context
        self._began = time.perf_counter()
        self._validation_seconds = 0.0  # since the last line

    def progress(self, step: int) -> TrainingProgress:
        """The progress of the run after `step`; all processes must call it."""
        counts, start = self._data.counts, self._start
        [wait] = self._context.all_reduce_sum(self._data.wait_seconds)
        return TrainingProgress(
            step=step,
            samples=start.samples + counts.samples,
            tokens=start.tokens + counts.tokens,
            images=start.images + counts.images,
            num_skipped=start.num_skipped + counts.num_skipped,
            seconds=start.seconds + time.perf_counter() - self._began,
            data_wait_seconds=start.data_wait_seconds + wait / self._context.world_size,
        )

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._began = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        step, is_last = state.global_step, state.global_step == state.max_steps
        control.should_log |= is_last
        ends_epoch = int(self._epochs(args, step)) > int(self._epochs(args, step - 1))
        if (ends_epoch or is_last) and not self.progress(step).samples:
            raise InputError(
                f"after {step} steps every sample was skipped; skipped.jsonl has the reasons. If "
                "samples are cut before their first answer, increase max_length",
                ErrorCode.NO_LABELS,
            )

    def _epochs(self, args: TrainingArguments, step: int) -> float:
        """Epochs of the data after `step`; 0 for sources with weights."""
        devices = args.world_size * args.gradient_accumulation_steps
        samples = step * args.per_device_train_batch_size * devices
        return samples / self._data.epoch_size if self._data.epoch_size else 0.0

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is None or "loss" not in logs:
            return
        now, last, lines = self.progress(state.global_step), self._last, self.log.lines
        seconds = max(now.seconds - last.seconds - self._validation_seconds, 1e-9)
        wait = now.data_wait_seconds - last.data_wait_seconds
        loss = logs["loss"]
        before = lines[-1]["smoothed_loss"] if lines else loss
        metrics = {
            "step": now.step,
            "epoch": self._epochs(args, now.step),
            "loss": loss,
            "learning_rate": logs["learning_rate"],
            "grad_norm": logs["grad_norm"],
            "samples": now.samples,
            "tokens": now.tokens,
            "images": now.images,
            "num_skipped": now.num_skipped,
            "seconds": now.seconds,
            "samples_per_second": (now.samples - last.samples) / seconds,
            "tokens_per_second": (now.tokens - last.tokens) / seconds,
            "images_per_second": (now.images - last.images) / seconds,
            "data_wait_fraction": min(wait / seconds, 1.0),
            "process_memory_bytes": psutil.Process().memory_info().rss,
            # First the mean of all lines, then a moving mean: no bias towards the first value.
            "smoothed_loss": before + (loss - before) / min(len(lines) + 1, SMOOTHING),
        }
        if args.device.type == "cuda":
            metrics["gpu_memory_bytes"] = torch.cuda.max_memory_allocated(args.device)
        self.log.add(metrics)
        self._last, self._validation_seconds = now, 0.0
        logs.clear()  # the dict that the next callbacks get
        logs.update(metrics)

    def log_validation(self, result: ValidationResult) -> None:
        """Write the validation; its time does not count as training time."""
        self.validation_log.add(result.line())
        self._validation_seconds += result.seconds

    def close(self) -> None:
        """Close both files."""
        self.log.close()
        self.validation_log.close()
