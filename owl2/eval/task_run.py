"""One task of an evaluation: its samples, responses and scores.

::

    samples ──without those in the cache──► shard of this process ──sorted by length──► batches
    ──Engine.batch, or lm-eval──► texts ──► ShardedJsonl of all processes
    ──in the order of the samples──► responses ──metric──► scores
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from rich.console import Console

from owl2.engine.engine import Engine
from owl2.errors import ErrorCode, InputError
from owl2.eval.conditions import render_prompt
from owl2.eval.fingerprints import cache_key
from owl2.eval.metrics import SampleScore, Scores
from owl2.eval.rater import Rater
from owl2.eval.readers import EvalData
from owl2.eval.response_records import generated_texts, lm_eval_records, most_likely_options
from owl2.eval.samples import NO_IMAGE, EvalSample, InvalidEvalSample, Response, evenly_spaced
from owl2.eval.tasks import EvalTask
from owl2.processing.default_templates import DEFAULT_CHAT_TEMPLATE
from owl2.processing.message_parts import IMAGE_TOKEN
from owl2.processing.processor import Owl2Processor
from owl2.progress import ProgressReporter
from owl2.sharded_jsonl import Record, ShardedJsonl

TRIAL_BATCHES = 2  # of an estimate
# The format of the authors' evaluation scripts, with a space after "ASSISTANT:".
SPACE_CHAT_TEMPLATE = "' ASSISTANT: '".join(DEFAULT_CHAT_TEMPLATE.rsplit("' ASSISTANT:'", 1))

ChatFormat = tuple[Any, bool]  # chat template, image_newline


@dataclass
class TaskRun:
    """A task during an evaluation.

    Attributes:
        name: That of the task; with `NO_IMAGE` for the baseline.
        data: The files and the prompt.
        samples: The samples to evaluate.
        invalid: Samples that the model cannot be asked: found by the reader or by the engine.
        limit: Number of samples, if it is less than all.
        baseline: The same task without images.
        rater: Of a task whose responses are scores.
        conditions: Everything that the responses depend on, except samples, weights and machine.
        responses: In the order of the samples.
        seconds: Time for the responses, summed over processes and resumed runs.
        scores: Those of all responses.
        categories: The metrics of each category, if there are several.
        max_new_tokens: Replaces that of the task.
        num_truncated: Responses with as many tokens as allowed.
    """

    name: str
    task: EvalTask
    data: EvalData
    samples: list[EvalSample]
    invalid: list[InvalidEvalSample]
    limit: int | None = None
    baseline: "TaskRun | None" = None
    rater: Rater | None = None
    conditions: dict[str, Any] = field(default_factory=dict)
    responses: list[Response] = field(default_factory=list)
    seconds: float = 0.0
    scores: Scores | None = None
    categories: dict[str, dict[str, float]] = field(default_factory=dict)
    max_new_tokens: int | None = None
    num_truncated: int = 0

    @property
    def passes(self) -> "list[TaskRun]":
        """This run, and its baseline if there is one."""
        return [self] if self.baseline is None else [self, self.baseline]

    @property
    def generation_kwargs(self) -> dict[str, Any]:
        """Greedy, so that a model gives the same responses whatever its generation config is."""
        if self.rater is not None:
            return self.rater.settings
        config = self.task.config
        if config.rank_options:
            return {"rank_options": config.rank_options, "max_new_tokens": 0}
        limit = self.max_new_tokens or config.max_new_tokens
        minimum = min(config.min_new_tokens, limit)
        more = {"min_new_tokens": minimum} if minimum else {}
        return {"do_sample": False, "max_new_tokens": limit, **more}

    def add_baseline(self) -> None:
        """Ask the same questions without images; texts have none, and ratings need them."""
        if not self.task.config.lm_eval and not self.rater:
            samples = [sample.without_images() for sample in self.samples]
            self.baseline = TaskRun(f"{self.name}{NO_IMAGE}", self.task, self.data, samples, [])

    def set_chat_format(self, processor: Owl2Processor, own: ChatFormat) -> None:
        """Use the chat format of the authors' scripts if the task has it, or else `own`.

        A checkpoint whose turns are not ``USER: ... ASSISTANT:`` keeps its format.

        Args:
            own: The format of the checkpoint.
        """
        processor.chat_template, processor.image_newline = own
        space = self.task.config.assistant_space
        if self.data.has_task_format and space is not None:
            probe = [{"role": "user", "content": "?"}]
            text = processor.apply_chat_template(probe, add_generation_prompt=True)
            if str(text).endswith("USER: ? ASSISTANT:"):
                template = SPACE_CHAT_TEMPLATE if space else DEFAULT_CHAT_TEMPLATE
                processor.chat_template, processor.image_newline = template, False

    # -------------------------------------------------------------- responses

    def generate(
        self, engine: Engine, cache: ShardedJsonl, batch_size: int, console: Console
    ) -> None:
        """Write the responses to the shard of this process into the cache.

        The responses do not depend on `batch_size`, except for rounding errors.

        Raises:
            InputError: lm-eval is required and not installed; the disk is full.
        """
        keys = [cache_key(sample) for sample in self.samples]
        shard = cache.worker.shard(range(len(keys)))
        pending = [index for index in shard if keys[index] not in cache]
        done = len(shard) - len(pending)
        with ProgressReporter(console, self.name, len(shard), done, "questions") as progress:
            start = time.perf_counter()
            for records in self.responses_to(pending, engine, batch_size):
                now = time.perf_counter()
                for index, record in records.items():
                    record |= {"key": keys[index], "id": self.samples[index].id}
                    record["seconds"] = (now - start) / len(records)
                cache.append(records.values())
                progress.advance(len(records))
                start = now

    def responses_to(
        self, pending: Sequence[int], engine: Engine, batch_size: int
    ) -> Iterator[dict[int, Record]]:
        """Generate records by the index of their sample, one batch at a time."""
        samples, config = self.samples, self.task.config
        if config.lm_eval:
            return lm_eval_records(self.task, self.data, samples, pending, engine, batch_size)
        if self.rater is not None:
            return self.rater.rate(samples, pending, batch_size)
        if config.rank_options:
            return most_likely_options(samples, pending, engine, config.rank_options == "mean")
        options = self.generation_kwargs
        return generated_texts(samples, pending, engine, batch_size, options)

    def collect(self, cache: ShardedJsonl) -> None:
        """Wait for the responses of all processes and read them.

        Raises:
            InputError: Another process died.
        """
        keys = [cache_key(sample) for sample in self.samples]
        cache.wait(keys)
        for sample, record in zip(self.samples, map(cache.record, keys), strict=True):
            self.seconds += record["seconds"]
            self.num_truncated += record.get("truncated", False)
            if "invalid" in record:
                self.invalid.append(InvalidEvalSample(sample.id, record["invalid"]))
                continue
            if "scores" in record:
                sample = replace(sample, metadata={**sample.metadata, "scores": record["scores"]})
            response = Response(sample, record["prompt"], record["text"], record["images"])
            self.responses.append(response)

    def estimate(self, engine: Engine, batch_size: int) -> dict[str, float]:
        """Count the tokens of all prompts and time a trial, whose responses are discarded.

        Returns:
            The numbers of questions and images, the tokens of the prompts (including those of
            images), the maximum of new tokens, and the seconds; with the baseline.
        """
        text_tokens = images = 0
        valid: list[EvalSample] = []
        for sample in self.samples:
            if prompt := render_prompt(engine, sample.messages):  # an invalid sample takes no time
                valid.append(sample)
                images += prompt.count(IMAGE_TOKEN)
                text = prompt.replace(IMAGE_TOKEN, "")
                text_tokens += len(engine.processor.tokenizer(text)["input_ids"])
        trial = replace(self, samples=evenly_spaced(valid, TRIAL_BATCHES * batch_size))
        seconds = 0.0  # for the trial, after a warm-up with its first batch
        for count in (min(batch_size, len(trial.samples)), len(trial.samples)):
            start = time.perf_counter()
            for _ in trial.responses_to(range(count), engine, batch_size):
                pass
            seconds = time.perf_counter() - start
        passes = len(self.passes)
        questions = len(valid) * passes
        return {
            "questions": questions,
            "images": images,
            "prompt tokens": text_tokens * passes + images * engine.processor.num_image_tokens,
            "new tokens (max)": questions * self.generation_kwargs.get("max_new_tokens", 0),
            "time": seconds * questions / max(1, len(trial.samples)),
        }

    # -------------------------------------------------------------- scores

    def score(self) -> None:
        """Score all responses, and those of each category.

        Raises:
            InputError: There are no responses; a package of the metric is missing.
        """
        if not self.responses:
            raise InputError(
                f"None of the {len(self.samples)} samples is valid. The first error: "
                f"{self.invalid[-len(self.samples)].reason}",
                ErrorCode.EMPTY_DATASET,
            )
        self.scores = self.task.metric.score(self.responses)
        by_category: dict[str, list[Response]] = {}
        for response in self.responses:
            by_category.setdefault(response.sample.category, []).append(response)
        if len(by_category) > 1:
            for category, responses in sorted(by_category.items()):
                with suppress(InputError):  # a correlation needs several scores
                    self.categories[category] = self.task.metric.score(responses).metrics

    @property
    def scored(self) -> list[tuple[Response, SampleScore]]:
        """Each response with its score; empty before `score`."""
        scores = [] if self.scores is None else self.scores.per_sample
        return list(zip(self.responses, scores, strict=False))


def chat_format(processor: Owl2Processor) -> ChatFormat:
    """The chat format of a checkpoint, for `TaskRun.set_chat_format`."""
    return processor.chat_template, processor.image_newline
