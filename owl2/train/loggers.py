"""TensorBoard and Weights & Biases: the metrics, validations with images, and the recipe.

A resumed run continues the same record; repeated steps are recorded once.
"""

import importlib
import importlib.util
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from owl2.errors import ErrorCode, InputError
from owl2.files import atomic_write_text
from owl2.processing.image_io import load_image
from owl2.train.metrics import Logger
from owl2.train.recipe import Recipe
from owl2.train.validation import Generation, ValidationResult

THUMBNAIL = 224
# The groups of metrics in the tools; all other metrics are in the group "run".
GROUPS = {
    "train": ("loss", "smoothed_loss", "learning_rate", "grad_norm"),
    "speed": (
        *("samples_per_second", "tokens_per_second", "images_per_second"),
        "data_wait_fraction",
    ),
    "memory": ("process_memory_bytes", "gpu_memory_bytes"),
}
GROUP_OF = {name: group for group, names in GROUPS.items() for name in names}


def require_loggers(recipe: Recipe) -> None:
    """Raises InputError if the recipe requests a tool that is not installed."""
    requested = {"tensorboard": recipe.tensorboard, "wandb": recipe.wandb_project is not None}
    for package, is_requested in requested.items():
        if is_requested and importlib.util.find_spec(package) is None:
            extra = "'owl2-vlm[watch]'" if package == "tensorboard" else package
            raise InputError(
                f"{package} is not installed (pip install {extra})", ErrorCode.MISSING_DEPENDENCY
            )


def make_loggers(recipe: Recipe, resumed_step: int) -> Iterator[Logger]:
    """The loggers that a recipe requests, for a run that resumes after `resumed_step` (0: new)."""
    output = Path(recipe.output)
    if recipe.tensorboard:
        yield TensorBoardLogger(output / "tensorboard", recipe, resumed_step)
    if recipe.wandb_project is not None:
        yield WandbLogger(output, recipe.wandb_project, recipe, resumed_step)


def grouped_metrics(metrics: dict[str, Any]) -> dict[str, float]:
    """The metrics by their names in the tools, such as "train/loss"."""
    return {
        f"{GROUP_OF.get(name, 'run')}/{name}": value
        for name, value in metrics.items()
        if name != "step" and value is not None
    }


class TensorBoardLogger(Logger):
    """Event files in a directory."""

    def __init__(self, directory: Path, recipe: Recipe, resumed_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # takes seconds to import

        if not resumed_step and directory.exists():
            shutil.rmtree(directory)  # of an earlier run, which would be shown in this one
        # TensorBoard drops the events of repeated steps.
        purge_step = resumed_step + 1 if resumed_step else None
        self._writer = SummaryWriter(str(directory), purge_step=purge_step)
        if not resumed_step:
            settings = recipe.model_dump(mode="json")
            text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
            self._writer.add_text("recipe", _as_code(text), 0)

    def log_metrics(self, metrics: dict[str, Any]) -> None:
        """Add a scalar for each metric."""
        for name, value in grouped_metrics(metrics).items():
            self._writer.add_scalar(name, value, metrics["step"])

    def log_validation(self, result: ValidationResult) -> None:
        """Add the loss and the generations, and once their images."""
        self._writer.add_scalar("validation/loss", result.loss, result.step)
        for number, generation in enumerate(result.generations):
            name = f"generations/{number}"
            text = (
                f"{generation.prompt}\nprediction: {generation.prediction}\n"
                f"reference: {generation.reference}"
            )
            self._writer.add_text(name, _as_code(text), result.step)
            if result.step == 0 and generation.images:  # the same each time
                thumbnails = _thumbnails(generation)
                self._writer.add_image(name, thumbnails, result.step, dataformats="HWC")
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()


class WandbLogger(Logger):
    """A run in a project of Weights & Biases, also offline (WANDB_MODE=offline).

    OUTPUT/wandb_run contains the id of the run for resuming. Weights & Biases ignores repeated
    steps.

    Raises:
        InputError: Weights & Biases refuses the run.
    """

    def __init__(self, output: Path, project: str, recipe: Recipe, resumed_step: int) -> None:
        self._wandb: Any = importlib.import_module("wandb")
        id_file = output / "wandb_run"
        if not resumed_step or not id_file.is_file():
            atomic_write_text(id_file, uuid.uuid4().hex[:8] + "\n")
        try:
            self._run = self._wandb.init(
                project=project,
                name=output.name,
                id=id_file.read_text(encoding="utf-8").strip(),
                resume="allow",
                dir=str(output),
                config=recipe.model_dump(mode="json"),
            )
        except self._wandb.Error as error:  # no account, no network
            raise InputError(
                f"wandb: {error} WANDB_MODE=offline stores the run on the disk", ErrorCode.NETWORK
            ) from error

    def log_metrics(self, metrics: dict[str, Any]) -> None:
        """Log all metrics."""
        self._run.log(grouped_metrics(metrics), step=metrics["step"])

    def log_validation(self, result: ValidationResult) -> None:
        """Log the loss and a table of generations."""
        values: dict[str, Any] = {"validation/loss": result.loss}
        if result.generations:
            columns = ["images", "prompt", "reference", "prediction"]
            rows = [
                [
                    self._wandb.Image(_thumbnails(item)) if item.images else None,
                    *(item.prompt, item.reference, item.prediction),
                ]
                for item in result.generations
            ]
            values["validation/generations"] = self._wandb.Table(columns=columns, data=rows)
        self._run.log(values, step=result.step)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


def _as_code(text: str) -> str:
    """Markdown that shows the text unchanged."""
    return "".join(f"    {line}\n" for line in text.splitlines())


def _thumbnails(generation: Generation) -> np.ndarray:
    """(THUMBNAIL, N x THUMBNAIL, 3): the N images side by side on black."""
    row = Image.new("RGB", (THUMBNAIL * len(generation.images), THUMBNAIL))
    for number, image in enumerate(generation.images):
        thumbnail = load_image(image)
        thumbnail.thumbnail((THUMBNAIL, THUMBNAIL))
        left = number * THUMBNAIL + (THUMBNAIL - thumbnail.width) // 2
        row.paste(thumbnail, (left, (THUMBNAIL - thumbnail.height) // 2))
    return np.asarray(row)
