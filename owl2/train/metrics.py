"""How a run is watched: what it counts and measures, in lines that a log keeps and views show.

::

    Trainer ──each step, each logged step──► Watch ──line──► RunLog: OUTPUT/log.jsonl
    Validate ──a look at held-out samples──►   │
                                               └──► views: the panel or plain lines on the terminal,
                                                    TensorBoard, Weights & Biases
"""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, Protocol

import psutil
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from owl2.errors import InputError
from owl2.train.checkpointer import Position
from owl2.train.distributed import Team
from owl2.train.jsonl_logger import RunLog
from owl2.train.train_dataloader import Seen
from owl2.train.validation import Look


class View(Protocol):
    """Somewhere a run is shown. Called by the first process only, and cheap: training waits."""

    def begin(self, step: int, steps: int, lines: Sequence[dict[str, Any]]) -> None:
        """The run goes on after `step` of `steps`; what it has logged before."""

    def step(self, step: int) -> None:
        """A step is done."""

    def log(self, line: dict[str, Any], left: float) -> None:
        """A line of the log, and how many seconds are left."""

    def look(self, look: Look) -> None:
        """A look at held-out samples."""

    def close(self) -> None:
        """The run has ended, whether or not it is complete."""


class Watch(TrainerCallback):
    """Counts, measures, writes the log, tells the views; a context manager, which closes both."""

    def __init__(
        self,
        log: RunLog,
        views: Sequence[View],
        start: Position,
        seen: Callable[[], Seen],
        waited: Callable[[], float],
        team: Team,
    ) -> None:
        """`seen`: what all processes took in since they began. `waited`: how many seconds this one
        was without a batch."""
        self.log = log
        self.views = views if team.first else ()
        self._before = start
        self._seen = seen
        self._waited = waited
        self._team = team
        self._began = time.perf_counter()
        self._last = start
        self._looked = 0.0  # seconds since the last line that went into validation

    def __enter__(self) -> "Watch":
        return self

    def __exit__(self, *_: object) -> None:
        with ExitStack() as stack:  # one that fails must not keep the others open
            stack.callback(self.log.close)
            for view in self.views:
                stack.callback(view.close)

    def position(self, step: int) -> Position:
        """Where the run stands after `step`, with all before this process; all must call it."""
        seen, before = self._seen(), self._before
        [waited] = self._team.total(self._waited())
        return Position(
            step=step,
            samples=before.samples + seen.samples,
            tokens=before.tokens + seen.tokens,
            images=before.images + seen.images,
            left_out=before.left_out + seen.left_out,
            seconds=before.seconds + time.perf_counter() - self._began,
            waited=before.waited + waited / self._team.size,
        )

    def looked(self, look: Look) -> None:
        """Show a look at held-out samples; its time is not the training's."""
        self._looked += look.seconds
        for view in self.views:
            view.look(look)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        self._began = time.perf_counter()
        for view in self.views:
            view.begin(state.global_step, state.max_steps, self.log.lines)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        if state.global_step == state.max_steps:
            control.should_log = True  # else the log would end before the run
        for view in self.views:
            view.step(state.global_step)

    def on_epoch_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        # The last epoch may be a part of one; a run that was stopped may yet meet a label.
        stopped = control.should_training_stop and state.global_step < state.max_steps
        if not stopped and not self.position(state.global_step).samples:
            raise InputError(
                f"after {state.global_step} steps there was nothing to learn: every sample was "
                "left out, and left_out.jsonl says why. Where they are cut before their first "
                "answer, set a larger max_length"
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
        now, last = self.position(state.global_step), self._last
        seconds = max(now.seconds - last.seconds - self._looked, 1e-9)
        line = self.log.add(
            {
                "step": now.step,
                "epoch": state.epoch,
                "loss": logs["loss"],
                "learning_rate": logs["learning_rate"],
                "grad_norm": logs["grad_norm"],
                "samples": now.samples,
                "tokens": now.tokens,
                "images": now.images,
                "left_out": now.left_out,
                "seconds": now.seconds,
                "samples_per_second": (now.samples - last.samples) / seconds,
                "tokens_per_second": (now.tokens - last.tokens) / seconds,
                "images_per_second": (now.images - last.images) / seconds,
                "data_wait_fraction": min((now.waited - last.waited) / seconds, 1.0),
            }
            | memory_held(args.device)
        )
        self._last, self._looked = now, 0.0
        done = now.step - self._before.step
        left = (now.seconds - self._before.seconds) / max(done, 1) * (state.max_steps - now.step)
        for view in self.views:
            view.log(line, left)


def memory_held(device: torch.device) -> dict[str, int]:
    """Bytes: resident ones of this process now; of a GPU the most that was ever held."""
    held = {"process_bytes": psutil.Process().memory_info().rss}
    if device.type == "cuda":
        held["gpu_bytes"] = torch.cuda.max_memory_allocated(device)
    return held
