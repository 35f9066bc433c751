"""TensorBoard and Weights & Biases: the metrics, validations with images, and the recipe.

A resumed run continues the same record; repeated steps are recorded once.
"""

import importlib
import importlib.util
import shutil
import textwrap
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import ImageOps

from owl2.errors import ErrorCode, InputError, require_package
from owl2.files import atomic_write_text
from owl2.processing.image_io import load_image
from owl2.train.metrics import Logger
from owl2.train.recipe import Recipe
from owl2.train.validation import Generation, ValidationResult

THUMBNAIL = (224, 224)
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
    if recipe.tensorboard:
        require_package("tensorboard", "tensorboard=true", "watch")
    if recipe.wandb_project is not None and importlib.util.find_spec("wandb") is None:
        raise InputError(
            "wandb_project requires wandb: pip install wandb", ErrorCode.MISSING_DEPENDENCY
        )


def make_loggers(recipe: Recipe, resumed_step: int) -> Iterator[Logger]:
    """The loggers that a recipe requests, for a run that resumes after `resumed_step` (0: new)."""
    if recipe.tensorboard:
        yield TensorBoardLogger(recipe, resumed_step)
    if recipe.wandb_project is not None:
        yield WandbLogger(recipe, resumed_step)


def grouped_metrics(metrics: dict[str, Any]) -> dict[str, float]:
    """The metrics by their names in the tools, such as "train/loss"."""
    return {
        f"{GROUP_OF.get(name, 'run')}/{name}": value
        for name, value in metrics.items()
        if name != "step" and value is not None
    }


class TensorBoardLogger(Logger):
    """Event files in OUTPUT/tensorboard."""

    def __init__(self, recipe: Recipe, resumed_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # takes seconds to import

        directory = Path(recipe.output) / "tensorboard"
        if not resumed_step and directory.exists():
            shutil.rmtree(directory)  # of an earlier run, which would be shown in this one
        # TensorBoard drops the events of repeated steps.
        purge_step = resumed_step + 1 if resumed_step else None
        self._writer = SummaryWriter(str(directory), purge_step=purge_step)
        if not resumed_step:
            settings = recipe.model_dump(mode="json")
            text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
            self._add_code("recipe", text, 0)

    def _add_code(self, name: str, text: str, step: int) -> None:
        """Add a text that Markdown shows unchanged."""
        self._writer.add_text(name, textwrap.indent(text, "    ", lambda _: True), step)

    def log_metrics(self, metrics: dict[str, Any]) -> None:
        """Add a scalar for each metric."""
        for name, value in grouped_metrics(metrics).items():
            self._writer.add_scalar(name, value, metrics["step"])

    def log_validation(self, result: ValidationResult) -> None:
        """Add the loss and the generations, and once their images."""
        self._writer.add_scalar("validation/loss", result.loss, result.step)
        for number, item in enumerate(result.generations):
            name = f"generations/{number}"
            answers = f"prediction: {item.prediction}\nreference: {item.reference}"
            self._add_code(name, f"{item.prompt}\n{answers}", result.step)
            if result.step == 0 and item.images:  # the same each time
                self._writer.add_image(name, _thumbnails(item), 0, dataformats="HWC")
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

    def __init__(self, recipe: Recipe, resumed_step: int) -> None:
        self._wandb: Any = importlib.import_module("wandb")
        output = Path(recipe.output)
        id_file = output / "wandb_run"
        if not resumed_step or not id_file.is_file():
            atomic_write_text(id_file, uuid.uuid4().hex[:8] + "\n")
        try:
            self._run = self._wandb.init(
                project=recipe.wandb_project,
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
            rows = []
            for item in result.generations:
                images = self._wandb.Image(_thumbnails(item)) if item.images else None
                rows.append([images, item.prompt, item.reference, item.prediction])
            columns = ["images", "prompt", "reference", "prediction"]
            values["validation/generations"] = self._wandb.Table(columns=columns, data=rows)
        self._run.log(values, step=result.step)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


def _thumbnails(generation: Generation) -> np.ndarray:
    """(224, N x 224, 3): the N images side by side on black."""
    images = [ImageOps.pad(load_image(image), THUMBNAIL) for image in generation.images]
    return np.concatenate([np.asarray(image) for image in images], axis=1)
