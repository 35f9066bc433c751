"""A whole run, from a recipe to a model.

checkpoint + processor ──► stage ──► Trainer over the mixture of samples ──► OUTPUT/model
                                                                             OUTPUT/log.jsonl
                                                                             OUTPUT/loss.png
                                                                             OUTPUT/run.json
"""

import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers.utils import logging as transformers_logging

from owl2.data.collate import Collator
from owl2.data.mixture import MixtureDataset, MixtureSource
from owl2.data.open_dataset import SampleDataset, open_dataset
from owl2.errors import InputError
from owl2.files import atomic_directory, require_writable
from owl2.model.modeling import Owl2ForConditionalGeneration
from owl2.processing.processor import Owl2Processor
from owl2.runtime import tune_malloc
from owl2.train.adapters import loading_options, prepare
from owl2.train.attn_implementation import layout, require_attention
from owl2.train.checkpointer import (
    KeepState,
    Position,
    Saved,
    Stop,
    begin,
    checkpoints_of,
    find_state,
)
from owl2.train.console import terminal_view
from owl2.train.disk_errors import writing
from owl2.train.distributed import Team
from owl2.train.jsonl_logger import Lines, RunLog
from owl2.train.loggers import make_writers, require_writers
from owl2.train.metrics import View, Watch
from owl2.train.optimizer import groups_table, recipe_groups
from owl2.train.parallelize import require_compiler
from owl2.train.recipe import DataSource, Recipe
from owl2.train.report import measured, peak_memory, plot_loss, summary, write_run
from owl2.train.trainable import Trained
from owl2.train.trainer import Owl2Trainer
from owl2.train.validation import HeldOut, Validate, Validator


@dataclass(frozen=True)
class Result:
    """What came of a run. `finished` is False after a signal: the same recipe then goes on."""

    output: Path
    finished: bool
    signal: int  # Ctrl-C's or SIGTERM's number, 0 if there was none
    step: int
    steps: int
    seconds: float

    @property
    def model(self) -> Path:
        """Where the trained model is, once the run has finished."""
        return self.output / "model"


def train(recipe: Recipe, console: Console | None = None) -> Result:
    """Train as the recipe says; go on with it if an earlier run of it was stopped.

    Args:
        console: where the progress is shown; default: the terminal.

    Raises:
        InputError: for a model, data or settings that cannot be used, an `output` that holds
            something else or a damaged state, a loss or weights that are not finite, samples
            without anything to learn.
    """
    if not torch.cuda.is_available():
        tune_malloc()
    with Team.gathered() as team, _quiet_transformers():
        console = (console or Console()) if team.first else Console(quiet=True)
        with team.together():
            require_writers(recipe)
            require_attention(recipe)
            if recipe.compile:
                require_compiler("cuda" if torch.cuda.is_available() else "cpu")
            saved = find_state(recipe, team)
            require_writable(Path(recipe.output) / "model")
            model, processor = _load(recipe)
            trained = prepare(model, recipe, autocast=team.sharing == "each whole")
            samples = _training_set(recipe, processor)
            validator = _validator(recipe, processor, team)
            _announce(console, recipe, model, trained, samples.epoch_size, saved)
        with team.together(), writing(Path(recipe.output)):
            if team.first:
                begin(recipe, saved)
        return _train(recipe, team, console, model, processor, trained, samples, validator, saved)


def _load(recipe: Recipe) -> tuple[Owl2ForConditionalGeneration, Owl2Processor]:
    """The starting checkpoint, in float32: small updates need the digits."""
    model = Owl2ForConditionalGeneration.from_pretrained(
        recipe.model,
        dtype=torch.float32,
        image_size=recipe.image_size,
        attn_implementation=recipe.attn_implementation,
        **loading_options(recipe),
    )
    processor = Owl2Processor.from_pretrained(recipe.model)
    processor.image_processor.size = model.config.image_size
    context = model.config.max_position_embeddings
    if recipe.max_length > context:
        raise InputError(
            f"max_length ({recipe.max_length}) is more than the {context} positions of "
            f"{recipe.model}: set max_length to at most {context}"
        )
    return model, processor


def _training_set(recipe: Recipe, processor: Owl2Processor) -> MixtureDataset:
    sources = [_source(entry) for entry in recipe.data]
    return MixtureDataset(
        sources,
        processor,
        shuffle_buffer=recipe.shuffle_buffer,
        augment=recipe.augment,
        max_length=recipe.max_length,
        seed=recipe.seed,
    )


def _source(entry: DataSource) -> MixtureSource:
    return MixtureSource(_opened(entry), entry.count, entry.weight, entry.title)


def _opened(entry: DataSource) -> SampleDataset:
    return open_dataset(**entry.origin())


def _validator(recipe: Recipe, processor: Owl2Processor, team: Team) -> Validator | None:
    settings = recipe.validation
    if settings is None:
        return None
    held_out = HeldOut(
        [(_opened(entry), entry.count) for entry in settings.data],
        processor,
        most=settings.max_samples,
        max_length=recipe.max_length,
    )
    return Validator(
        held_out,
        processor,
        team,
        # What training has room for; without gradients there is more.
        batch_size=max(recipe.batch_size // (team.size * recipe.gradient_accumulation_steps), 1),
        workers=recipe.dataloader_num_workers,
        answers=settings.num_generations,
        skip_bad=recipe.on_invalid_sample == "skip",
    )


def _announce(
    console: Console,
    recipe: Recipe,
    model: Owl2ForConditionalGeneration,
    trained: Trained,
    samples: int | None,
    saved: Saved | None,
) -> None:
    console.print(f"Stage {recipe.stage}, from {recipe.model}", markup=False, soft_wrap=True)
    for line in trained.lines():
        console.print(f"  {line}", highlight=False)
    console.print(groups_table(recipe_groups(model, recipe)))
    size = model.config.image_size
    amount = "Samples by weight" if samples is None else f"{samples:,} samples an epoch"
    console.print(f"{amount}, images at {size} x {size} pixels", highlight=False)
    if saved is not None:
        console.print(f"Going on after step {saved.position.step}", highlight=False)


def _train(
    recipe: Recipe,
    team: Team,
    console: Console,
    model: Owl2ForConditionalGeneration,
    processor: Owl2Processor,
    trained: Trained,
    samples: MixtureDataset,
    validator: Validator | None,
    saved: Saved | None,
) -> Result:
    output = Path(recipe.output)
    start = saved.position if saved is not None else Position()
    used_cache = model.config.use_cache
    collator = Collator(processor, layout(recipe))
    with team.together():
        trainer = Owl2Trainer(model, recipe, samples, collator, checkpoints_of(output), team)
    log = RunLog(output / "log.jsonl" if team.first else None, start.step)
    looks = Lines(output / "validation.jsonl" if team.first and validator else None, start.step)
    views: list[View] = []
    with team.together():
        if team.first:
            views = [terminal_view(console, str(output)), *make_writers(recipe, start.step)]
    watch = Watch(log, views, start, lambda: trainer.seen, lambda: trainer.waited, team)
    trainer.add_callback(watch)
    if recipe.validation is not None and validator is not None:
        every = recipe.validation.eval_steps
        trainer.add_callback(Validate(validator, every, looks, lambda: model, watch.looked))
    stop = Stop(team)
    for callback in (KeepState(output, watch.position, team), stop):
        trainer.add_callback(callback)
    try:
        with writing(output), watch:
            trainer.train(resume_from_checkpoint=str(saved.directory) if saved else None)
    finally:
        stop.release()
        looks.close()
    step, steps = trainer.state.global_step, trainer.state.max_steps
    end = watch.position(step)
    result = Result(output, not stop.signal, stop.signal, step, steps, end.seconds)
    if not result.finished:
        return result
    with team.together():
        trainer.require_finite()
    model.config.use_cache = used_cache  # which the Trainer switches off
    weights = trainer.whole_weights()
    facts = _setting(recipe, trainer, trained) | measured(end, log.lines, looks.lines)
    facts["peak_memory_bytes"] = peak_memory(trainer.args.device, team)
    with team.together():
        if team.first:
            with atomic_directory(result.model) as directory, writing(result.model):
                model.save_pretrained(directory, state_dict=weights)
                processor.save_pretrained(directory)
                # Before there is a finished model, so that a kill in between is gone on from.
                _report(console, output, facts, log, looks)
            shutil.rmtree(checkpoints_of(output))
    console.print(summary(facts, _files(output)))
    return result


def _setting(recipe: Recipe, trainer: Owl2Trainer, trained: Trained) -> dict[str, Any]:
    """What a run was, before anything was measured."""
    device = trainer.args.device
    return {
        "recipe": recipe.model_dump(mode="json"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "processes": trainer.args.world_size,
        "threads": torch.get_num_threads(),
        "precision": recipe.resolve_dtype(device.type),
        "trainable_parameters": trained.trainable_size,
        "frozen_parameters": trained.frozen_size,
    }


def _report(
    console: Console, output: Path, facts: dict[str, Any], log: RunLog, looks: Lines
) -> None:
    write_run(output / "run.json", facts)
    if not plot_loss(output / "loss.png", log.lines, looks.lines, str(output)):
        hint = "No loss.png: matplotlib is missing (pip install 'owl2-vlm[plot]')"
        console.print(hint, markup=False)


def _files(output: Path) -> dict[str, Path]:
    """What a run leaves, by what it is; some of it only where the recipe asks for it."""
    names = {
        "model": "model",
        "loss curve": "loss.png",
        "log": "log.jsonl",
        "validation": "validation.jsonl",
        "TensorBoard": "tensorboard",
        "left out": "left_out.jsonl",
        "all figures": "run.json",
    }
    return {what: output / name for what, name in names.items()}


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without transformers' own bars (loading, saving) between the lines of progress."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            # The Trainer reads a checkpoint's config.json as if it were no model's in particular,
            # and then warns of the name that the released layout has.
            warnings.filterwarnings("ignore", message="`rope_scaling` is deprecated")
            yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
