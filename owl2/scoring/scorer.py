"""Scores of images and videos by the scoring models of the family.

::

    image ──pixels──┐
    prompt ──ids────┴─► PreparedPrompt ──Engine.next_token_logits──► logits of the labels (L,)
    ──softmax──► probabilities ──weights──► score, standard deviation

An image is one prompt, or with Compare2Score one prompt for each anchor image. A video is one
prompt whose placeholder takes all frames. Nothing is generated.

Shapes: B images of a batch, L labels, W words, F frames.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from owl2.checkpoints.adapters import base_name
from owl2.checkpoints.config_file import CONFIG_FILE, find_file, read_json, resolve_checkpoint
from owl2.engine.engine import Engine
from owl2.engine.offline import compute_each, map_batches
from owl2.errors import ErrorCode, InputError
from owl2.processing.message_parts import IMAGE_TOKEN
from owl2.processing.prepared_prompt import PreparedPrompt
from owl2.processing.processor import Owl2Processor
from owl2.processing.tokenizer import encode
from owl2.processing.video import frames_per_second
from owl2.scoring.comparison import comparison_scores
from owl2.scoring.methods import (
    PromptForm,
    ScoringMethod,
    check_task,
    find_ancestor,
    find_checkpoint,
    select_method,
)

# Of models in which an image is one image of the vision encoder.
SCORING_TYPES = ("mplug_owl2", "mplug_owl2_1")


class LogitsEngine(Protocol):
    """What computes logits: `Engine`, or vLLM."""

    processor: Owl2Processor

    def next_token_logits(
        self, prompts: Sequence[PreparedPrompt], token_ids: Sequence[int]
    ) -> torch.Tensor:
        """As `Engine.next_token_logits`."""


@dataclass(frozen=True)
class ImageScore:
    """The score of an image or a video.

    Attributes:
        score: In the range of the method: 1 to 5, 0 to 1, or 0 to 100.
        probabilities: Of the labels, the best first; empty for Compare2Score.
        std: The standard deviation of the score under these probabilities.
        preferences: Compare2Score: how much the image is preferred to each anchor, 0 to 1.
    """

    score: float
    probabilities: dict[str, float] = field(default_factory=dict)
    std: float | None = None
    preferences: tuple[float, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The fields of a record, without those that the method does not have."""
        if self.preferences:
            return {"score": self.score, "preferences": list(self.preferences)}
        return {"score": self.score, "probabilities": self.probabilities, "std": self.std}


class ImageScorer:
    """Rates images and videos with OneAlign, Q-Align, Q-Instruct, DeQA-Score or Compare2Score.

    ::

        scorer = ImageScorer.from_pretrained("q-future/one-align")
        scores = scorer.score(["a.jpg", "b.jpg"], task="aesthetics")

    Args:
        engine: Of the checkpoint.
        method: A name in `METHODS`, or a method of your own.
        checkpoint: The published checkpoint that the model is, to refuse tasks that it was not
            trained for.
        prompt_form: A name in the method's `forms` ("hub", "evaluation", "pyiqa", ...), or a
            template with one `<|image|>` and optionally `{task}` and `{kind}`.
        score_range: The scores of the worst and the best label. Default: those of the prompt's
            form.
        boost: Average the logits of several words of each label (Q-Instruct).
        anchors: The anchor images of Compare2Score, in their published order.
        adapter: One of the adapters of an `Engine`; default: its base model.

    Raises:
        InputError: An option does not fit the method.
    """

    def __init__(
        self,
        engine: LogitsEngine,
        method: str | ScoringMethod,
        *,
        checkpoint: str | None = None,
        prompt_form: str | None = None,
        score_range: tuple[float, float] | None = None,
        boost: bool = False,
        anchors: Sequence[Any] = (),
        adapter: str | None = None,
    ) -> None:
        self.engine = engine
        self.adapter = adapter
        self.method = select_method(None, method, "") if isinstance(method, str) else method
        self.checkpoint = checkpoint
        self.form_name = prompt_form or next(iter(self.method.forms))
        self.form = self._select_form()
        if boost and not self.method.can_boost:
            raise InputError(
                f"{self.method.name} has one word for each label; boost is for q-instruct.",
                ErrorCode.CONFLICT,
            )
        low, high = score_range or self.form.score_range
        self.labels = tuple(self.method.labels)
        self._weights = torch.linspace(high, low, len(self.labels), dtype=torch.float64)  # (L,)
        words = [words if boost else words[:1] for words in self.method.labels.values()]
        self._ids = [self._word_id(word) for label in words for word in label]  # L groups
        with_adapters: Any = engine
        own = engine.processor if adapter is None else with_adapters.processor_of(adapter)
        images = own.image_processor
        policy = self.method.image_policy
        self.image_processor = images.replace(image_policy=policy) if policy else images
        self._anchors = self._read_anchors(anchors)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        *,
        method: str | None = None,
        prompt_form: str | None = None,
        score_range: tuple[float, float] | None = None,
        boost: bool = False,
        anchors: Sequence[Any] = (),
        **options: Any,
    ) -> "ImageScorer":
        """The scorer of a checkpoint.

        Args:
            name_or_path: A directory or a hub id; also of an adapter.
            device, dtype, options: As of `Engine.from_pretrained`.
            method: A name in `METHODS`. Default: recognized from the id or from ``config.json``.
            prompt_form, score_range, boost, anchors: See `ImageScorer`.

        Raises:
            InputError: The checkpoint cannot be loaded, is not a known scoring model, or has
                another method.
        """
        checkpoint, found = recognize(name_or_path, method, options.get("base"))
        return cls(
            Engine.from_pretrained(name_or_path, device, dtype, **options),
            found,
            checkpoint=checkpoint,
            prompt_form=prompt_form,
            score_range=score_range,
            boost=boost,
            anchors=anchors,
        )

    # -------------------------------------------------------------- scores

    def score(
        self, images: Sequence[Any], task: str = "quality", *, batch_size: int = 16
    ) -> list[ImageScore]:
        """The score of each image.

        Args:
            images: As `load_image` takes them: paths, URLs, `PIL.Image`s, arrays, bytes.
            task: "quality" or "aesthetics".
            batch_size: Images that are computed together.

        Raises:
            InputError: An image cannot be read, or the model was not trained for the task.
        """
        return self._all(self.score_iter(images, task, batch_size=batch_size))

    def score_videos(
        self, videos: Sequence[Any], task: str = "quality", *, batch_size: int = 4
    ) -> list[ImageScore]:
        """The score of each video: a path, of which one frame a second is used, or its frames.

        Raises as `score`, for a path also as `frames_per_second`.
        """
        scores = self.score_iter(videos, task, kind="video", batch_size=batch_size)
        return self._all(scores)

    def score_iter(
        self, items: Iterable[Any], task: str = "quality", kind: str = "image", batch_size: int = 16
    ) -> Iterator[ImageScore | InputError]:
        """The score of each image or video, in order, or the error that prevents it.

        Items are read lazily, by threads, while earlier ones are computed.

        Args:
            kind: "image" or "video".

        Raises:
            InputError: The model was not trained for the task.
        """
        self.check_task(task, kind)
        encode = partial(self.encode, task=task, kind=kind)
        return map_batches(encode, self._scores, items, batch_size)

    def check_task(self, task: str, kind: str = "image") -> None:
        """Raise an InputError if the model was not trained for a task, see `check_task`."""
        check_task(self.method, self.checkpoint, task, kind, self.form_name)

    def score_prompts(self, rows: list[list[PreparedPrompt]]) -> list[ImageScore]:
        """The scores of prompts from `encode`, computed together.

        Raises:
            InputError: Logits that are not finite.
        """
        return self._all(compute_each(self._scores, rows))

    def _all(self, scores: Iterable[ImageScore | InputError]) -> list[ImageScore]:
        result: list[ImageScore] = []
        for index, score in enumerate(scores):
            if isinstance(score, InputError):
                raise InputError(f"Image {index}: {score}", score.code)
            result.append(score)
        return result

    # -------------------------------------------------------------- prompts

    def _select_form(self) -> PromptForm:
        forms, name = self.method.forms, self.form_name
        if name in forms:
            return forms[name]
        if IMAGE_TOKEN not in name:
            raise InputError(
                f"The form of the prompt is {name!r}; choose from {', '.join(forms)}, or pass a "
                f"prompt with {IMAGE_TOKEN}.",
                ErrorCode.UNKNOWN_NAME,
            )
        if self.method.comparison is not None:
            raise InputError(
                f"{self.method.name} has only the prompts {', '.join(forms)}.",
                ErrorCode.UNSUPPORTED,
            )
        default = next(iter(forms.values()))
        return replace(default, templates={})

    def prompt(self, task: str = "quality", kind: str = "image") -> str:
        """The text of the prompt."""
        template = self.form.templates.get(task, self.form_name)
        return template.replace("{task}", task).replace("{kind}", kind)

    def encode(self, item: Any, task: str, kind: str = "image") -> list[PreparedPrompt]:
        """The prompt about an image or a video; with anchors, a prompt for each.

        Raises:
            InputError: It cannot be read, or the prompt has several placeholders.
        """
        if kind == "video" and isinstance(item, (str, Path)):
            item = frames_per_second(Path(item))
        frames = list(item) if kind == "video" else [item]
        if not frames:
            raise InputError("The video has no frames.", ErrorCode.MISSING_IMAGE)
        pixels = self.image_processor(frames)["pixel_values"]  # (F, 3, H, W)
        processor = self.engine.processor
        # One placeholder takes all frames. With anchors there are two, and one frame.
        text = self.prompt(task, kind).replace(IMAGE_TOKEN, IMAGE_TOKEN * len(frames))
        ids, tokens = processor.prompt_ids(text), processor.num_image_tokens
        inputs = [pixels]
        if self._anchors is not None:
            inputs = [torch.cat([anchor[None], pixels]) for anchor in self._anchors]
        prompts = (
            PreparedPrompt.from_ids(ids, x, processor.image_token_id, tokens) for x in inputs
        )
        return [replace(prompt, adapter=self.adapter) for prompt in prompts]

    def _word_id(self, word: str) -> int:
        """The first id of a word at the start of a text, the one right after `<s>`."""
        return encode(self.engine.processor.tokenizer, word)[0]

    def _read_anchors(self, anchors: Sequence[Any]) -> torch.Tensor | None:
        """(n, 3, H, W), or None for methods without anchors."""
        comparison = self.method.comparison
        needed = len(comparison.anchor_matrix) if comparison else 0
        if len(anchors) != needed:
            hint = " of VQA-CityU/Anchor_images, in their order" if needed else ""
            raise InputError(
                f"{self.method.name} needs {needed} anchor images{hint}; {len(anchors)} were "
                "passed.",
                ErrorCode.IMAGE_COUNT_MISMATCH,
            )
        return self.image_processor(list(anchors))["pixel_values"] if needed else None

    # -------------------------------------------------------------- logits

    def _scores(self, rows: list[list[PreparedPrompt]]) -> list[ImageScore]:
        """As `score_prompts`; an error is not that of one image."""
        # Prompts with the same anchor share it.
        columns = [
            self.engine.next_token_logits(list(prompts), self._ids)
            for prompts in zip(*rows, strict=True)
        ]
        words = torch.stack(columns, dim=1)  # (B, prompts, W)
        labels = words.unflatten(2, (len(self.labels), -1)).mean(3)  # (B, prompts, L)
        if self.method.comparison is not None:
            return self._compare(labels)
        return [self._weigh(row) for row in labels[:, 0].double().softmax(-1)]

    def _weigh(self, probabilities: torch.Tensor) -> ImageScore:
        """The score of the probabilities (L,) of the labels."""
        score = probabilities @ self._weights
        variance = probabilities @ (self._weights - score) ** 2
        named = dict(zip(self.labels, probabilities.tolist(), strict=True))
        return ImageScore(score.item(), named, variance.sqrt().item())

    def _compare(self, logits: torch.Tensor) -> list[ImageScore]:
        """The scores of logits (B, anchors, L) by maximum likelihood."""
        comparison: Any = self.method.comparison
        probabilities = (logits / comparison.temperature).softmax(-1)
        preferences = probabilities @ self._weights.float()  # (B, anchors)
        scores = comparison_scores(comparison, self.form_name, preferences)
        return [
            ImageScore(score, preferences=tuple(row))
            for score, row in zip(scores.tolist(), preferences.tolist(), strict=True)
        ]


def recognize(
    model: str | Path, method: str | None = None, base: str | Path | None = None
) -> tuple[str | None, ScoringMethod]:
    """The published checkpoint that a model is or was trained from, and its scoring method.

    Args:
        model: A directory or hub id, also of an adapter.
        method: A name in `METHODS`, instead of the checkpoint's own.
        base: The base model of an adapter, instead of the one that it names.

    Raises:
        InputError: As `select_method`; the checkpoint does not exist.
    """
    name = resolve_checkpoint(model, weights=False)
    file = find_file(name, CONFIG_FILE, {})
    config = read_json(file) if file else {}
    if (model_type := config.get("model_type", SCORING_TYPES[0])) not in SCORING_TYPES:
        reason = f"{model} (model_type {model_type!r}) gives no scores; use q-future/one-align."
        raise InputError(reason, ErrorCode.UNSUPPORTED)
    parent = str(base or base_name(name) or "")
    checkpoint = find_checkpoint((str(model), parent), config)
    if checkpoint is None and method is None:  # an explicit method may be that of a new training
        checkpoint = find_ancestor(config)
    return checkpoint, select_method(checkpoint, method, model)
