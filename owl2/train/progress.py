"""How a run is watched: a line a logged step in ``log.jsonl``, and the same on the terminal.

On a terminal a bar and a live line; elsewhere plain lines, at most one every few seconds.
"""

import json
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from owl2.errors import InputError
from owl2.train.resume import Position

PLAIN_SECONDS = 5.0
# Logged losses that the smoothed one looks back on, roughly.
SMOOTHING = 3


class RunLog:
    """``log.jsonl``: a JSON object a line, in the order of the steps.

    Keys: step, epoch, loss (mean since the line before), smoothed_loss, learning_rate (the
    decoder's and the abstractor's), grad_norm (before clipping), samples and seconds (of the whole
    run so far), samples_per_second (since the line before).
    """

    def __init__(self, path: Path, start: Position) -> None:
        """Goes on after `start`: lines of steps that are to be repeated are dropped."""
        self.lines: list[dict[str, Any]] = []
        if start.step and path.is_file():
            self.lines = [line for line in _read_lines(path) if line["step"] <= start.step]
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("w", encoding="utf-8")
        for line in self.lines:
            self._write(line)

    def add(self, line: dict[str, Any]) -> dict[str, Any]:
        """Write a line; returns it with its smoothed loss."""
        before = self.lines[-1]["smoothed_loss"] if self.lines else line["loss"]
        # The mean of all so far, then a moving one: no bias towards the first value.
        weight = 1 / min(len(self.lines) + 1, SMOOTHING)
        line["smoothed_loss"] = before + weight * (line["loss"] - before)
        self.lines.append(line)
        self._write(line)
        return line

    def close(self) -> None:
        """No more lines."""
        self._file.close()

    def _write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a log, without a last one that a kill cut short."""
    texts = path.read_bytes().splitlines()
    lines: list[dict[str, Any]] = []
    for number, text in enumerate(texts, start=1):
        try:
            lines.append(json.loads(text))
        except ValueError as error:
            if number < len(texts):
                raise InputError(
                    f"{path}:{number} is no line of a log; overwrite=true starts anew"
                ) from error
    return lines


class Watch(TrainerCallback):
    """Writes the log and shows it; a context manager, so that the live line ends with the run."""

    def __init__(
        self,
        log: RunLog,
        console: Console,
        start: Position,
        counts: Callable[[], tuple[int, int, bool]],
    ) -> None:
        """`counts` is called for what happened since this process began: how many samples were
        seen, how many left out, whether there was a label."""
        self.log = log
        self.console = console
        self._before = start
        self._counts = counts
        self._began = self._last_plain = time.perf_counter()
        self._last = start
        self._live: Live | None = None
        self._text = Text("starting")
        self._bar = Progress(
            TextColumn("step {task.completed:.0f}/{task.total:.0f}"), BarColumn(bar_width=None)
        )
        self._task = self._bar.add_task("", total=1)

    def __enter__(self) -> "Watch":
        if self.console.is_terminal:
            self._live = Live(
                Group(self._bar, self._text),
                console=self.console,
                # A few redraws a second: more would cost a small model's steps time.
                refresh_per_second=2,
            )
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()
        self.log.close()

    def position(self, step: int) -> Position:
        """Where the run stands after `step`, all its processes so far taken together."""
        samples, left_out, labelled = self._counts()
        return Position(
            step,
            self._before.samples + samples,
            self._before.left_out + left_out,
            self._before.seconds + time.perf_counter() - self._began,
            self._before.labelled or labelled,
        )

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        self._began = time.perf_counter()
        self._bar.update(self._task, total=state.max_steps, completed=state.global_step)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        self._bar.update(self._task, completed=state.global_step)

    def on_epoch_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        # The last epoch may be a part of one; a run that was stopped may yet meet a label.
        stopped = control.should_training_stop and state.global_step < state.max_steps
        if not stopped and not self.position(state.global_step).labelled:
            raise InputError(
                f"after {state.global_step} steps there was nothing to learn: every sample was cut "
                "before its first answer and left out. Set a larger max_length, or give samples "
                "with shorter questions"
            )

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is None or "loss" not in logs:
            return  # the Trainer's own summary at the end; ours is in run.json
        now = self.position(state.global_step)
        speed = (now.samples - self._last.samples) / max(now.seconds - self._last.seconds, 1e-9)
        line = self.log.add(
            {
                "step": now.step,
                "epoch": state.epoch,
                "loss": logs["loss"],
                "learning_rate": logs["learning_rate"],
                "grad_norm": logs["grad_norm"],
                "samples": now.samples,
                "seconds": now.seconds,
                "samples_per_second": speed,
            }
        )
        self._last = now
        self._show(line, state.max_steps)

    def _show(self, line: dict[str, Any], max_steps: int) -> None:
        done = line["step"] - self._before.step
        left = (line["seconds"] - self._before.seconds) / max(done, 1) * (max_steps - line["step"])
        text = (
            f"loss {line['loss']:.4f} (smoothed {line['smoothed_loss']:.4f})  "
            f"rate {line['learning_rate']:.2e}  {line['samples_per_second']:.1f} samples/s  "
            f"{timedelta(seconds=round(left))} left"
        )
        if self._live is not None:
            self._text.plain = text
            return
        now = time.perf_counter()
        if done <= 1 or line["step"] == max_steps or now - self._last_plain >= PLAIN_SECONDS:
            self._last_plain = now
            self.console.print(
                f"step {line['step']:>6}/{max_steps}  {text}", highlight=False, soft_wrap=True
            )
