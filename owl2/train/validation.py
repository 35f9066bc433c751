"""Validation on held-out samples: their loss, and generated answers for some of them.

::

    sources ──in turn──► the first `max_samples` ──share per process──► padded batches ──► loss
                                └── `num_generations` prompts ──greedy──► prediction | reference

Validation changes neither weights nor random states nor the order of the training samples, so the
final weights are bit-identical with and without it.

Processes with sharded weights (FSDP2, ZeRO-3) can only compute together. All processes have the
same number of batches, some of them empty, and generate all answers. Without sharding the latter
takes no longer than if one process generated while the others wait.
"""

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from owl2.constants import IGNORE_INDEX
from owl2.data.collate import Collator, Features, encode_sample
from owl2.data.dataloader import iter_ignoring_signals
from owl2.data.open_dataset import SampleDataset
from owl2.data.sample import InvalidSample, Message, Sample, get_or_invalid
from owl2.engine.engine import Engine
from owl2.errors import ErrorCode, InputError
from owl2.model.modeling import Owl2ForConditionalGeneration
from owl2.processing.message_parts import content_to_text
from owl2.processing.messages import parse_messages
from owl2.processing.processor import Owl2Processor
from owl2.train.distributed import DistributedContext

MAX_NEW_TOKENS = 64


@dataclass(frozen=True)
class Generation:
    """The model's answer to the first question of a sample, and the reference.

    `images`: the images of the prompt, as `load_image` takes them.
    """

    source: str
    prompt: str
    reference: str
    prediction: str
    images: tuple[Any, ...] = ()


@dataclass(frozen=True)
class ValidationResult:
    """The result of a validation.

    Attributes:
        loss: Mean over the labels of all samples, in nats per token.
        tokens: Number of labels.
        samples: Number of samples used.
        num_skipped: Number of invalid samples.
    """

    step: int
    loss: float
    tokens: int
    samples: int
    num_skipped: int
    seconds: float
    generations: tuple[Generation, ...] = ()

    def line(self) -> dict[str, Any]:
        """The line of ``validation.jsonl``: all attributes except the images."""
        line = asdict(self)
        for generation in line["generations"]:
            del generation["images"]
        return line


class ValidationDataset(Dataset[Features | InvalidSample]):
    """Features of held-out samples, taken from the sources in turn.

    Args:
        sources: Datasets, each with the number of its samples; None for all.
        max_samples: Of all sources together; None for all. Streams are read into memory.

    Raises:
        InputError: A stream without a limit, or no samples.
    """

    def __init__(
        self,
        sources: Sequence[tuple[SampleDataset, int | None]],
        processor: Owl2Processor,
        *,
        max_samples: int | None = None,
        max_length: int | None = None,
    ) -> None:
        self.processor = processor
        self.max_length = max_length
        self._datasets: list[Sequence[Any]] = []
        rows: list[tuple[int, int]] = []  # (row, number of the dataset), which sort in turn
        for number, (dataset, count) in enumerate(sources):
            limit = min((n for n in (count, max_samples) if n is not None), default=None)
            if isinstance(dataset, Sequence):
                samples: Sequence[Any] = dataset
            elif limit is not None:
                stream: Iterable[Any] = dataset
                samples = list(islice(stream, limit))
            else:
                raise InputError(
                    "validation: samples of shards are kept in memory: set `max_samples`, or "
                    "their `count`",
                    ErrorCode.MISSING_VALUE,
                )
            self._datasets.append(samples)
            rows += [(row, number) for row in range(len(samples))[:limit]]
        self._rows = sorted(rows)[:max_samples]
        if not self._rows:
            raise InputError("validation: its `data` has no samples", ErrorCode.EMPTY_DATASET)

    def __len__(self) -> int:
        return len(self._rows)

    def sample(self, index: int) -> Sample | InvalidSample:
        """The sample before encoding."""
        row, number = self._rows[index]
        return get_or_invalid(self._datasets[number], row)

    def __getitem__(self, index: int) -> Features | InvalidSample:
        return encode_sample(self.sample(index), self.processor, self.max_length)


@dataclass
class Validator:
    """Computes the validation loss and the generations of a model in training.

    Attributes:
        batch_size: Samples per process and batch.
        num_generations: Number of generated answers.
        skip_invalid: Skip invalid samples instead of raising an InputError.
    """

    dataset: ValidationDataset
    processor: Owl2Processor
    context: DistributedContext
    batch_size: int
    num_workers: int = 0
    num_generations: int = 0
    skip_invalid: bool = False

    def __post_init__(self) -> None:
        self._prompts = list(islice(self._choose_prompts(), self.num_generations))

    def evaluate(self, model: Owl2ForConditionalGeneration, step: int) -> ValidationResult:
        """Validate the model after `step`; all processes must call it together.

        Raises:
            InputError: A loss that is not finite, no valid sample, or an invalid sample.
        """
        began = time.perf_counter()
        with _evaluation_mode(model):
            sums = self.context.all_reduce_sum(*self._sums(model))
            generations = tuple(self._generate(model))
        loss = sums[0]
        tokens, samples, num_skipped = map(int, sums[1:])
        if not math.isfinite(loss):
            raise InputError(
                f"validation after step {step}: the loss is {loss}. Try a lower learning_rate, a "
                "longer warm-up, or dtype=float32",
                ErrorCode.NON_FINITE,
            )
        if not tokens:  # a loss of 0 would be the best of all
            raise InputError(
                f"validation: none of the {num_skipped} held-out samples is valid; run `owl2 "
                "data check RECIPE` for the reasons",
                ErrorCode.EMPTY_DATASET,
            )
        seconds = time.perf_counter() - began
        return ValidationResult(
            step, loss / tokens, tokens, samples, num_skipped, seconds, generations
        )

    def _sums(self, model: Owl2ForConditionalGeneration) -> tuple[float, int, int, int]:
        """For the share of this process: the sum of the loss, and the numbers of labels, samples
        and skipped samples."""
        loss, tokens, samples = 0.0, 0, 0
        skipped: list[InvalidSample] = []
        rank, world_size = self.context.rank, self.context.world_size
        loader = DataLoader(
            self.dataset,
            batch_sampler=batches_of(len(self.dataset), self.batch_size, rank, world_size),
            collate_fn=Collator(self.processor),
            num_workers=self.num_workers,
            generator=torch.Generator(),  # leaves the global random state unchanged
        )
        options = {
            "num_items_in_batch": 1,  # a sum, which does not depend on the batches
            "use_cache": False,
            "return_logits": self.context.sharding is not None,  # see `Owl2Trainer.compute_loss`
        }
        for batch in iter_ignoring_signals(loader):
            inputs = {name: tensor.to(model.device) for name, tensor in batch.inputs.items()}
            loss += float(model(**inputs, **options).loss)
            tokens += int((batch.inputs["labels"][:, 1:] != IGNORE_INDEX).sum())
            samples += batch.num_samples
            skipped += batch.skipped
            # One of several processes may not stop alone: the others would wait for its weights.
            if skipped and not self.skip_invalid and self.context.world_size == 1:
                break
        with self.context.raise_on_all_ranks():
            if skipped and not self.skip_invalid:
                raise InputError(
                    f"validation: {skipped[0].source}: {skipped[0].reason}", skipped[0].code
                )
        return loss, tokens, samples, len(skipped)

    def _choose_prompts(self) -> Iterator[tuple[str, list[Message], str]]:
        """(source, prompt, reference) of samples spread evenly over the dataset."""
        size = len(self.dataset)
        stride = max(size // max(self.num_generations, 1), 1)
        for index in sorted(range(size), key=lambda i: i % stride):
            sample = self.dataset.sample(index)
            # A sample that can be encoded is sure to have space for an answer.
            if isinstance(sample, InvalidSample) or isinstance(self.dataset[index], InvalidSample):
                continue
            turns = parse_messages(sample.messages).turns
            end = next(i for i, turn in enumerate(turns) if turn["role"] == "assistant")
            reference = content_to_text(turns[end]["content"]).strip()
            yield sample.source, sample.messages[:end], reference

    def _generate(self, model: Owl2ForConditionalGeneration) -> Iterator[Generation]:
        if not self._prompts:
            return
        # With sharded weights all processes must run every decoding step, or one waits forever.
        engine = Engine(model, self.processor, synced_gpus=bool(self.context.sharding))
        for source, messages, reference in self._prompts:
            prediction = engine.chat(messages, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
            parsed = parse_messages(messages)
            prompt = "\n".join(content_to_text(turn["content"]) for turn in parsed.turns)
            yield Generation(source, prompt, reference, prediction, tuple(parsed.images))


def batches_of(count: int, size: int, rank: int, world_size: int) -> list[list[int]]:
    """The batches of `rank`: every `world_size`-th index below `count`, at most `size` per batch.

    All processes have the same number of batches; the last ones may be empty.
    """
    own = range(rank, count, world_size)
    longest = len(range(0, count, world_size))
    return [list(own[start : start + size]) for start in range(0, longest, size)]


@contextmanager
def _evaluation_mode(model: Owl2ForConditionalGeneration) -> Iterator[None]:
    """Disable dropout, checkpointing and gradients, enable the KV cache; restored at the end."""
    was_training, used_cache = model.training, model.config.use_cache
    model.eval()
    model.config.use_cache = True
    try:
        with torch.no_grad():
            yield
    finally:
        model.config.use_cache = used_cache
        model.train(was_training)
