"""Looks at samples that are not trained on: the loss over them, and answers to a few.

::

    sources ──take turns──► the first `samples` ──each process its share──► padded batches ──► loss
                                   └── `answers` of them: question ──greedy──► answer | wanted

A look changes nothing: neither weights nor chance nor the order of the training samples, so a run
with looks ends with the weights of one without, bit for bit.

Processes whose weights are shared out (FSDP2, ZeRO-3) can only compute together. So all have the
same number of batches, the last of some perhaps empty, and all answer the same questions; where
weights are not shared out, that costs no more time than if one answered and the others waited.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from owl2.constants import IGNORE_INDEX
from owl2.data.collate import Collator, Features, encode_sample
from owl2.data.dataloader import iter_ignoring_signals
from owl2.data.open_dataset import SampleDataset
from owl2.data.sample import InvalidSample, Message, Sample, get_or_invalid
from owl2.engine.engine import Engine
from owl2.errors import InputError
from owl2.model.modeling import Owl2ForConditionalGeneration
from owl2.processing.chat_template import content_to_text, parse_messages
from owl2.processing.processor import Owl2Processor
from owl2.train.distributed import Team
from owl2.train.jsonl_logger import Lines

# An answer that goes on for longer is cut: it is to be looked at, not to be measured.
ANSWER_TOKENS = 64


@dataclass(frozen=True)
class Answer:
    """What the model says to the first question of a sample, beside what it should say.

    `images`: what the question shows, as `load_image` takes them.
    """

    source: str
    question: str
    wanted: str
    answer: str
    images: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Look:
    """What one look saw.

    Attributes:
        loss: mean over the labelled tokens of all samples, in nats.
        tokens: how many these are; `samples`: of how many samples.
        left_out: samples that could not be used.
        seconds: how long the look took.
    """

    step: int
    loss: float
    tokens: int
    samples: int
    left_out: int
    seconds: float
    answers: tuple[Answer, ...] = ()

    def line(self) -> dict[str, Any]:
        """The look as ``validation.jsonl`` has it: its attributes; of answers not the images."""
        line = asdict(self)
        for answer in line["answers"]:
            del answer["images"]
        return line


class HeldOut(Dataset[Features | InvalidSample]):
    """Held-out samples by number → features; what a DataLoader's workers do.

    Attributes:
        samples: those that are looked at; sources take turns, so that each has its part.

    Raises:
        InputError: a stream, of which only the first so many can be held, without `most`; nothing
            to look at.
    """

    def __init__(
        self,
        sources: Sequence[tuple[SampleDataset, int | None]],
        processor: Owl2Processor,
        *,
        most: int | None = None,
        max_length: int | None = None,
    ) -> None:
        """`sources`: each with how many of its samples are looked at, None for all. `most`: of all
        sources together."""
        self.sources = [_places(source, count, most) for source, count in sources]
        self.places = list(islice(_turns([len(source) for source in self.sources]), most))
        if not self.places:
            raise InputError("validation: its `data` has no samples")
        self.processor = processor
        self.max_length = max_length

    def __len__(self) -> int:
        return len(self.places)

    def sample(self, number: int) -> Sample | InvalidSample:
        """A sample as it was read."""
        source, place = self.places[number]
        return get_or_invalid(self.sources[source], place)

    def __getitem__(self, number: int) -> Features | InvalidSample:
        return encode_sample(self.sample(number), self.processor, self.max_length)


def _places(source: SampleDataset, count: int | None, most: int | None) -> Sequence[Any]:
    """The first `count` samples by place; of a stream they are held in memory, at most `most`."""
    if isinstance(source, Sequence):
        return source if count is None else _First(source, count)
    wanted = [number for number in (count, most) if number is not None]
    if not wanted:
        raise InputError(
            "validation: samples of shards are held in memory: set `samples`, or their `count`"
        )
    return list(islice(source, min(wanted)))


class _First(Sequence[Sample]):
    """The first `count` of some samples, read when accessed."""

    def __init__(self, samples: Sequence[Sample], count: int) -> None:
        self.samples = samples
        self.size = min(count, len(samples))

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, place: Any) -> Any:
        return self.samples[range(self.size)[place]]


def _turns(sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(source, place): the first of each source, the second of each, …"""
    for place in range(max(sizes, default=0)):
        yield from ((number, place) for number, size in enumerate(sizes) if place < size)


class Validator:
    """Looks at held-out samples with the model as it is."""

    def __init__(
        self,
        held_out: HeldOut,
        processor: Owl2Processor,
        team: Team,
        *,
        batch_size: int,
        workers: int = 0,
        answers: int = 0,
        skip_bad: bool = False,
    ) -> None:
        """`batch_size`: of a process. `answers`: how many questions are asked. `skip_bad`: leave
        out samples that cannot be used, instead of an InputError."""
        self.held_out = held_out
        self.processor = processor
        self.team = team
        self.workers = workers
        self.skip_bad = skip_bad
        self._batches = _shares(len(held_out), batch_size, team.rank, team.size)
        self._questions = list(islice(self._askable(answers), answers))

    def look(self, model: Owl2ForConditionalGeneration, step: int) -> Look:
        """One look; all processes must take it together.

        Raises:
            InputError: a loss that is not finite, no sample that can be used; without `skip_bad`, a
                sample that cannot be used.
        """
        began = time.perf_counter()
        with _evaluating(model):
            sums = self.team.total(*self._sums(model))
            answers = tuple(self._answers(model))
        loss, tokens, samples, left_out = sums
        if not math.isfinite(loss):
            raise InputError(
                f"validation after step {step}: the loss is {loss}. Try a lower learning_rate, a "
                "longer warm-up, or dtype=float32"
            )
        if not tokens:  # a loss of 0 would look like the best of all
            raise InputError(
                f"validation: none of the {int(left_out)} held-out samples can be used; "
                "`owl2 data check RECIPE` says why"
            )
        seconds = time.perf_counter() - began
        return Look(step, loss / tokens, int(tokens), int(samples), int(left_out), seconds, answers)

    def _sums(self, model: Owl2ForConditionalGeneration) -> tuple[float, int, int, int]:
        """Of this process' share: the loss of all tokens, and the numbers of tokens, of samples and
        of those left out."""
        loss, tokens, samples = 0.0, 0, 0
        left_out: list[InvalidSample] = []
        for collated in iter_ignoring_signals(self._loader()):
            batch = {name: tensor.to(model.device) for name, tensor in collated.inputs.items()}
            # Divided by 1: a sum, so that the mean does not depend on how batches are cut.
            logits = self.team.sharing != "each whole"  # see `Owl2Trainer.compute_loss`
            options = {"num_items_in_batch": 1, "use_cache": False, "return_logits": logits}
            loss += float(model(**batch, **options).loss)
            tokens += int((collated.inputs["labels"][:, 1:] != IGNORE_INDEX).sum())
            samples += collated.num_samples
            left_out += collated.skipped
            # Of several processes none may stop by itself: the others would wait for its weights.
            if left_out and not self.skip_bad and self.team.size == 1:
                break
        with self.team.together():
            if left_out and not self.skip_bad:
                raise InputError(f"validation: {left_out[0].source}: {left_out[0].reason}")
        return loss, tokens, samples, len(left_out)

    def _loader(self) -> DataLoader:
        return DataLoader(
            self.held_out,
            batch_sampler=self._batches,
            collate_fn=Collator(self.processor),
            num_workers=self.workers,
            generator=torch.Generator(),  # its own: the run's chance is not to notice
        )

    def _askable(self, count: int) -> Iterator[tuple[str, list[Message], str]]:
        """(source, question, wanted answer) of samples from all over the held-out ones."""
        if not count:
            return
        step = max(len(self.held_out) // count, 1)
        for number in (n for first in range(step) for n in range(first, len(self.held_out), step)):
            sample = self.held_out.sample(number)
            # Only what trains whole is sure to leave room for an answer.
            if isinstance(sample, InvalidSample) or isinstance(
                self.held_out[number], InvalidSample
            ):
                continue
            turns = parse_messages(sample.messages).turns
            end = next(place for place, turn in enumerate(turns) if turn["role"] == "assistant")
            yield (
                sample.source,
                sample.messages[:end],
                content_to_text(turns[end]["content"]).strip(),
            )

    def _answers(self, model: Owl2ForConditionalGeneration) -> Iterator[Answer]:
        if not self._questions:
            return
        engine = Engine(model, self.processor)
        # Where weights are shared out, all processes take each step, or one waits for ever.
        engine.synced_gpus = True if self.team.sharing != "each whole" else None
        for source, messages, wanted in self._questions:
            answer = engine.chat(messages, max_new_tokens=ANSWER_TOKENS, do_sample=False)
            asked = parse_messages(messages)
            text = "\n".join(content_to_text(turn["content"]) for turn in asked.turns)
            yield Answer(source, text, wanted, answer, tuple(asked.images))


def _shares(count: int, size: int, rank: int, world: int) -> list[list[int]]:
    """Numbers below `count` in batches of at most `size`: those of process `rank` of `world`.

    All processes have the same number of batches; where their numbers run out, empty ones.
    """
    own = range(rank, count, world)
    longest = len(range(0, count, world))
    return [list(own[start : start + size]) for start in range(0, longest, size)]


@contextmanager
def _evaluating(model: Owl2ForConditionalGeneration) -> Iterator[None]:
    """Without dropout, checkpointing and gradients, with a cache for answers; then as before."""
    was_training, used_cache = model.training, model.config.use_cache
    model.eval()
    model.config.use_cache = True
    try:
        with torch.no_grad():
            yield
    finally:
        model.config.use_cache = used_cache
        model.train(was_training)


class Validate(TrainerCallback):
    """Looks before the first step, every so many steps and after the last.

    The look before the first shows where the run began, and finds held-out samples that cannot be
    used before any time has gone into training.
    """

    def __init__(
        self,
        validator: Validator,
        every: int,
        log: Lines,
        model: Callable[[], Owl2ForConditionalGeneration],
        tell: Callable[[Look], None],
    ) -> None:
        """`log`: ``validation.jsonl``. `tell`: who else gets each look."""
        self.validator = validator
        self.every = every
        self.log = log
        self.model = model
        self.tell = tell

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        if state.global_step == 0:
            self._look(0)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        step = state.global_step
        if step % self.every == 0 or step == state.max_steps:
            self._look(step)

    def _look(self, step: int) -> None:
        look = self.validator.look(self.model(), step)
        self.log.add(look.line())
        self.tell(look)
