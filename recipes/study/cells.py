"""The cells of a study: the models and scores of each arm with each seed.

A key is a hash of all settings and data that a model depends on, so that arms with equal settings
share models, and results of other settings are not mixed. See `run.py` for the files.
"""

import gc
import hashlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from arms import make_arm, make_start
from rich.console import Console
from study import SMOLLM2, Stage, Study, smollm2_file
from where import replace_keys_and_values, where_it_acts

from owl2 import Engine
from owl2.data.mixture import MixtureDataset, MixtureSampler, MixtureSource
from owl2.data.open_dataset import open_dataset
from owl2.engine.load_model import ModelArgs
from owl2.errors import ErrorCode, InputError
from owl2.eval.evaluate import EvalConfig, evaluate
from owl2.files import atomic_write_text, exclusive_directory
from owl2.train.checkpointer import KEYS_IGNORED_ON_RESUME
from owl2.train.recipe import Recipe
from owl2.train.recipe_file import read_recipe
from owl2.train.run import train

MANIFEST = "data.json"
SIGNALED = 128  # `owl2 train` adds the number of the signal that stopped it
# Scores of models whose visual keys and values were replaced.
REPLACED = ("exact", "choice", "answer_nll")
Json = dict[str, Any]


class Stopped(Exception):
    """A signal stopped a training run; the same command resumes it."""

    def __init__(self, signal: int) -> None:
        super().__init__(f"stopped by signal {signal}; run the same command to resume")
        self.signal = signal


class Runner:
    """The models and cells of a study.

    Raises:
        InputError: The data do not exist; see also the methods.
    """

    def __init__(self, study: Study, console: Console) -> None:
        self.study, self.console = study, console
        self.output = Path(study.output)
        self._hashes: dict[Path, str] = {}
        if study.measures is not None and not (Path(study.measures.data) / MANIFEST).exists():
            raise InputError(
                f"{study.measures.data} has no {MANIFEST}. Create the data with "
                f"`python recipes/study/data.py --output {study.measures.data}`",
                ErrorCode.FILE_NOT_FOUND,
            )

    # -------------------------------------------------------------- settings and their keys

    def recipe(
        self, stage: Stage, settings: Mapping[str, Any], model: Path, output: Path
    ) -> Recipe:
        """The recipe of a stage with the settings of an arm."""
        changes = {**stage.settings, **settings, "model": str(model), "output": str(output)}
        return read_recipe(stage.recipe, [f"{k}={json.dumps(v)}" for k, v in changes.items()])

    def start_key(self, arm: str) -> str:
        """The key of an arm's untrained model."""
        start = self.study.start_of(arm)
        files = [path for path in (start.config, start.chat_template) if path is not None]
        weights = sorted(Path(start.vision).glob("*.safetensors"))
        if start.llm == SMOLLM2:
            weights.append(smollm2_file())
        return digest([start.model_dump(), [self.hash_of(Path(p)) for p in [*files, *weights]]])

    def stage_key(self, parent: str, recipe: Recipe) -> str:
        """The key of the model that a stage creates from the model with the key `parent`."""
        settings = recipe.model_dump(exclude={"model", *KEYS_IGNORED_ON_RESUME})
        files = [self.hash_of(Path(s.file)) for s in recipe.data if s.file is not None]
        return digest([parent, settings, files])

    def hash_of(self, path: Path) -> str:
        """The SHA-256 of a file, which is read once."""
        if path not in self._hashes:
            self._hashes[path] = hashlib.sha256(path.read_bytes()).hexdigest()
        return self._hashes[path]

    def common_models(self, arm: str) -> list[tuple[str, Path]]:
        """Key and directory of the untrained model and of the model of each shared stage."""
        key = self.start_key(arm)
        models = [(key, self.output / "common" / f"start-{key[:12]}" / "model")]
        for number, stage in enumerate(self.study.shared, 1):
            recipe = self.recipe(stage, self.study.arms[arm].shared, models[-1][1], Path("unused"))
            key = self.stage_key(key, recipe)
            folder = self.output / "common" / f"stage{number}-{key[:12]}"
            models.append((key, folder / "model"))
        return models

    def cell_recipes(self, arm: str, seed: int) -> list[Recipe]:
        """The recipes of a cell's stages."""
        folder, recipes = self.cell_folder(arm, seed), list[Recipe]()
        own = self.study.arms[arm]
        settings = {**own.settings, "seed": seed}
        model = folder / "start" / "model"
        for number, stage in enumerate(self.study.stages, 1):
            if number == len(self.study.stages):
                settings |= own.last_stage
            recipes.append(self.recipe(stage, settings, model, folder / f"stage{number}"))
            model = folder / f"stage{number}" / "model"
        return recipes

    def cell_key(self, arm: str, seed: int) -> str:
        """The key of a cell: of its model and of how it is evaluated."""
        own = self.study.arms[arm].model.model_dump()
        key = digest([self.common_models(arm)[-1][0], own])
        for recipe in self.cell_recipes(arm, seed):
            key = self.stage_key(key, recipe)
        return self.scores_key(key)

    def scores_key(self, key: str) -> str:
        """The key of the scores of the model with a key."""
        study = self.study
        scores = [part and part.model_dump() for part in (study.measures, study.evaluation)]
        return digest([key, scores, study.where, self.data_hash()])

    def data_hash(self) -> str | None:
        """The hash of the manifest of the study's data."""
        measures = self.study.measures
        return None if measures is None else self.hash_of(Path(measures.data) / MANIFEST)

    def cell_folder(self, arm: str, seed: int) -> Path:
        """The directory of a cell."""
        return self.output / "cells" / arm / f"seed-{seed}"

    # -------------------------------------------------------------- models

    def make_common(self, arm: str) -> list[Path]:
        """Create the common models of an arm that do not exist yet, and return all of them.

        Raises:
            InputError: Another process creates them.
        """
        models = [model for _, model in self.common_models(arm)]
        start, settings = models[0], self.study.arms[arm].shared
        if all(map(finished, models)):
            return models
        with exclusive_directory(self.output / "common"):
            if not finished(start):
                start.parent.mkdir(parents=True, exist_ok=True)
                make_start(self.study.start_of(arm), start)
            for stage, parent, model in zip(self.study.shared, models, models[1:], strict=False):
                self.train(self.recipe(stage, settings, parent, model.parent))
        return models

    def train(self, recipe: Recipe) -> None:
        """Run or resume a stage.

        Raises:
            InputError: The launcher failed; see also `owl2.train.run.train`.
            Stopped: After a signal.
        """
        output = Path(recipe.output)
        if finished(output / "model"):
            return
        if self.study.launcher is None:
            result = train(recipe, self.console)
            if not result.finished:
                raise Stopped(result.signal)
            gc.collect()
            return
        output.mkdir(parents=True, exist_ok=True)
        file = output / "recipe.yaml"  # JSON is YAML
        atomic_write_text(file, json.dumps(recipe.model_dump(exclude_unset=True), indent=1))
        # The commands of this Python environment come first, also if it is not activated.
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        command = [*shlex.split(self.study.launcher), str(file)]
        code = subprocess.run(command, env={**os.environ, "PATH": path}).returncode
        if code > SIGNALED:
            raise Stopped(code - SIGNALED)
        if code:
            raise InputError(
                f"`{self.study.launcher} {file}` ended with the exit code {code}",
                ErrorCode.PROCESS_FAILED,
            )

    # -------------------------------------------------------------- cells

    def run_cell(self, arm: str, seed: int) -> Json:
        """Train and evaluate one cell, or read its results.

        Raises:
            InputError: Its directory contains results of other settings.
            Stopped: After a signal.
        """
        folder, key = self.cell_folder(arm, seed), self.cell_key(arm, seed)
        claim(folder, key)
        if (saved := read_json(folder / "cell.json")) is not None:
            self._remove_models(arm, seed)
            return saved
        models, recipes = self.make_common(arm), self.cell_recipes(arm, seed)
        start = Path(recipes[0].model)
        if not finished(start):
            start.parent.mkdir(parents=True, exist_ok=True)
            make_arm(models[-1], self.study.arms[arm].model, start, seed)
        for recipe in recipes:
            self.train(recipe)
        runs = [json.loads((Path(r.output) / "run.json").read_text()) for r in recipes]
        began = time.perf_counter()
        scores = self.scores(Path(recipes[-1].output) / "model", models[0], folder)
        last = runs[-1]
        cell = {
            "arm": arm,
            "seed": seed,
            "key": key,
            **scores,
            "parameters": last["trainable_parameters"] + last["frozen_parameters"],
            "trainable_parameters": last["trainable_parameters"],
            "steps": sum(run["steps"] for run in runs),
            "tokens": sum(run["tokens"] for run in runs),
            "data_order": [data_order(recipe) for recipe in recipes],
            "data_sha256": self.data_hash(),
            "recipe_sha256": [digest(recipe.model_dump()) for recipe in recipes],
            "versions": last["versions"],
            "machine": machine(),
            "seconds": {
                "train": sum(run["seconds"] for run in runs),
                "evaluate": time.perf_counter() - began,
            },
        }
        atomic_write_text(folder / "cell.json", json.dumps(cell, indent=1) + "\n")
        self._remove_models(arm, seed)
        return cell

    def _remove_models(self, arm: str, seed: int) -> None:
        if not self.study.keep_models:
            for path in self.cell_folder(arm, seed).glob("*/model"):
                shutil.rmtree(path, ignore_errors=True)

    def scores(self, model: Path, start: Path, folder: Path) -> Json:
        """All scores of a model: ``metrics``, ``categories``, ``replaced`` and ``where``."""
        study, metrics, found = self.study, dict[str, float](), Json()
        if study.evaluation is not None:
            metrics |= self.evaluation_scores(model, folder / "eval")
        if study.measures is not None:
            # Only for a study with measures, so that other studies do not need their packages.
            from measures import category_scores, measure

            given = study.measures
            options: Json = {"limit": given.limit, "batch_size": given.batch_size}
            data = Path(given.data)
            metrics |= measure(model, start, data, folder / "measures", **options)
            found["categories"] = category_scores(folder / "measures")
            if study.where is not None:
                engine = Engine.from_pretrained(model, dtype="float32")
                found["where"] = where_it_acts(engine, data, study.where)
                del engine
                other = folder / "replaced" / "model"
                if finished(other) or replace_keys_and_values(model, other):
                    output = folder / "replaced" / "measures"
                    found["replaced"] = measure(
                        other, start, data, output, only=REPLACED, **options
                    )
                    shutil.rmtree(other)
        return {"metrics": metrics, **found}

    def evaluation_scores(self, model: Path, output: Path) -> dict[str, float]:
        """The main score of each task of `owl2 eval`, also without images if requested."""
        assert self.study.evaluation is not None
        options = self.study.evaluation.model_dump()
        data = options.pop("data")
        config = EvalConfig(
            ModelArgs(model, dtype="float32"), output, data=data and Path(data), **options
        )
        scores = {}
        for task, result in evaluate(config, self.console)["tasks"].items():
            for suffix in ("", "_no_image"):
                name = result["main_metric"] + suffix
                if name in result["metrics"]:
                    scores[task + suffix] = result["metrics"][name]
        return scores

    def run_start(self) -> Json | None:
        """The scores of the common model of the baseline arm, before the stages.

        Raises:
            InputError: Another process creates the model or evaluates it; its directory contains
                scores of other settings.
        """
        models = self.make_common(self.study.baseline)
        folder = models[-1].parent / "scores"
        claim(folder, self.scores_key(self.common_models(self.study.baseline)[-1][0]))
        saved = read_json(folder / "cell.json")
        if saved is not None:
            return saved
        with exclusive_directory(folder):
            began = time.perf_counter()
            saved = self.scores(models[-1], models[0], folder)
            saved["seconds"] = {"evaluate": time.perf_counter() - began}
            atomic_write_text(folder / "cell.json", json.dumps(saved, indent=1) + "\n")
        return saved


def claim(folder: Path, key: str) -> None:
    """Write the key of the settings to a directory, before anything that depends on them.

    Raises:
        InputError: The directory has a finished or interrupted run with another key.
    """
    saved = read_json(folder / "key.json") or read_json(folder / "cell.json") or {}
    if saved.get("key", key) != key:
        raise InputError(
            f"{folder} contains a run with other settings or data. Remove it, or choose another "
            "`output`",
            ErrorCode.RESUME_MISMATCH,
        )
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write_text(folder / "key.json", json.dumps({"key": key}) + "\n")


def finished(model: Path) -> bool:
    """Whether a model directory, which is created atomically, exists."""
    return (model / "config.json").exists()


def digest(value: Any) -> str:
    """A hash of JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def data_order(recipe: Recipe) -> str | None:
    """A hash of the sources and rows of all samples of a run, in their order.

    None with shards, whose samples have no row; their order depends on the seed as well.
    """
    if any(source.shards is not None for source in recipe.data):
        return None
    sources = [
        MixtureSource(open_dataset(**s.origin()), s.count, s.weight, s.title) for s in recipe.data
    ]
    processor: Any = None  # only the order is used
    dataset = MixtureDataset(sources, processor, seed=recipe.seed)
    steps = recipe.max_steps
    if steps is None:
        assert recipe.epochs is not None and dataset.epoch_size is not None
        count = round(recipe.epochs * dataset.epoch_size)
    else:
        count = steps * recipe.batch_size
    taken = MixtureSampler(dataset).take(count)
    return digest([[index.source, index.row] for index in taken])


def machine() -> Json:
    """The processor and the number of cores."""
    name = platform.processor() or platform.machine()
    if (file := Path("/proc/cpuinfo")).exists():
        names = [line for line in file.read_text().splitlines() if line.startswith("model name")]
        name = names[0].partition(":")[2].strip() if names else name
    return {"processor": name, "cores": os.cpu_count()}


def read_json(path: Path) -> Json | None:
    """A JSON file, or None if it does not exist."""
    return json.loads(path.read_text("utf-8")) if path.exists() else None
