"""Prompts for each kind of data, and messages with them (Specification §1.5).

As in the authors' training on LLaVA-style JSON, the image comes first, then a line break, then the
text.
"""

from collections.abc import Iterable, Sequence

from owl2.data.sample import Message

VQA_PROMPT = "{question}\nAnswer the question using a single word or phrase."
CHOICE_REQUEST = "Answer with the option's letter from the given choices directly."
CAPTION_PROMPT = "Provide a one-sentence caption for the provided image."

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

Pair = tuple[str, str]  # user text, assistant text


def short_question(question: str) -> str:
    """The question with the request for a short answer; "" for an empty question."""
    return VQA_PROMPT.replace("{question}", question) if question else ""


def choice_question(question: str, options: Sequence[str]) -> str:
    """The question, its options as lines "A. ...", and the request for a letter."""
    lines = [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False)]
    return "\n".join([question, *lines, CHOICE_REQUEST])


def about_image(image: str, pairs: Iterable[Pair]) -> list[Message]:
    """A conversation about the image at the path `image`, which is in the first turn."""
    messages: list[Message] = []
    for text, answer in pairs:
        parts: list[Message] = [{"type": "text", "text": text}]
        if not messages:
            parts = [{"type": "image", "path": image}, {"type": "text", "text": f"\n{text}"}]
        messages.append({"role": "user", "content": parts})
        messages.append({"role": "assistant", "content": answer})
    return messages


def image_and_text(image: str, text: str) -> list[Message]:
    """An image-text pair for pre-training, without a prompt."""
    return [
        {"role": "user", "content": [{"type": "image", "path": image}]},
        {"role": "assistant", "content": text},
    ]
