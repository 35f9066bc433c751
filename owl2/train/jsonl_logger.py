"""What a run writes down as it goes: a JSON object a line, which a resumed run goes on with."""

import json
from pathlib import Path
from typing import Any

from owl2.errors import InputError

# Logged losses that the smoothed one looks back on, roughly.
SMOOTHING = 3


class Lines:
    """A file of JSON objects, each with a `step`, in the order of the steps.

    Without a `path` they are kept in memory only: of several processes one writes.
    """

    def __init__(self, path: Path | None, after: int) -> None:
        """Goes on after step `after`: lines of steps that are to be repeated are dropped."""
        self.lines: list[dict[str, Any]] = []
        self._file = None
        if path is None:
            return
        if after and path.is_file():
            self.lines = [line for line in _read_lines(path) if line["step"] <= after]
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("w", encoding="utf-8")
        for line in self.lines:
            self._write(line)

    def add(self, line: dict[str, Any]) -> dict[str, Any]:
        """Write a line; returns it as it was written."""
        self.lines.append(line)
        self._write(line)
        return line

    def close(self) -> None:
        """No more lines."""
        if self._file is not None:
            self._file.close()

    def _write(self, line: dict[str, Any]) -> None:
        if self._file is not None:
            self._file.write(json.dumps(line, ensure_ascii=False) + "\n")
            self._file.flush()


class RunLog(Lines):
    """``log.jsonl``.

    Keys, for the whole run so far and all its processes together:
        step, epoch (0 where sources have weights), seconds, and of the samples trained on:
        samples, tokens (images' too, padding not), images; left_out: samples that could not be
        used.
    Since the line before:
        loss (the mean), samples_per_second, tokens_per_second, images_per_second (time for
        validation not counted), data_wait_fraction (of the time, spent without a batch to work on).
    At this step:
        smoothed_loss (a moving mean of the lines' losses), learning_rate (the decoder's and the
        abstractor's), grad_norm (before clipping), process_bytes (resident memory of the first
        process), gpu_bytes (with a GPU: the most that the first process has held on it).
    """

    def add(self, line: dict[str, Any]) -> dict[str, Any]:
        """Write a line; returns it with its smoothed loss."""
        before = self.lines[-1]["smoothed_loss"] if self.lines else line["loss"]
        # The mean of all so far, then a moving one: no bias towards the first value.
        weight = 1 / min(len(self.lines) + 1, SMOOTHING)
        return super().add(line | {"smoothed_loss": before + weight * (line["loss"] - before)})


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
