"""The scores of a scoring model as the responses of a task (`TaskConfig.rating`)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from owl2.engine.engine import Engine
from owl2.engine.load_model import ModelArgs
from owl2.errors import InputError
from owl2.eval.fingerprints import image_digest
from owl2.eval.readers import EvalData
from owl2.eval.samples import EvalSample
from owl2.eval.task_config import Rating, TaskConfig
from owl2.processing.messages import parse_messages
from owl2.scoring.methods import ScoringMethod, check_task
from owl2.scoring.scorer import ImageScorer, recognize
from owl2.sharded_jsonl import Record

VIDEO_SHARE = 16  # a batch has as many times fewer videos than images, as each has many frames


@dataclass
class Rater:
    """Rates the images or videos of a task.

    Attributes:
        checkpoint: The published checkpoint that the model is, or None.
        prompt_form: See `ImageScorer`.
        anchors: The anchor images of Compare2Score.
    """

    rating: Rating
    checkpoint: str | None
    method: ScoringMethod
    prompt_form: str | None = None
    anchors: Sequence[Path] = ()
    _scorer: ImageScorer | None = field(default=None, repr=False)

    @classmethod
    def create(
        cls,
        config: TaskConfig,
        data: EvalData,
        model_args: ModelArgs,
        method: str | None = None,
        anchors: Sequence[Path] = (),
    ) -> "Rater | None":
        """The rater of a task; None if the responses of the task are texts.

        The prompt is that of the authors' evaluation scripts if the task has its own format, that
        of the model card with ``--prompts plain``, or the text of ``--prompt``.

        Raises:
            InputError: The model gives no scores, or was not trained for the task.
        """
        if config.rating is None:
            return None
        checkpoint, found = recognize(model_args.model, method, model_args.base)
        check_task(found, checkpoint, config.rating.task, config.rating.kind)
        form = None if data.prompt == config.prompt else data.prompt
        if data.has_task_format and "evaluation" in found.forms:
            form = "evaluation"
        return cls(config.rating, checkpoint, found, form, anchors)

    def load(self, engine: Engine) -> None:
        """Rate with this model and the current image policy.

        Raises:
            InputError: The anchors or the prompt do not fit the method.
        """
        self._scorer = ImageScorer(
            engine,
            self.method,
            checkpoint=self.checkpoint,
            prompt_form=self.prompt_form,
            anchors=self.anchors,
        )

    @property
    def scorer(self) -> ImageScorer:
        """The scorer of `load`."""
        assert self._scorer is not None, "call load first"
        return self._scorer

    @property
    def prompt(self) -> str:
        """The text of the prompt."""
        return self.scorer.prompt(self.rating.task, self.rating.kind)

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that the scores depend on, except for model and images."""
        return {
            "scoring_method": self.method.name,
            "prompt_form": self.scorer.form_name,
            "prompt": self.prompt,
            "anchors": [image_digest(path) for path in self.anchors],
        }

    def rate(
        self, samples: Sequence[EvalSample], pending: Sequence[int], batch_size: int
    ) -> Iterator[dict[int, Record]]:
        """Generate records by the index of their sample, one batch at a time."""
        kind = self.rating.kind
        size = max(1, batch_size // VIDEO_SHARE) if kind == "video" else batch_size
        items = [parse_messages(samples[index].messages).images[0] for index in pending]
        scores = self.scorer.score_iter(items, self.rating.task, kind, size)
        for start in range(0, len(pending), size):
            records: dict[int, Record] = {}
            for offset in range(start, min(start + size, len(pending))):
                score = next(scores)
                if isinstance(score, InputError):
                    records[pending[offset]] = {"invalid": str(score)}
                    continue
                records[pending[offset]] = {
                    "prompt": self.prompt,
                    "text": f"{score.score:.4f}",
                    "images": [image_digest(items[offset])],
                    "scores": score.to_dict(),
                }
            yield records
