"""The published scoring models: prompts, words and scales (Model family §1, §2, §3, §5).

A scoring model is asked for a rating and read at the next token: the logits of a few words, such
as the five levels from excellent to bad, give the score.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from owl2 import constants
from owl2.errors import ErrorCode, InputError
from owl2.registry import look_up

TASKS = ("quality", "aesthetics")
KINDS = ("image", "video")
LEVELS = {level: (level,) for level in constants.LEVELS}
_HUB_PROMPT = (
    "USER: How would you rate the {task} of this {{kind}}?\n<|image|>\nASSISTANT: The {task} of "
    "the {{kind}} is"
)
_HUB_PROMPTS = {task: _HUB_PROMPT.format(task=task) for task in TASKS}
_EVALUATION_PROMPTS = {
    "quality": "USER: How would you rate the quality of this {kind}?\n<|image|> ASSISTANT: The "
    "quality of the {kind} is",
    "aesthetics": "USER: <|image|>How would you rate the aesthetics of this {kind}? ASSISTANT: The "
    "aesthetics of the {kind} is",
}
_COMPARISON_QUESTION = (
    "USER: <|image|> <|image|> Compared with the first image, what is your quality rating for "
    "second image?"
)


@dataclass(frozen=True)
class PromptForm:
    """A published form of the prompt.

    Attributes:
        templates: By task, with `{kind}` for "image" or "video".
        score_range: The scores of the worst and the best label; labels between them are evenly
            spaced.
    """

    templates: Mapping[str, str]
    score_range: tuple[float, float]


@dataclass(frozen=True)
class Comparison:
    """How preferences over anchor images become a score (Model family §5).

    Attributes:
        anchor_matrix: Row i, column j: how much anchor i is preferred to anchor j.
        temperature: Divisor of the logits.
        cdfs: By form of the prompt, the function of the difference of two scores that is fitted to
            preferences: "normal" or "logistic".
        steps: By form, the number of steps of the fit.
    """

    anchor_matrix: tuple[tuple[float, ...], ...]
    temperature: float
    cdfs: Mapping[str, str]
    steps: Mapping[str, int]


@dataclass(frozen=True)
class ScoringMethod:
    """How a scoring model is asked, and how its logits become a score.

    Attributes:
        forms: The published forms of the prompt by name; the first is the default.
        labels: Words of each label, the best first. The first word is the label's own; with
            `boost`, the logit of a label is the mean over its words.
        kinds: The inputs that the model was trained for.
        image_policy: How images become squares; None for the checkpoint's policy.
        comparison: For models that compare images with anchors.
    """

    name: str
    forms: Mapping[str, PromptForm]
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: LEVELS)
    kinds: tuple[str, ...] = ("image",)
    image_policy: str | None = None
    comparison: Comparison | None = None

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks of all forms."""
        return tuple(next(iter(self.forms.values())).templates)

    @property
    def can_boost(self) -> bool:
        """Whether labels have several words."""
        return any(len(words) > 1 for words in self.labels.values())


_QUALITY = {"quality": _HUB_PROMPTS["quality"]}
METHODS = {
    method.name: method
    for method in (
        ScoringMethod(
            "q-align",
            {
                "hub": PromptForm(_HUB_PROMPTS, (1, 5)),
                "evaluation": PromptForm(_EVALUATION_PROMPTS, (0, 1)),
                "pyiqa": PromptForm(
                    _QUALITY | {"aesthetics": _HUB_PROMPT.format(task="aesthetic")}, (1, 5)
                ),
            },
            kinds=KINDS,
        ),
        ScoringMethod(
            "deqa-score",
            {
                "hub": PromptForm(_QUALITY, (1, 5)),
                "evaluation": PromptForm({"quality": _EVALUATION_PROMPTS["quality"]}, (1, 5)),
            },
        ),
        ScoringMethod(
            "q-instruct",
            {
                "hub": PromptForm(
                    {"quality": "USER: <|image|>Rate the quality of the {kind}.\nASSISTANT: "},
                    (0, 1),
                )
            },
            labels={
                "good": ("good", "high", "fine"),
                "average": ("average", "medium", "acceptable"),
                "poor": ("poor", "low", "bad"),
            },
            image_policy="crop",
        ),
        ScoringMethod(
            "compare2score",
            {
                name: PromptForm({"quality": _COMPARISON_QUESTION + answer}, (0, 1))
                for name, answer in (
                    ("hub", " \nASSISTANT: The quality of the second image is"),
                    ("repository", " \nASSISTANT: The quality of the second image is"),
                    ("evaluation", " ASSISTANT:The quality of the second image is "),
                )
            },
            labels={
                word: (word,) for word in ("superior", "better", "similar", "worse", "inferior")
            },
            comparison=Comparison(
                (
                    (0.5, 0.25912809, 3.3130276e-4, 1.6087297e-6, 1.1803027e-9),
                    (0.74087191, 0.5, 0.24985345, 0.099954158, 1.8675303e-8),
                    (0.99966872, 0.75014657, 0.5, 0.4996888, 0.24852838),
                    (0.99999839, 0.90004587, 0.5003112, 0.5, 0.25400183),
                    (1.0, 1.0, 0.75147164, 0.74599814, 0.5),
                ),
                temperature=100.0,
                cdfs={"hub": "normal", "repository": "logistic", "evaluation": "logistic"},
                steps={"hub": 100, "repository": 100, "evaluation": 50},
            ),
        ),
    )
}


@dataclass(frozen=True)
class ScoringCheckpoint:
    """A published checkpoint.

    Attributes:
        methods: Names in `METHODS`; the first is the default.
        tasks, kinds: What it was trained for.
        answers: Whether it was also trained to answer questions.
    """

    methods: tuple[str, ...]
    tasks: tuple[str, ...] = ("quality",)
    kinds: tuple[str, ...] = ("image",)
    answers: bool = False


_ALIGN = ("q-align",)
_INSTRUCT = ScoringCheckpoint(("q-instruct",), answers=True)
CHECKPOINTS = {
    "q-future/one-align": ScoringCheckpoint(_ALIGN, TASKS, KINDS),
    "q-future/q-align-quality": ScoringCheckpoint(_ALIGN, kinds=KINDS),
    "q-future/q-align-image": ScoringCheckpoint(_ALIGN, TASKS),
    "q-future/q-align-aesthetic": ScoringCheckpoint(_ALIGN, ("aesthetics",)),
    "q-future/q-align-iaa-vqa": ScoringCheckpoint(_ALIGN, TASKS, KINDS),
    "q-future/q-align-iqa": ScoringCheckpoint(_ALIGN),
    "q-future/q-align-vqa": ScoringCheckpoint(_ALIGN, kinds=("video",)),
    "q-future/q-instruct-mplug-owl2-1031": _INSTRUCT,
    "teowu/mplug_owl2_7b_448_qinstruct_preview_v0.1": _INSTRUCT,
    "teowu/mplug_owl2_7b_448_qinstruct_preview_v0.2": _INSTRUCT,
    "teowu/q-instruct-plus-one-align-preview-v0.3": ScoringCheckpoint(
        ("q-align", "q-instruct"), TASKS, KINDS, answers=True
    ),
    "zhiyuanyou/DeQA-Score-Mix3": ScoringCheckpoint(("deqa-score",)),
    "zhiyuanyou/DeQA-Score-LoRA-Mix3": ScoringCheckpoint(("deqa-score",)),
    "q-future/Compare2Score": ScoringCheckpoint(("compare2score",)),
    "VQA-CityU/Compare2Score_1": ScoringCheckpoint(("compare2score",)),
}
# Published models of the family that answer questions and give no score.
NOT_SCORING = ("q-future/co-instruct", "MAGAer13/mplug-owl2-llama2-7b", "iic/mPLUG-Owl2")
DOCUMENTS = "mPLUG/DocOwl1.5-Omni or mPLUG/DocOwl2"
_DEQA_KEY = "softkl_loss"  # in config.json, a setting of the training


def find_checkpoint(names: tuple[str, ...], config: Mapping[str, Any]) -> str | None:
    """The published checkpoint that a model is, by its name or ``config.json``; None if unknown.

    Args:
        names: The hub id or directory of the model, and of its base model if it is an adapter.
        config: The content of ``config.json``.
    """
    ids = {_short(known): known for known in (*CHECKPOINTS, *NOT_SCORING)}
    found = [ids[_short(name)] for name in names if _short(name) in ids]
    if not found and config.get(_DEQA_KEY) is not None:
        return "zhiyuanyou/DeQA-Score-Mix3"
    return found[0] if found else None


def find_ancestor(config: Mapping[str, Any]) -> str | None:
    """The published checkpoint that ``config.json`` names, from which a model may be trained."""
    return find_checkpoint((str(config.get("_name_or_path") or ""),), {})


def _short(name: str) -> str:
    """The last part of a hub id or a directory."""
    return re.split(r"[/\\]", name.rstrip("/\\"))[-1].casefold()


def select_method(checkpoint: str | None, method: str | None, model: str | Path) -> ScoringMethod:
    """The method of a checkpoint, or the requested one.

    Args:
        checkpoint: From `find_checkpoint`.
        method: A name in `METHODS`, or None.
        model: For messages.

    Raises:
        InputError: The method is unknown or is not the checkpoint's, the checkpoint does not score,
            or there is neither.
    """
    if method is not None:
        look_up("scoring method", method, METHODS)
    known = CHECKPOINTS.get(checkpoint or "")
    if known is None:
        if method is not None:
            return METHODS[method]
        reason = (
            f"it descends from {checkpoint}, which answers questions and gives no score"
            if checkpoint
            else "neither its name nor its config.json names a published scoring model"
        )
        raise InputError(
            f"{model} has no known scoring method: {reason}. Use a scoring model such as "
            f"q-future/one-align, or select the method ({', '.join(METHODS)}).",
            ErrorCode.UNSUPPORTED,
        )
    if method is not None and method not in known.methods:
        raise InputError(
            f"{model} ({checkpoint}) was not trained for the scoring method {method!r}; its method "
            f"is {known.methods[0]!r}.",
            ErrorCode.CONFLICT,
        )
    return METHODS[method or known.methods[0]]


def score_only_checkpoint(model: str | Path) -> str | None:
    """The published checkpoint that a model is, if it gives scores and answers no questions.

    Its name or directory is compared. None for a model of your own that was trained from it.
    """
    known = find_checkpoint((str(model),), {})
    return known if known in CHECKPOINTS and not CHECKPOINTS[known].answers else None


def check_answers(model: str | Path, documents: bool = False) -> None:
    """Raise an InputError for a published checkpoint that does not answer such questions.

    As for `score_only_checkpoint`, its name or directory is compared.

    Args:
        documents: Whether the questions are about pages, for which those that were trained on the
            quality of images are not made.
    """
    if (known := score_only_checkpoint(model)) is not None:
        nearest = next(name for name, one in CHECKPOINTS.items() if one.answers)
        raise InputError(
            f"{model} ({known}) was trained to give scores and not to answer questions. Rate "
            f"images with `owl2 rate --model {model}`, or ask {nearest} or {NOT_SCORING[0]}.",
            ErrorCode.UNSUPPORTED,
        )
    known = find_checkpoint((str(model),), {})
    if documents and known in (*CHECKPOINTS, NOT_SCORING[0]):
        raise InputError(
            f"{model} ({known}) was trained to answer questions about the quality of images and "
            f"not about documents. For documents use {DOCUMENTS}.",
            ErrorCode.UNSUPPORTED,
        )


def check_task(
    method: ScoringMethod,
    checkpoint: str | None,
    task: str,
    kind: str,
    prompt_form: str | None = None,
) -> None:
    """Raise an InputError if a model was not trained for a task, with the nearest one that was.

    Args:
        prompt_form: As of `ImageScorer`. A prompt of the user may ask for anything.
    """
    if prompt_form not in (None, *method.forms):
        return
    look_up("task", task, dict.fromkeys(TASKS))
    look_up("kind", kind, dict.fromkeys(KINDS))
    known = CHECKPOINTS.get(checkpoint or "") or ScoringCheckpoint(
        (method.name,), method.tasks, method.kinds
    )
    if task in known.tasks and kind in known.kinds and task in method.tasks:
        return
    can = [f"the {one} of {other}s" for one in known.tasks for other in known.kinds]
    nearest = [
        name
        for name, one in CHECKPOINTS.items()
        if task in one.tasks and kind in one.kinds and name != checkpoint
    ]
    raise InputError(
        f"{checkpoint or method.name} does not rate the {task} of {kind}s; it rates "
        f"{' and '.join(can)}. For the {task} of {kind}s use {nearest[0]}.",
        ErrorCode.UNSUPPORTED,
    )
