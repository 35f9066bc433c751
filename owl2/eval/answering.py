"""Questions → answers, in batches, each written down as soon as it is there.

::

    questions ──sorted by length──► batches ──Engine.batch──► texts ──scorer──► PART.jsonl
                                             ──in the questions' order──► list of Answers
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from owl2.errors import InputError
from owl2.eval.progress import Watch
from owl2.eval.tasks import Question, Task
from owl2.inference.decoding import Options
from owl2.inference.engine import Engine


@dataclass(frozen=True)
class Answer:
    """What the model said; `prompt` is the text that it got, pictures as `<|image|>`."""

    question: Question
    prompt: str
    text: str
    is_right: bool

    def to_json(self) -> str:
        """A line of the file of answers."""
        row = {
            "id": self.question.id,
            "question": self.question.text,
            "kind": self.question.kind,
            "prompt": self.prompt,
            "expected": list(self.question.expected),
            "answer": self.text,
            "correct": self.is_right,
        }
        return json.dumps(row, ensure_ascii=False)


def decoding_of(task: Task) -> Options:
    """Greedy, so that the same model gives the same answers, whatever its own settings are."""
    return {"do_sample": False, "max_new_tokens": task.max_new_tokens}


def answer_all(
    engine: Engine,
    task: Task,
    questions: Sequence[Question],
    batch_size: int,
    watch: Watch,
    part: Path,
) -> list[Answer]:
    """The answers in the order of the questions.

    They do not depend on `batch_size`, as far as the dtype's rounding goes.

    Args:
        part: a file for the answers so far, a line each, in the order in which they are made; it
            is still there if this is interrupted.

    Raises:
        InputError: as `Engine.batch`.
    """
    asked = [(question, prompt_of(engine, question)) for question in questions]
    # Like with like, so that little is padding; the longest first, so that memory is short at the
    # start or not at all.
    order = sorted(range(len(asked)), key=lambda place: -len(asked[place][1]))
    answers: dict[int, Answer] = {}
    with part.open("w", encoding="utf-8") as file:
        for start in range(0, len(order), batch_size):
            places = order[start : start + batch_size]
            texts = engine.batch(
                [asked[place][0].messages for place in places], **decoding_of(task)
            )
            for place, text in zip(places, texts, strict=True):
                question, prompt = asked[place]
                is_right = task.scorer.is_right(text, question.expected)
                answers[place] = Answer(question, prompt, text, is_right)
                file.write(answers[place].to_json() + "\n")
            file.flush()
            watch.add(len(places), sum(answers[place].is_right for place in places))
    return [answers[place] for place in range(len(asked))]


def prompt_of(engine: Engine, question: Question) -> str:
    """The question as the model gets it."""
    try:
        prompt: Any = engine.processor.apply_chat_template(
            question.messages, add_generation_prompt=True
        )
    except InputError as error:
        raise InputError(f"{question.id}: {error}") from error
    return str(prompt)
