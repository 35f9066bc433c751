"""A run in the tools that teams watch runs with: TensorBoard, Weights & Biases.

Both get all figures of ``log.jsonl``, the looks at held-out samples with images and answers, and
the recipe. A resumed run goes on in the same record: what it repeats is there once.
"""

import importlib
import importlib.util
import shutil
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from owl2.errors import InputError
from owl2.files import atomic_write_text
from owl2.processing.image_io import load_image
from owl2.train.metrics import View
from owl2.train.recipe import Recipe
from owl2.train.validation import Answer, Look

THUMBNAIL = 224
# Figures by what they are of; the others stand by themselves.
GROUPS = {
    "loss": "train/loss",
    "smoothed_loss": "train/smoothed_loss",
    "learning_rate": "train/learning_rate",
    "grad_norm": "train/grad_norm",
    "samples_per_second": "speed/samples_per_second",
    "tokens_per_second": "speed/tokens_per_second",
    "images_per_second": "speed/images_per_second",
    "data_wait_fraction": "speed/data_wait_fraction",
    "process_bytes": "memory/process_bytes",
    "gpu_bytes": "memory/gpu_bytes",
}


def require_writers(recipe: Recipe) -> None:
    """Raises InputError if the recipe asks for a tool that is not installed."""
    wanted = {"tensorboard": recipe.tensorboard, "wandb": recipe.wandb_project is not None}
    for package, is_wanted in wanted.items():
        if is_wanted and importlib.util.find_spec(package) is None:
            extra = "'owl2-vlm[watch]'" if package == "tensorboard" else package
            raise InputError(f"{package}: it is not installed (pip install {extra})")


def make_writers(recipe: Recipe, start: int) -> Iterator[View]:
    """The views that a recipe asks for, of a run that goes on after step `start`."""
    output = Path(recipe.output)
    if recipe.tensorboard:
        yield TensorBoard(output / "tensorboard", recipe, start)
    if recipe.wandb_project is not None:
        yield WeightsAndBiases(output, recipe.wandb_project, recipe, start)


def figures_of(line: dict[str, Any]) -> dict[str, float]:
    """The figures of a log's line by the names that they have here."""
    return {
        GROUPS.get(key, f"run/{key}"): value
        for key, value in line.items()
        if key != "step" and value is not None
    }


class TensorBoard:
    """Events in a directory; a `progress.View`."""

    def __init__(self, directory: Path, recipe: Recipe, start: int) -> None:
        # Takes seconds to import, and most runs do without.
        from torch.utils.tensorboard import SummaryWriter

        if not start and directory.exists():
            shutil.rmtree(directory)  # of an earlier run, which would be drawn into this one
        # Events of steps that are to be repeated are dropped by whoever reads.
        purge_step = start + 1 if start else None
        self._writer = SummaryWriter(str(directory), purge_step=purge_step)
        if not start:
            self._writer.add_text("recipe", _as_code(recipe), 0)

    def begin(self, step: int, steps: int, lines: Sequence[dict[str, Any]]) -> None:
        """See `View`."""

    def step(self, step: int) -> None:
        """See `View`: lines of the log are enough."""

    def log(self, line: dict[str, Any], left: float) -> None:
        """See `View`."""
        for name, value in figures_of(line).items():
            self._writer.add_scalar(name, value, line["step"])

    def look(self, look: Look) -> None:
        """See `View`."""
        self._writer.add_scalar("validation/loss", look.loss, look.step)
        for number, answer in enumerate(look.answers):
            name = f"answers/{number}"
            lines = (answer.question, f"answer: {answer.answer}", f"wanted: {answer.wanted}")
            # Indented by four: as it is, whatever signs of Markdown are in it.
            text = "\n".join(f"    {line}" for line in "\n".join(lines).splitlines())
            self._writer.add_text(name, text, look.step)
            if look.step == 0 and answer.images:  # which are the same each time
                self._writer.add_image(name, _thumbnails(answer), look.step, dataformats="HWC")
        self._writer.flush()

    def close(self) -> None:
        """See `View`."""
        self._writer.close()


class WeightsAndBiases:
    """A run in a project of Weights & Biases, also offline (WANDB_MODE=offline); a `View`.

    OUTPUT/wandb_run holds its id, by which a resumed run finds it. Steps that it already has are
    ignored there.

    Raises:
        InputError: Weights & Biases refuses the run.
    """

    def __init__(self, output: Path, project: str, recipe: Recipe, start: int) -> None:
        self._wandb: Any = importlib.import_module("wandb")
        kept = output / "wandb_run"
        if not start or not kept.is_file():
            atomic_write_text(kept, uuid.uuid4().hex[:8] + "\n")
        try:
            self._run = self._wandb.init(
                project=project,
                name=output.name,
                id=kept.read_text(encoding="utf-8").strip(),
                resume="allow",
                dir=str(output),
                config=recipe.model_dump(mode="json"),
            )
        except self._wandb.Error as error:  # no account, no network
            raise InputError(
                f"wandb: {error} With WANDB_MODE=offline the run is kept on the disk"
            ) from error

    def begin(self, step: int, steps: int, lines: Sequence[dict[str, Any]]) -> None:
        """See `View`."""

    def step(self, step: int) -> None:
        """See `View`: lines of the log are enough."""

    def log(self, line: dict[str, Any], left: float) -> None:
        """See `View`."""
        self._run.log(figures_of(line), step=line["step"])

    def look(self, look: Look) -> None:
        """See `View`."""
        found: dict[str, Any] = {"validation/loss": look.loss}
        if look.answers:
            rows = [
                [
                    self._wandb.Image(_thumbnails(answer)) if answer.images else None,
                    answer.question,
                    answer.wanted,
                    answer.answer,
                ]
                for answer in look.answers
            ]
            columns = ["images", "question", "wanted", "answer"]
            found["validation/answers"] = self._wandb.Table(columns=columns, data=rows)
        self._run.log(found, step=look.step)

    def close(self) -> None:
        """See `View`."""
        self._run.finish()


def _as_code(recipe: Recipe) -> str:
    text = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    return "".join(f"    {line}\n" for line in text.splitlines())


def _thumbnails(answer: Answer) -> np.ndarray:
    """(THUMBNAIL, N x THUMBNAIL, 3): N images side by side, each whole, on black."""
    row = Image.new("RGB", (THUMBNAIL * len(answer.images), THUMBNAIL))
    for number, image in enumerate(answer.images):
        thumbnail = load_image(image)
        thumbnail.thumbnail((THUMBNAIL, THUMBNAIL))
        left = number * THUMBNAIL + (THUMBNAIL - thumbnail.width) // 2
        row.paste(thumbnail, (left, (THUMBNAIL - thumbnail.height) // 2))
    return np.asarray(row)
