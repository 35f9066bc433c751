"""Questions → answers, in batches, each written down as soon as it is there.

::

    questions ──less those answered earlier──► this process's share ──sorted by length──► batches
    ──Engine.batch, or lm-eval──► texts ──► Journal, of all processes
    ──in the questions' order──► Answers, and Brokens for those that could not be asked
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rich.console import Console

from owl2.engine.engine import Engine
from owl2.errors import InputError
from owl2.eval.fingerprints import image_fingerprint
from owl2.eval.readers import Source
from owl2.eval.response_cache import Journal, Row, key_of
from owl2.eval.samples import Answer, Broken, Question
from owl2.eval.sharding import Team
from owl2.eval.tasks import Task
from owl2.processing.chat_template import parse_messages
from owl2.progress import ProgressReporter

TEXT_CHUNK = 8  # batches of lm-eval that are written down together


@dataclass(frozen=True)
class Asked:
    """A round's answers, in the order of its questions.

    Attributes:
        broken: what could not be asked, such as an image that cannot be read.
        seconds: that were spent on them, of all processes and of all starts together.
        images: fingerprints of each answer's images.
    """

    answers: list[Answer]
    broken: list[Broken]
    seconds: float
    images: list[list[str]] = field(default_factory=list)


@dataclass
class Round:
    """A task's questions with their images, or blind, on their way to answers.

    Attributes:
        name: of its files.
    """

    name: str
    task: Task
    source: Source
    questions: Sequence[Question]
    journal: Journal
    keys: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self.keys = [key_of(question) for question in self.questions]

    def ask(self, engine: Engine, batch_size: int, team: Team, console: Console) -> None:
        """This process's share of what nobody has answered yet, into the journal.

        The answers do not depend on `batch_size`, as far as the dtype's rounding goes.

        Raises:
            InputError: lm-eval, which some tasks need, is not installed; the disk is full.
        """
        known = self.journal.known()
        places = team.share(range(len(self.keys)))
        todo = [place for place in places if self.keys[place] not in known]
        ask = _ask_text if self.task.recipe.way == "lm-eval" else _ask
        done = len(places) - len(todo)
        with ProgressReporter(console, self.name, len(places), done, "questions") as progress:
            began = time.perf_counter()
            for rows in ask(engine, self, todo, batch_size):
                now = time.perf_counter()
                for place, row in rows.items():
                    row |= {"key": self.keys[place], "id": self.questions[place].id}
                    row["seconds"] = (now - began) / len(rows)
                self.journal.add(rows.values())
                progress.advance(len(rows))
                began = now

    def gather(self) -> Asked:
        """What came of all questions, once all processes have answered theirs.

        Raises:
            InputError: another process stands still.
        """
        rows = self.journal.all(self.keys)
        done = Asked([], [], sum(row["seconds"] for row in rows))
        for question, row in zip(self.questions, rows, strict=True):
            if "broken" in row:
                done.broken.append(Broken(question.id, row["broken"]))
                continue
            facts = {**question.facts, **row.get("facts", {})}
            answer = Answer(replace(question, facts=facts), row["prompt"], row["answer"])
            done.answers.append(answer)
            done.images.append(row["images"])
        return done


def decoding_of(task: Task) -> dict[str, Any]:
    """Greedy, so that the same model gives the same answers, whatever its own settings are."""
    return {"do_sample": False, "max_new_tokens": task.recipe.max_new_tokens}


def _ask(
    engine: Engine, round_: Round, todo: Sequence[int], batch_size: int
) -> Iterator[dict[int, Row]]:
    """Rows by the places of their questions, a batch at a time."""
    prompts: dict[int, str] = {}
    unfit: dict[int, Row] = {}
    for place in todo:
        try:
            prompts[place] = prompt_of(engine, round_.questions[place])
        except InputError as error:
            unfit[place] = {"broken": str(error)}
    if unfit:
        yield unfit
    # Like with like, so that little is padding; the longest first, so that memory is short at the
    # start or not at all.
    order = sorted(prompts, key=lambda place: -len(prompts[place]))
    for start in range(0, len(order), batch_size):
        places = order[start : start + batch_size]
        asked = [round_.questions[place].messages for place in places]
        said = answer_or_reason(engine, asked, decoding_of(round_.task))
        rows: dict[int, Row] = {}
        for place, text in zip(places, said, strict=True):
            if isinstance(text, InputError):
                rows[place] = {"broken": str(text)}
            else:
                images = image_fingerprints(round_.questions[place])
                rows[place] = {"prompt": prompts[place], "answer": text, "images": images}
        yield rows


def answer_or_reason(
    engine: Engine, asked: Sequence[list[dict[str, Any]]], decoding: dict[str, Any]
) -> list[str | InputError]:
    """An answer for each, or why it could not be asked.

    One image that cannot be read fails a batch before the model runs, so it is looked for by
    halving.
    """
    try:
        return [*engine.batch(asked, **decoding)]
    except InputError as error:
        if len(asked) == 1:
            return [error]
    half = len(asked) // 2
    first = answer_or_reason(engine, asked[:half], decoding)
    return first + answer_or_reason(engine, asked[half:], decoding)


def _ask_text(
    engine: Engine, round_: Round, todo: Sequence[int], batch_size: int
) -> Iterator[dict[int, Row]]:
    from owl2.eval.adapters.text_tasks import run_text  # imports lm-eval, which takes seconds

    chunk = batch_size * TEXT_CHUNK
    for start in range(0, len(todo), chunk):
        places = todo[start : start + chunk]
        questions = [round_.questions[place] for place in places]
        answers = run_text(round_.task, round_.source, questions, engine, batch_size)
        yield {
            place: {
                "prompt": answer.prompt,
                "answer": answer.text,
                "images": [],
                "facts": _added(question.facts, answer.question.facts),
            }
            for place, question, answer in zip(places, questions, answers, strict=True)
        }


def _added(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in after.items() if name not in before}


def prompt_of(engine: Engine, question: Question) -> str:
    """The question as the model gets it, images as ``<|image|>``."""
    return str(engine.processor.apply_chat_template(question.messages, add_generation_prompt=True))


def image_fingerprints(question: Question) -> list[str]:
    """Of each of its images, in order."""
    return [image_fingerprint(source) for source in parse_messages(question.messages).images]
