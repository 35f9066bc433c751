"""A training run, from a recipe to a model.

checkpoint + processor ──► trainable parameters ──► Trainer on a mixture ──► OUTPUT/model
                                                                             OUTPUT/log.jsonl
                                                                             OUTPUT/loss.png
                                                                             OUTPUT/run.json
"""

import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from transformers.utils import logging as transformers_logging

from owl2 import __version__
from owl2.checkpoints.config_file import resolve_checkpoint
from owl2.data.collate import Collator, Layout
from owl2.data.mixture import MixtureDataset, MixtureSource
from owl2.data.open_dataset import open_dataset
from owl2.files import (
    atomic_directory,
    atomic_write_json,
    exclusive_directory,
    require_writable,
)
from owl2.model.modeling import Owl2ForConditionalGeneration
from owl2.processing.processor import Owl2Processor
from owl2.runtime import package_versions, tune_malloc
from owl2.train.adapters import loading_options, prepare_for_training
from owl2.train.checkpointer import (
    CheckpointCallback,
    SavedState,
    TrainingProgress,
    checkpoints_of,
    find_state,
    start_run,
    translate_disk_errors,
)
from owl2.train.console import ConsoleLogger, LivePanel
from owl2.train.distributed import DistributedContext
from owl2.train.estimate.memory import require_training_memory
from owl2.train.loggers import make_loggers, require_loggers
from owl2.train.metrics import MetricsCallback
from owl2.train.optimizer import groups_table, recipe_groups
from owl2.train.parallelize import require_attention, require_compiler
from owl2.train.recipe import Recipe
from owl2.train.recipe_file import read_recipe
from owl2.train.report import peak_memory, plot_loss, summarize_run, summary_table
from owl2.train.trainer import Owl2Trainer
from owl2.train.validation import ValidationDataset, Validator

PACKAGES = ("torch", "transformers", "accelerate", "pillow")  # whose versions are in run.json
# The files of a run by their titles in the summary; some depend on the recipe.
FILES = {
    "model": "model",
    "loss curve": "loss.png",
    "log": "log.jsonl",
    "validation": "validation.jsonl",
    "TensorBoard": "tensorboard",
    "skipped samples": "skipped.jsonl",
    "results": "run.json",
}


@dataclass(frozen=True)
class TrainResult:
    """The result of a run. After a signal `finished` is False, and the same recipe resumes it."""

    output: Path
    finished: bool
    signal: int  # SIGINT or SIGTERM if one stopped the run, else 0
    step: int
    steps: int
    seconds: float

    @property
    def model(self) -> Path:
        """The directory of the trained model, once the run has finished."""
        return self.output / "model"


def train(
    recipe: Recipe | str | Path, console: Console | None = None, overrides: Sequence[str] = ()
) -> TrainResult:
    """Train according to a recipe; resume if an earlier run of it was stopped.

    Args:
        recipe: A recipe, or a YAML file with `overrides`; see `read_recipe`.
        console: Where progress is shown; default: the terminal.

    Raises:
        InputError: An invalid recipe, model or data; an `output` with other content or a damaged
            state, or to which another run writes; a loss or weights that are not finite; no sample
            with a label.
    """
    if not torch.cuda.is_available():
        tune_malloc()
    with DistributedContext.open() as context, _quiet_transformers():
        console = (console or Console()) if context.is_main else Console(quiet=True)
        with context.raise_on_all_ranks():
            if not isinstance(recipe, Recipe):
                recipe = read_recipe(recipe, overrides)
            run = TrainingRun(recipe, context, console)
        with ExitStack() as stack:
            with context.raise_on_all_ranks():
                if context.is_main:
                    stack.enter_context(exclusive_directory(run.output))
            return run.train()


class TrainingRun:
    """The parts of a run, loaded and checked; `train` runs it.

    Raises:
        InputError: See `train`.
    """

    def __init__(self, recipe: Recipe, context: DistributedContext, console: Console) -> None:
        self.recipe, self.context, self.console = recipe, context, console
        self.output = Path(recipe.output)
        self.saved = self._check()
        self.start = TrainingProgress() if self.saved is None else self.saved.progress
        # In float32, because small updates need the precision.
        with context.load_share():
            self.model = Owl2ForConditionalGeneration.from_pretrained(
                recipe.model,
                dtype=torch.float32,
                image_size=recipe.image_size,
                attn_implementation=recipe.attn_implementation,
                **loading_options(recipe),
            )
        self.use_cache = self.model.config.use_cache
        self.processor = Owl2Processor.from_pretrained(recipe.model, **recipe.processor_options())
        images = self.processor.image_processor
        self.processor.image_processor = images.replace(size=self.model.config.image_size)
        recipe.require_context(self.model.config.max_position_embeddings)
        score_labels = recipe.score_labels(self.processor)
        self.model.config.update(recipe.model_settings(score_labels))
        self.trainable = prepare_for_training(self.model, recipe, autocast=context.sharding is None)
        self.dataset = MixtureDataset(
            [
                MixtureSource(open_dataset(**s.origin()), s.count, s.weight, s.title)
                for s in recipe.data
            ],
            self.processor,
            seed=recipe.seed,
            shuffle_buffer=recipe.shuffle_buffer,
            augment=recipe.augment,
            max_length=recipe.max_length,
            score_labels=score_labels,
        )
        self.validator = self._make_validator()
        self._announce()

    def _check(self) -> SavedState | None:
        """Find errors before the model is loaded; returns the state to resume from."""
        recipe, has_cuda = self.recipe, torch.cuda.is_available()
        resolve_checkpoint(recipe.model)
        require_loggers(recipe)
        require_attention(recipe)
        if recipe.compile:
            require_compiler("cuda" if has_cuda else "cpu")
        saved = find_state(recipe, self.context)
        require_writable(self.output / "model")
        if not has_cuda:
            require_training_memory(recipe, self.context)
        return saved

    def _make_validator(self) -> Validator | None:
        recipe, settings = self.recipe, self.recipe.validation
        if settings is None:
            return None
        held_out = ValidationDataset(
            [(open_dataset(**s.origin()), s.count) for s in settings.data],
            self.processor,
            max_samples=settings.max_samples,
            max_length=recipe.max_length,
        )
        return Validator(
            held_out,
            self.processor,
            self.context,
            batch_size=recipe.micro_batch_size(self.context.world_size),
            num_workers=recipe.dataloader_num_workers,
            num_generations=settings.num_generations,
            skip_invalid=recipe.on_invalid_sample == "skip",
        )

    def _announce(self) -> None:
        recipe, print_line = self.recipe, self.console.print
        print_line(f"Stage {recipe.stage} from {recipe.model}", markup=False, soft_wrap=True)
        print_line(self.trainable.table("Parameters"))
        print_line(groups_table(recipe_groups(self.model, recipe)))
        size, epoch_size = self.model.config.image_size, self.dataset.epoch_size
        samples = "Weighted sources" if epoch_size is None else f"{epoch_size:,} samples per epoch"
        print_line(f"{samples}, images of {size} x {size} pixels", highlight=False)
        if self.saved is not None:
            print_line(f"Resuming after step {self.start.step}", highlight=False)

    def train(self) -> TrainResult:
        """Train, and write the model and the report."""
        context, output, checkpoints = self.context, self.output, checkpoints_of(self.output)
        with context.raise_on_all_ranks(), translate_disk_errors(output):
            if context.is_main:
                start_run(self.recipe, self.saved)
        with context.raise_on_all_ranks():
            collate = Collator(self.processor, batch_layout(self.recipe), self.recipe.has_pairs)
            trainer = Owl2Trainer(
                self.model, self.recipe, self.dataset, collate, checkpoints, context, self.validator
            )
        metrics = MetricsCallback(output, self.start, trainer.train_loader, context)
        checkpointing = CheckpointCallback(output, metrics.progress, context)
        # The stack closes all, also if closing one fails.
        with translate_disk_errors(output), ExitStack() as stack:
            stack.callback(checkpointing.restore_handlers)
            with context.raise_on_all_ranks():
                if context.is_main:
                    kind = LivePanel if self.console.is_terminal else ConsoleLogger
                    metrics.loggers.append(kind(self.console, str(output), metrics.log.lines))
                    metrics.loggers += make_loggers(self.recipe, self.start.step)
            for logger in metrics.loggers:
                stack.callback(logger.close)
            trainer.add_callback(metrics)
            trainer.add_callback(checkpointing)
            trainer.args.eval_on_start = self.validator is not None and self.saved is None
            resumed = None if self.saved is None else str(checkpoints / self.saved.checkpoint)
            trainer.train(resume_from_checkpoint=resumed)
        steps = trainer.state.max_steps
        end = metrics.progress(trainer.state.global_step)
        result = TrainResult(
            output, not checkpointing.signal, checkpointing.signal, end.step, steps, end.seconds
        )
        if result.finished:
            self._finish(trainer, metrics, end)
            message = f"{end.step} steps in {end.seconds:.0f} s; the model is in {result.model}"
        else:
            message = f"Stopped after step {end.step} of {steps}; run the same command to resume"
        self.console.print(message, markup=False, highlight=False, soft_wrap=True)
        return result

    def _finish(
        self, trainer: Owl2Trainer, metrics: MetricsCallback, end: TrainingProgress
    ) -> None:
        context, output, model = self.context, self.output, self.output / "model"
        trainer.check_finite()
        self.model.config.use_cache = self.use_cache  # which the Trainer has disabled
        weights = trainer.full_state_dict()
        peaks = peak_memory(trainer.args.device, context)
        with context.raise_on_all_ranks():
            if not context.is_main:
                return
            log, validations = metrics.log.lines, metrics.validation_log.lines
            device = trainer.args.device
            name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
            results = {
                "recipe": self.recipe.model_dump(mode="json"),
                "device": name,
                "processes": context.world_size,
                "threads": torch.get_num_threads(),
                "dtype": self.recipe.resolve_dtype(device.type),
                "trainable_parameters": self.trainable.trainable_size,
                "frozen_parameters": self.trainable.frozen_size,
                "peak_memory_bytes": peaks,
                **summarize_run(end, log, validations),
                "versions": {"owl2": __version__, **package_versions(*PACKAGES)},
            }
            with atomic_directory(model) as directory, translate_disk_errors(model):
                self.model.save_pretrained(directory, state_dict=weights)
                self.processor.save_pretrained(directory)
                # Before the model is complete, so that a run killed here is resumed.
                atomic_write_json(output / "run.json", results)
                if not plot_loss(output / "loss.png", log, validations, str(output)):
                    hint = "No loss.png: install matplotlib (pip install 'owl2-vlm[plot]')"
                    self.console.print(hint, markup=False)
            shutil.rmtree(checkpoints_of(output))
            files = {title: output / name for title, name in FILES.items()}
            self.console.print(summary_table(results, files))


def batch_layout(recipe: Recipe) -> Layout:
    """How the samples of a batch are arranged in rows."""
    if not recipe.packing:
        return "padded"
    # Flash attention separates samples only in a batch of one row.
    return "one row" if recipe.attn_implementation == "flash_attention_2" else "packed"


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Disable transformers' progress bars and a warning about the released config.json."""
    enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            # The Trainer reads the config.json of a checkpoint as a generic configuration.
            warnings.filterwarnings("ignore", message="`rope_scaling` is deprecated")
            yield
    finally:
        if enabled:
            transformers_logging.enable_progress_bar()
