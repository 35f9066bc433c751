"""Prompts for each kind of data, and conversations with them (Specification §1.5).

As in the authors' training on LLaVA-style JSON, the image comes first, then a line break, then the
text.
"""

import string
from collections.abc import Iterable, Iterator, Sequence

from owl2.data.sample import Message, Sample

VQA_PROMPT = "{question}\nAnswer the question using a single word or phrase."
CHOICE_REQUEST = "Answer with the option's letter from the given choices directly."
CAPTION_PROMPT = "Provide a one-sentence caption for the provided image."

LETTERS = string.ascii_uppercase

Pair = tuple[str, str]  # user text, assistant text


def short_question(question: str) -> str:
    """The question with the request for a short answer; "" for an empty question."""
    return VQA_PROMPT.replace("{question}", question) if question else ""


def with_options(question: str, options: Sequence[str]) -> str:
    """The question and a line "A. ..." for each option."""
    return "\n".join([question, *map("{}. {}".format, LETTERS, options)])


def choice_question(question: str, options: Sequence[str]) -> str:
    """The question with its options, and the request for a letter."""
    return f"{with_options(question, options)}\n{CHOICE_REQUEST}"


def about_image(image: str, pairs: Iterable[Pair], separator: str = "\n") -> list[Message]:
    """A conversation about the image at the path `image`, which is in the first turn."""
    messages: list[Message] = []
    for text, answer in pairs:
        parts: list[Message] = [{"type": "text", "text": text}]
        if not messages:
            first_text = {"type": "text", "text": f"{separator}{text}"}
            parts = [{"type": "image", "path": image}, first_text]
        messages.append({"role": "user", "content": parts})
        messages.append({"role": "assistant", "content": answer})
    return messages


def conversations(
    image: str,
    pairs: Sequence[Pair],
    source: str,
    max_rounds: int | None = None,
    separator: str = "\n",
) -> Iterator[Sample]:
    """Conversations about an image with at most `max_rounds` pairs each; None for no limit."""
    length = max_rounds or max(len(pairs), 1)
    for start in range(0, len(pairs), length):
        yield Sample(about_image(image, pairs[start : start + length], separator), source)


def image_and_text(image: str, text: str) -> list[Message]:
    """An image-text pair for pre-training, without a prompt."""
    return [
        {"role": "user", "content": [{"type": "image", "path": image}]},
        {"role": "assistant", "content": text},
    ]
