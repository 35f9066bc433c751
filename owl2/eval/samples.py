"""Samples of a benchmark, and the responses of a model."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import Any, TypeVar

from owl2.data.sample import Message
from owl2.processing.message_parts import IMAGE_TOKEN

Item = TypeVar("Item")

NO_IMAGE = "_no_image"  # suffix of the names of the baseline without images


@dataclass(frozen=True)
class EvalSample:
    """One question of a benchmark.

    Attributes:
        id: Unique within the task; the id of the benchmark where it has one.
        question: The question without the prompt of the task.
        messages: The conversation for the model; it ends with a user message. Images are not
            opened yet.
        expected: All correct answers, such as those of several annotators; empty where a judge
            decides.
        category: The group of samples that gets metrics of its own; "" for none.
        metadata: Other JSON values that the metric needs.
    """

    id: str
    question: str
    messages: list[Message]
    expected: tuple[str, ...]
    category: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def without_images(self) -> "EvalSample":
        """The same question without images and their placeholders."""

        def text_only(content: str | list[Message]) -> str | list[Message]:
            if isinstance(content, str):
                return content.replace(IMAGE_TOKEN, "")
            texts = [part for part in content if part["type"] == "text"]
            return [{**part, "text": part["text"].replace(IMAGE_TOKEN, "")} for part in texts]

        messages = [{**turn, "content": text_only(turn["content"])} for turn in self.messages]
        return replace(self, messages=messages)


@dataclass(frozen=True)
class InvalidEvalSample:
    """A sample that the model cannot be asked, and the reason."""

    id: str
    reason: str


@dataclass(frozen=True)
class Response:
    """The text that the model generated.

    Attributes:
        prompt: The text that the model got, with ``<|image|>`` for each image.
        image_digests: Digests of the images of the prompt, in order.
    """

    sample: EvalSample
    prompt: str
    text: str
    image_digests: Sequence[str] = ()


def with_suffix(metrics: dict[str, float], suffix: str) -> dict[str, float]:
    """Metrics under their names with a suffix, as Python floats."""
    return {f"{name}{suffix}": float(value) for name, value in metrics.items()}


def limit_samples(samples: Sequence[EvalSample], count: int | None) -> list[EvalSample]:
    """At most `count` samples, the first ones of all categories in turn, in their order.

    The questions about an image of MME and the rounds of a question of MMBench stay together.
    """
    groups: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for index, sample in enumerate(samples):
        key = sample.metadata.get("image") or sample.metadata.get("question") or sample.id
        groups[sample.category][str(key)].append(index)
    rows = zip_longest(*(group.values() for group in groups.values()), fillvalue=[])
    indices = [index for row in rows for group in row for index in group]
    return [samples[index] for index in sorted(indices[:count])]


def evenly_spaced(items: Sequence[Item], count: int) -> list[Item]:
    """At most `count` of the items, evenly spaced over all of them."""
    count = min(count, len(items))
    return [items[index * len(items) // count] for index in range(count)]
