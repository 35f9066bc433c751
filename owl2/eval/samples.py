"""What is asked, what was answered, and what could not be asked."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from owl2.data.sample import Message


@dataclass(frozen=True)
class Question:
    """One question, asked by itself.

    Attributes:
        id: unique in its task, as the benchmark has it where it has one.
        text: the bare question.
        messages: what the model is asked, which ends with a user turn; images are not yet opened.
        expected: the answers that are right; several where people answered; none where a judge
            decides.
        kind: what the results are broken down by; "" for nothing.
        facts: what the metric needs beside the answers, by name; JSON.
    """

    id: str
    text: str
    messages: list[Message]
    expected: tuple[str, ...]
    kind: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Broken:
    """A sample that cannot be asked: `reason` is a sentence for people."""

    id: str
    reason: str


@dataclass(frozen=True)
class Answer:
    """What the model said; `prompt` is the text that it got, images as `<|image|>`."""

    question: Question
    prompt: str
    text: str
